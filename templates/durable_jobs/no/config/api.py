{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, result_backend with context %}
{% set backend_errors = result_backend.unavailable | default([]) %}
{% set errors = (["KombuError"] + broker.unavailable + backend_errors) | unique | sort %}
{% set lines %}
from kombu.exceptions import KombuError
from rest_framework import exceptions, throttling, views
{% print broker.unavailable_imports %}
{% print result_backend.unavailable_imports | default %}
{% endset %}
"""What all views of the API share: see REST_FRAMEWORK in the settings."""

import logging

{{ imports.sort(lines) }}
logger = logging.getLogger(__name__)

UNAVAILABLE = ({{ errors | join(", ") }})


class ServiceUnavailable(exceptions.APIException):
    status_code = 503
    default_detail = "Background tasks are unavailable. Try again later."


def exception_handler(error, context):
    """Answer 503 if a view could not reach the broker or the result backend."""
{% if backend_errors %}
    # If the result backend fails, delay() raises a RuntimeError caused by its error.
{% endif %}
    if isinstance(error, UNAVAILABLE) or isinstance(error.__cause__, UNAVAILABLE):
        logger.error("broker or result backend unavailable: %r", error)
        error = ServiceUnavailable()
    return views.exception_handler(error, context)


class Throttle(throttling.UserRateThrottle):
    """Counts requests in the cache. While the cache is unavailable, all requests are allowed."""

    def allow_request(self, request, view):
        try:
            return super().allow_request(request, view)
        except Exception as error:  # each cache backend has its own errors
            logger.warning("not counting requests, cache unavailable: %r", error)
            return True
