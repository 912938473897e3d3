{% from "chosen.jinja" import broker, worker_pool with context %}
"""What the process of a worker does for jobs, beside running them."""

{% print worker_pool.worker_imports %}
{% if broker.flower %}
from contextlib import suppress
{% endif %}
from pathlib import Path

from celery import signals
{% if broker.flower %}
from celery.utils.functional import maybe_list
{% endif %}
{% print worker_pool.worker_celery_imports | default %}
{% if broker.flower %}
from celery.worker.control import Panel
{% endif %}
from django.conf import settings
{% print worker_pool.worker_django_imports %}


def show_life(**kwargs):
    """Touch LIVENESS_FILE: who finds it old takes this process for dead."""
    if file := os.environ.get("LIVENESS_FILE"):
        Path(file).touch()


{% print worker_pool.worker %}
{% if broker.flower %}


@signals.worker_init.connect
def follow_revokes(**kwargs):
    """Cancel the job of every task that this worker is told to revoke or to terminate.

    Celery's signal task_revoked comes when the message reaches a free slot, on some pools never.
    """
    revoke = Panel.data["revoke"]

    def cancel_and_revoke(state, task_id, terminate=False, signal=None, **kwargs):
        for pk in maybe_list(task_id) or []:
            with suppress(Exception):  # some task's own kind of id, or the database is away
                Job.objects.filter(pk=pk).cancel()
        connection.close()  # it would grow stale here, and a child must not inherit it
        # Whatever signal Flower asks for: one that children ignore would leave the task running.
        return revoke(state, task_id, terminate=terminate, signal="SIGKILL", **kwargs)

    def cancel_and_terminate(state, signal, task_id, **kwargs):
        return cancel_and_revoke(state, task_id, terminate=True, **kwargs)

    Panel.data |= {"revoke": cancel_and_revoke, "terminate": cancel_and_terminate}
{% endif %}
