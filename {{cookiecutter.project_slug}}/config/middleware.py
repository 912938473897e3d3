{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, result_backend, has_jobs with context %}
{% set backend_errors = result_backend.unavailable_errors | default([]) %}
{% set errors = (["LimitExceeded", "OperationalError"] + broker.unavailable_errors + backend_errors) | unique | sort %}
{% set lines %}
from django.db import Error, connection
from django.http import HttpResponse
{% if not has_jobs %}
from django.contrib import messages
from django.http import HttpResponseRedirect, JsonResponse
from django.utils.deprecation import MiddlewareMixin
from kombu.exceptions import LimitExceeded, OperationalError
{% print broker.unavailable_imports %}
{% print result_backend.unavailable_imports | default %}
{% endif %}
{% endset %}
{% if not has_jobs %}
import logging
from traceback import extract_tb, walk_tb

{% endif %}
{{ imports.sort(lines) }}
{% if not has_jobs %}
logger = logging.getLogger(__name__)

UNAVAILABLE = ({{ errors | join(", ") }})

{% endif %}

class HealthMiddleware:
    """Answers /health/live and /health/ready. Probes use plain HTTP and an IP address."""

    def __init__(self, get_response):
        self.get_response = get_response

    def __call__(self, request):
        if request.path == "/health/live":
            return HttpResponse("ok")
        if request.path == "/health/ready":
            return ready()
{% if has_jobs %}
        if request.path == "/metrics":  # any host: Prometheus uses an internal name or an address
            request.get_host = lambda: "localhost"
{% endif %}
        return self.get_response(request)


def ready():
    """Answer 200 if the database works, else 503."""
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    except Error:
        return HttpResponse("no database", status=503)
    # Prometheus can read this, too.
    return HttpResponse("ready 1\n", content_type="text/plain; version=0.0.4")
{% if not has_jobs %}


def is_celerys(error):
    """Return whether Celery can't reach a server. A client of your own may raise the same error."""
    frames = walk_tb(error.__traceback__) if isinstance(error, UNAVAILABLE) else ()
    names = {frame.f_globals.get("__name__", "").partition(".")[0] for frame, _ in frames}
    return not names.isdisjoint(("celery", "kombu"))


class UnavailableMiddleware(MiddlewareMixin):
    def process_exception(self, request, error):
        """Answer 503 if a view could not reach the broker or the result backend."""
{% if backend_errors %}
        # If the result backend fails, delay() raises a RuntimeError caused by its error.
{% endif %}
        if is_celerys(error) or is_celerys(error.__cause__):
            logger.error("broker or result backend unavailable: %r", error)
            text = "Background tasks are unavailable. Try again later."
            if request.method == "POST" and request.resolver_match.app_name == "admin":
                messages.error(request, text)
                return HttpResponseRedirect(request.get_full_path())
            return JsonResponse({"detail": text}, status=503)
        last = extract_tb(error.__traceback__)[-1]
        if isinstance(error, RecursionError) and "json" in last.filename:
            return JsonResponse({"detail": "The JSON is nested too deeply."}, status=400)
{% endif %}
