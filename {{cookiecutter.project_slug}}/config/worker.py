{% import "imports.jinja" as imports %}
{% from "chosen.jinja" import broker, result_backend, worker_pool, periodic_tasks, has_jobs, has_results with context %}
{% set stdlib %}
{{ "" if has_jobs else "import os\nfrom pathlib import Path" }}
{% print broker.worker_stdlib | default %}
{% print worker_pool.worker_stdlib %}
{% print periodic_tasks.worker_stdlib | default %}
{% endset %}
{% set lines %}
from celery import signals{{ ", states" if has_results }}
from celery.worker import request
from django.db import {{ "" if has_jobs else "close_old_connections, " }}connection
{{ "from durable_jobs.contrib.structlog import LogStep" if has_jobs }}
{% print broker.worker_imports %}
{% print result_backend.worker_imports | default %}
{% print worker_pool.worker_imports | default %}
{% print periodic_tasks.worker_imports | default %}
{% endset %}
"""What Celery's workers and Beat lack. They import this file: config/celery.py includes it."""

{% set stdlib = imports.sort(stdlib) %}
{% if stdlib %}
{{ stdlib }}
{% endif %}
{{ imports.sort(lines) }}
from .celery import app
{% if not has_jobs %}
from .logs import LogStep
{% endif %}
{% if broker.visibility is defined %}

logger = get_logger(__name__)
{% endif %}

app.steps["worker"].add(LogStep)  # a task's log lines name it and its request
# A task that raises a MemoryError fails like any other. Celery would end the worker, or never
# acknowledge the task, which then comes again without end (celery issue 10462).
request.MemoryError = ()  # so isinstance() there is false


@signals.celeryd_init.connect
@signals.beat_init.connect
def be_patient(**kwargs):
    """Let workers and Beat wait for a server that is down or hangs. In a request, that is an error."""
    conf = app.conf
    conf.broker_connection_max_retries = None  # forever; by default, for 47 minutes
    conf.task_publish_retry_policy = {"max_retries": None, "interval_max": 5}
    # Also for the first task that a process sends; by default, for 4 seconds
    conf.broker_transport_options |= {"max_retries": None, "connect_retries_timeout": None}
    if "connect_timeout" in (options := connection.settings_dict["OPTIONS"]):  # not in SQLite's
        options["connect_timeout"] = 30  # seconds
{% print broker.patience %}
{% print result_backend.patience | default %}
{% print worker_pool.patience | default %}
{% if not has_jobs %}


@signals.task_prerun.connect
def check_connections(task, **kwargs):
    """Give each task a working database connection, as Django does for each request."""
    if not task.request.is_eager:
        close_old_connections()


@signals.heartbeat_sent.connect
def touch_liveness_file(**kwargs):
    """Tell health checks that this worker is alive: it sends a heartbeat every two seconds."""
    if file := os.environ.get("LIVENESS_FILE"):
        Path(file).touch()
{% endif %}
{% print broker.worker %}
{% print result_backend.worker | default %}
{% if has_results %}


store_result = {{ result_backend.class }}._store_result


def store_unless_ended(backend, task_id, result, state, *args, **kwargs):
    """Don't let the state RETRY, stored late, replace a result.

    A task sends its retry before it stores this state, for which it may have to wait for the backend.
    By then, the retry may have ended (celery pull 6115 cures one backend).
    """
    if state == states.RETRY and backend.get_state(task_id) in states.READY_STATES:
        return result
    return store_result(backend, task_id, result, state, *args, **kwargs)


{{ result_backend.class }}._store_result = store_unless_ended
{% endif %}
{% print worker_pool.worker %}
{% print periodic_tasks.worker | default %}
