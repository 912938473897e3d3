"""Batches, next steps, and Celery's canvas made of jobs."""

import pytest
from celery import chain, chord, group, shared_task

from jobs.models import Batch, Job
from jobs.tasks import JobError, JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask)
def add(x, y):
    return x + y


@shared_task(base=JobTask)
def total(numbers):
    return sum(numbers)


@shared_task(base=JobTask)
def fail(*args):
    raise JobError("no")


@shared_task(base=JobTask)
def echo(*args):
    return list(args)


def state(*jobs):
    return [Job.objects.get(pk=job.pk).state for job in jobs]


def test_a_batch_starts_what_comes_next(user, run_jobs):
    batch = Batch.objects.enqueue(
        add,
        [[n, 1] for n in range(5)],
        owner=user,
        label="Numbers",
        then=echo.s(7),
        ended=echo.si(8),
    )
    assert (batch.state, Job.objects.count()) == ("open", 5)
    run_jobs()
    batch.refresh_from_db()
    assert (batch.state, batch.counts) == ("succeeded", {"succeeded": 5})
    results = Job.objects.filter(follows=batch.pk).values_list("result", "owner")
    assert sorted(results, key=str) == [([8], user.pk), ([[1, 2, 3, 4, 5], 7], user.pk)]


def test_chain(run_jobs):
    last = chain(add.s(1, 2), add.s(10), add.si(5, 5), add.s(100))()
    assert Job.objects.count() == 1
    run_jobs()
    assert [last.get(), last.parent.get(), last.parent.parent.get()] == [110, 10, 13]


def test_the_operators_and_partial_arguments(run_jobs):
    sig = add.s(2) | add.s(4)
    assert sig(1).get() == 7
    assert sig.delay(2).get() == 8
    assert sig.apply_async((3,)).get() == 9
    assert (group(add.s(1, 1), add.s(2, 2)) | total.s() | add.s(1)).delay().get() == 7
    assert (add.s(1, 1) | group(add.s(10), add.s(20)) | total.s())().get() == 34


def test_group(run_jobs):
    done = group(add.s(n, n) for n in range(5))()
    assert (done.ready(), done.completed_count(), len(done)) == (False, 0, 5)
    run_jobs()
    assert (done.ready(), done.completed_count(), done.get()) == (True, 5, [0, 2, 4, 6, 8])
    assert group(add.s(1), add.s(2))(10).get() == [11, 12]
    assert done.successful() and not done.failed()


def test_chord(run_jobs):
    last = chord(add.s(n, n) for n in range(100))(total.s())
    assert Job.objects.count() == 100
    assert last.get() == 9900
    assert chord([add.s(1, 1), add.s(2, 2)], total.s()).apply_async().get() == 6
    assert last.parent.completed_count() == 100


def test_nested_canvas(run_jobs):
    inner = chord([add.s(1, 1), chain(add.s(2, 2), add.s(1))], total.s())  # 2 + 5
    assert chain(inner, add.s(3))().get() == 10
    assert group(inner, chain(add.s(1, 2), add.s(3)))().get() == [7, 6]
    assert chord([group(add.s(1, 0), add.s(2, 0)), add.s(3, 0)])(total.s()).get() == 6
    assert chord([])(total.s()).get() == 0
    outer = chord([inner, add.s(1, 1), chain(add.s(3, 3), group(add.s(1), add.s(2)), echo.s())])
    assert outer(echo.s()).get() == [[7, 2, [[7, 8]]]]
