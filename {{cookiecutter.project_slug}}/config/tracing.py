{% from "chosen.jinja" import has_jobs with context %}
"""Traces, if OTEL_EXPORTER_OTLP_ENDPOINT is set. OpenTelemetry's other variables work, too.

Install the packages with `uv sync --extra tracing`.
"""

import os
import threading

from celery import signals
from django.apps import AppConfig
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.instrumentation.django import DjangoInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def flush(**kwargs):
    """Export the spans of a worker process that is ending. Wait only two seconds for the collector."""
    thread = threading.Thread(target=trace.get_tracer_provider().force_flush, daemon=True)
    thread.start()
    thread.join(2)


class Tracing(AppConfig):
    """An app in INSTALLED_APPS: Django calls ready() in each process, before it loads MIDDLEWARE."""

    name = "config.tracing"

    def ready(self):
        os.environ.setdefault("OTEL_SERVICE_NAME", "{{ cookiecutter.project_slug }}")
        provider = TracerProvider()
        # Over HTTP: gRPC's own sockets would block a worker that patches those of Python.
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
        DjangoInstrumentor().instrument(excluded_urls="/health/{{ ",/metrics$" if has_jobs }}")
        CeleryInstrumentor().instrument()
        # These processes end without Python's exit handlers.
        signals.worker_process_shutdown.connect(flush)
        signals.worker_shutdown.connect(flush)
