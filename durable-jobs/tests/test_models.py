"""Rows: the database refuses states that cannot be, and jobs that are needed stay."""

import uuid

import pytest
from celery import shared_task
from django.contrib.auth import get_user_model
from django.db import IntegrityError, transaction
from django.db.models import RestrictedError
from helpers import add, claim, claim_and_lapse

from durable_jobs import transitions
from durable_jobs.actions import cancel, run_all_again
from durable_jobs.batches import add_many, open_batch
from durable_jobs.database import Now
from durable_jobs.eager import run_jobs
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Batch, Failure, Job
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize(
    "impossible",
    [
        {"state": "queued"},
        {"state": "queued", "send_at": Now(), "blocked_by": "one"},
        {"state": "queued", "send_at": Now(), "lease_ends_at": Now()},
        {"state": "queued", "send_at": Now(), "finished_at": Now()},
        {"state": "queued", "send_at": Now(), "run_token": uuid.UUID(int=1)},
        {"state": "running", "lease_ends_at": Now()},
        {"state": "running", "run_token": uuid.UUID(int=1)},
        {
            "state": "running",
            "run_token": uuid.UUID(int=1),
            "lease_ends_at": Now(),
            "send_at": Now(),
        },
        {"state": "succeeded"},
        {"state": "failed", "finished_at": Now(), "send_at": Now()},
        {"state": "failed", "finished_at": Now(), "lease_ends_at": Now()},
        {"state": "cancelled", "finished_at": Now(), "run_token": uuid.UUID(int=1)},
        {"state": "lost", "send_at": Now()},
    ],
    ids=str,
)
def test_the_database_refuses_impossible_jobs(impossible):
    with pytest.raises(IntegrityError):
        Job.objects.create(task="task", queue="queue", **impossible)


def test_a_stored_job_is_not_saved_as_a_whole(published):
    """Its row may have changed since it was read."""
    job = enqueue(add, [1, 2])
    assert claim(job.pk)
    with pytest.raises(TypeError, match=r"use save\(update_fields=\[...\]\)"):
        job.save()
    job.label = "Sum"
    job.save(update_fields=["label"])
    job.refresh_from_db()
    assert (job.state, job.label) == ("running", "Sum")


def test_a_user_with_active_jobs_is_not_deleted(published, user, admin_user):
    jobs = [enqueue(add, [1, 2], owner=user) for _ in range(2)]
    other = enqueue(add, [1, 2], owner=admin_user)
    claim_and_lapse(jobs[0])
    Failure.objects.create(job=jobs[0], started_at=Now())
    with pytest.raises(RestrictedError, match="active jobs: cancel them first") as found:
        user.delete()
    assert found.value.restricted_objects == set(jobs)
    cancel(Job.objects.filter(owner=user))
    user.delete()
    assert list(Job.objects.all()) == [other]


@shared_task(base=JobTask)
def delete_user(pk):
    """As docs/existing-project.md has it, with smaller pages."""
    jobs = Job.objects.filter(owner=pk)
    while page := list(jobs.values_list("pk", flat=True)[:2]):
        Job.objects.filter(pk__in=page).delete()
    get_user_model().objects.filter(pk=pk).delete()


def test_a_job_deletes_a_user_with_queued_running_and_final_jobs(published, user, admin_user):
    for owner in user, admin_user:
        with open_batch(owner=owner, on_finish=add.si(1, 2)) as batch:
            add_many(batch, [add.s(1, 2)] * 3)
        enqueue(add, [1, 2], owner=owner, idempotency_key="key")
        first, second, *_ = Job.objects.filter(owner=owner)
        claim_and_lapse(first)
        cancel(second)
    job = delete_user.enqueue(user.pk)
    run_jobs(Job.objects.filter(pk=job.pk))
    assert not get_user_model().objects.filter(pk=user.pk).exists()
    assert Job.objects.filter(owner=admin_user).count() == 4 and Batch.objects.count() == 1
    assert Job.objects.count() == 5


def test_a_router_with_a_replica_stops_no_job(replica, published, user):
    """Jobs are neither written to a replica nor read from it: it lags behind."""
    with transaction.atomic():  # of which the replica sees nothing
        job = enqueue(add, [1, 2], owner=user)
        run = uuid.uuid4()
        assert claim(job.pk, run)
        job.refresh_from_db()
        assert job.state == "running"
        failure = Failure(started_at=Now(), job_id=job.pk)
        assert failure.job == job
        assert transitions.succeed(id=job.pk, run_token=run, result=3, message="")
        [again] = run_all_again(Job.objects.all())
        assert (again.owner_id, again.follows) == (user.pk, job.pk)
        assert cancel(again)
        again.refresh_from_db()
        assert run_all_again(Job.objects.filter(pk=again.pk)) == [again]
