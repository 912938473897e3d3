"""The parser, filter and throttle of all views, which the setting REST_FRAMEWORK names."""

import logging
import time

from django_filters.rest_framework import DjangoFilterBackend
from rest_framework import exceptions, parsers, throttling

logger = logging.getLogger(__name__)

CACHE_PAUSE = 10  # seconds without another try after the cache failed, so that requests stay fast


class Parser(parsers.JSONParser):
    """Answers 400 to a body that is nested too deeply to be parsed."""

    def parse(self, *args, **kwargs):
        try:
            return super().parse(*args, **kwargs)
        except RecursionError:
            raise exceptions.ParseError("Nested too deeply.") from None


class Filter(DjangoFilterBackend):
    """Answers 400 to a parameter that is empty or is given twice, because it is ambiguous."""

    def filter_queryset(self, request, queryset, view):
        for name, values in request.query_params.lists():
            if len(values) > 1 or not values[0]:
                raise exceptions.ValidationError({name: ["Give it once, with a value."]})
        return super().filter_queryset(request, queryset, view)


class Throttle(throttling.UserRateThrottle):
    """Counts requests in the cache. While the cache is unavailable, all requests are allowed."""

    count_again_at = 0.0

    def allow_request(self, request, view):
        if time.monotonic() < Throttle.count_again_at:
            return True
        try:
            return super().allow_request(request, view)
        except Exception as error:  # each cache backend raises its own classes
            Throttle.count_again_at = time.monotonic() + CACHE_PAUSE
            logger.warning("requests are not counted, the cache is unavailable: %r", error)
            return True
