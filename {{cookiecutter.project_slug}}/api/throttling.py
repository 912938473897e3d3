import logging
import time

from rest_framework import throttling

logger = logging.getLogger(__name__)

CACHE_PAUSE = 10  # seconds until a failed cache is tried again, so that requests stay fast


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
            logger.warning("requests are not throttled: %r", error)
            return True
