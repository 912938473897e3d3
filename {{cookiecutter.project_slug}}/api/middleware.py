{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, result_backend with context %}
{% set backend_errors = result_backend.unavailable_errors | default([]) %}
{% set errors = (["LimitExceeded", "OperationalError"] + broker.unavailable_errors + backend_errors) | unique | sort %}
{% set lines %}
from django.contrib import messages
from django.http import HttpResponseRedirect, JsonResponse
from django.utils.deprecation import MiddlewareMixin
from kombu.exceptions import LimitExceeded, OperationalError
{% print broker.unavailable_imports %}
{% print result_backend.unavailable_imports | default %}
{% endset %}
import logging
from traceback import extract_tb

{{ imports.sort(lines) }}
logger = logging.getLogger(__name__)

UNAVAILABLE = ({{ errors | join(", ") }})


class ErrorMiddleware(MiddlewareMixin):
    def process_exception(self, request, error):
        """Answer 503 if a view could not reach the broker or the result backend."""
{% if backend_errors %}
        # If the result backend fails, delay() raises a RuntimeError caused by its error.
{% endif %}
        if isinstance(error, UNAVAILABLE) or isinstance(error.__cause__, UNAVAILABLE):
            logger.error("broker or result backend unavailable: %r", error)
            text = "Background tasks are unavailable. Try again later."
            if request.method == "POST" and request.resolver_match.app_name == "admin":
                messages.error(request, text)
                return HttpResponseRedirect(request.get_full_path())
            return JsonResponse({"detail": text}, status=503)
        last = extract_tb(error.__traceback__)[-1]
        if isinstance(error, RecursionError) and "json" in last.filename:
            return JsonResponse({"detail": "The JSON is nested too deeply."}, status=400)
