{% from "chosen.jinja" import has_jobs with context %}
"""/health/live and /health/ready, for load balancers and orchestrators."""

from django.db import Error, connection
from django.http import HttpResponse


class HealthMiddleware:
    """Answers before ALLOWED_HOSTS and HTTPS matter: probes use plain HTTP and an IP address."""

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
    return HttpResponse("ok")
