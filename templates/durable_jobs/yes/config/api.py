"""What all views of the API share: see REST_FRAMEWORK and SPECTACULAR_SETTINGS in the settings."""

import logging
import time

from rest_framework import exceptions, parsers, throttling

logger = logging.getLogger(__name__)

CACHE_PAUSE = 10  # seconds until a failed cache is tried again, so that requests stay fast
ERRORS = {
    401: "Not authenticated",
    403: "Not permitted",
    406: "Not acceptable",
    429: "Too many requests",
}
DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}}


class Parser(parsers.JSONParser):
    """Answers 400 instead of 500 if a body is nested too deeply to be parsed."""

    def parse(self, *args, **kwargs):
        try:
            return super().parse(*args, **kwargs)
        except RecursionError:
            raise exceptions.ParseError("Nested too deeply.") from None


class Throttle(throttling.UserRateThrottle):
    """Counts requests in the cache. While the cache is unavailable, all requests are allowed."""

    count_again_at = 0.0

    def allow_request(self, request, view):
        if time.monotonic() < Throttle.count_again_at:
            return True
        try:
            return super().allow_request(request, view)
        except Exception as error:  # each cache backend has its own errors
            Throttle.count_again_at = time.monotonic() + CACHE_PAUSE
            logger.warning(
                "requests are not throttled, because the cache is unavailable: %r", error
            )
            return True


def add_errors(result, **kwargs):
    """Add the errors that views have in common to the OpenAPI document (`result`)."""
    for path, operations in result["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            for status, description in errors_of(path, operation).items():
                content = {"application/json": {"schema": {} if status == 400 else DETAIL}}
                responses.setdefault(str(status), {"description": description, "content": content})
            responses["429"]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
            responses["414"] = {"description": "URI too long"}  # gunicorn answers this
    return result


def errors_of(path, operation):
    """Return the errors of this operation, {status: description}."""
    errors = dict(ERRORS)
    parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
    if "requestBody" in operation:
        errors |= {400: "Invalid request", 415: "Unsupported media type"}
    if {"page", "cursor"} & parameters:
        errors |= {400: "Invalid request", 404: "Not found"}
    if "{" in path:
        errors[404] = "Not found"
    return errors
