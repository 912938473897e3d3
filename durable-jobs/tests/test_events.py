"""Events: Flower learns how jobs end."""

import uuid

import pytest
from celery import current_app as app
from helpers import CLAIM, add

from durable_jobs import transitions
from durable_jobs.actions import cancel
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job
from durable_jobs.publish import publish
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize(("state", "ends"), [("queued", True), ("running", False)])
def test_flower_is_told_that_a_cancelled_job_has_ended(monkeypatch, state, ends):
    """If another run has the job, no event is sent: that run reports how the job ends."""
    sent = []
    monkeypatch.setattr(JobTask, "send_event", lambda self, name, **fields: sent.append(name))
    monkeypatch.setitem(app.conf, "worker_send_task_events", True)
    job = enqueue(add, [1, 2])
    if ends:
        cancel(Job.objects.filter(pk=job.pk))
    else:
        transitions.claim(id=job.pk, run_token=uuid.uuid4(), **CLAIM)
    publish([job])
    assert sent == (["task-revoked"] if ends else [])
