"""The view durable_jobs_load, with which an autoscaler sees what the workers of each queue have to do."""

from datetime import timedelta

from django.db import connection
from django.utils import timezone
from helpers import add, call, claim

from durable_jobs import pauses
from durable_jobs.actions import cancel
from durable_jobs.enqueue import enqueue
from durable_jobs.models import Job


def load():
    with connection.cursor() as cursor:
        cursor.execute("SELECT queue, jobs FROM durable_jobs_load")
        return dict(cursor.fetchall())


def store(queue, **options):
    return enqueue(add, [1, 2], queue=queue, **options)


def test_jobs_that_run_or_are_due_count(sent, transactional_db):
    assert load() == {}
    store("cpu")
    claim(store("io").pk)
    later = store("celery", countdown=60)
    assert load() == {"cpu": 1, "io": 1}
    Job.objects.filter(pk=later.pk).update(send_at=timezone.now() - timedelta(seconds=1))
    assert load() == {"celery": 1, "cpu": 1, "io": 1}


def test_jobs_that_have_ended_do_not_count(sent, transactional_db):
    cancel(store("cpu"))
    assert load() == {}


def test_jobs_that_a_pause_blocks_do_not_count(sent, transactional_db):
    for queue in "cpu", "io":
        store(queue)
    pauses.pause("io")
    assert load() == {"cpu": 1}
    claim(store("cpu").pk)
    pauses.pause(add.name)
    assert load() == {"cpu": 1}, "only the one that runs"


def test_jobs_that_a_limit_blocks_do_not_count(sent, transactional_db):
    for number in range(3):  # two of a tenant may run
        enqueue(call, ["7", number], queue="celery")
    assert load() == {"celery": 2}
