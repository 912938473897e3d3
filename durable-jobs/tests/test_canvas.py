"""Celery's canvas made of jobs: chain, group and chord."""

import pickle
import uuid
from contextlib import suppress
from datetime import timedelta

import pytest
from celery import chain, chord, chunks, group, shared_task, signature, xmap
from celery import current_app as app
from celery.exceptions import TaskError, TaskRevokedError
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult, GroupResult
from django.db import connection, transaction
from django.db.models.functions import Now
from django.utils import timezone
from helpers import act, add, double, echo, plain, total

from durable_jobs.models import Batch, Job
from durable_jobs.publish import publish
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask, bind=True, max_retries=3, default_retry_delay=0)
def flaky(self, x):
    if not self.request.retries:
        raise self.retry()
    return x


def sums():
    return add.s(1, 1) | add.s(1)


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
    assert (len(done), Job.objects.count()) == (5, 5)
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


@pytest.mark.django_db(transaction=True)
def test_a_canvas_runs_at_the_commit_in_eager_mode():
    with transaction.atomic():
        last = chord([add.s(1, 1), chain(add.s(2, 2), add.s(1))])(total.s() | add.s(3))
        assert set(Job.objects.values_list("state", flat=True)) == {"queued"}
    assert set(Job.objects.values_list("state", flat=True)) == {"succeeded"}
    assert last.get() == 10


def test_get_of_an_id_runs_jobs_that_enqueue_themselves_only_until_then():
    act.body = lambda self: act.delay() and None
    act.delay()
    assert AsyncResult(sums()().id).get() == 3


def test_a_retry_is_waited_for():
    assert chain(flaky.s(1), add.s(1))().get(interval=0) == 2
    assert chord([flaky.s(1), add.s(1, 1)])(total.s()).get(interval=0) == 3


def test_a_canvas_is_stored_in_the_callers_transaction():
    with suppress(ZeroDivisionError), transaction.atomic():
        chord(add.s(n, n) for n in range(5))(total.s())
        1 / 0  # noqa: B018
    with pytest.raises(TypeError), transaction.atomic():  # all or nothing
        chord([add.s(1, 1), add.s(1)])(total.s())
    with pytest.raises(TypeError), transaction.atomic():
        chain(add.s(1, 1), add.s(1, 1))()  # the second one gets three arguments
    assert not Job.objects.exists() and not Batch.objects.exists()


def test_no_row_is_stored_if_one_cannot_be(settings):
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"MAX_BYTES": 1000}
    for send in [
        lambda: group(add.s(1, 1), chain([add.s(1, 1)] + 20 * [add.s(1)]))(),
        lambda: chord([add.s(1, 1)])(chain(20 * [add.si(1, 1)])),
        lambda: group(add.s(1, 1), echo.s("x" * 1000))(),
    ]:
        with pytest.raises(ValueError, match="MAX_BYTES"):
            send()
    assert not Job.objects.exists() and not Batch.objects.exists()


def test_the_rows_of_a_thousand_members_are_read_at_once(no_eager, django_assert_max_num_queries):
    done = group(add.s(n, n) for n in range(1_000))()
    reads = 1 if connection.vendor == "postgresql" else 5
    for read in done.ready, done.completed_count, done.failed, done.successful, done.waiting:
        with django_assert_max_num_queries(reads):
            read()
    Job.objects.update(state="succeeded", finished_at=Now(), sweep_at=None, result=3)
    with django_assert_max_num_queries(reads):
        assert done.get() == 1_000 * [3]
    with django_assert_max_num_queries(0):
        assert (done.ready(), done.completed_count()) == (True, 1_000)


def test_a_group_result_waits_and_times_out(no_eager):
    done = group(add.s(1, 1), add.s(2, 2))()
    with pytest.raises(CeleryTimeout):
        done.get(timeout=0.01)
    app.conf.task_always_eager = True
    values = {}
    assert done.get(callback=values.__setitem__) == []
    assert sorted(values.values()) == [2, 4]
    assert pickle.loads(pickle.dumps(done)).get() == [2, 4]


def test_the_id_of_a_group_is_that_of_its_batch(user):
    done = group([add.s(1, 1), add.s(2, 2)], task_id=str(uuid.uuid4())).apply_async(label="Sums")
    batch = Batch.objects.get(pk=done.id, label="Sums")
    assert {str(job.pk) for job in batch.jobs.all()} == {each.id for each in done}
    last = chord([add.s(1, 1)])(total.s())
    assert Batch.objects.filter(pk=last.parent.id).exists()
    assert chain(add.s(1, 1), add.s(1)).apply_async(task_id=str(batch.pk)).id == str(batch.pk)
    body = {"body": total.s()}
    assert chord([add.s(1, 1)]).apply_async(kwargs=body, task_id=last.id).id == last.id


def test_revoke_of_a_group_cancels_its_batch(no_eager):
    done = group(add.s(1, 1), chain(add.s(2, 2), add.s(1)), group(add.s(3, 3)))()
    done.revoke()
    assert set(Job.objects.values_list("state", flat=True)) == {"cancelled"}
    assert Batch.objects.get().state == "cancelled"
    assert done.ready() and not done.successful()
    with pytest.raises(TaskRevokedError):
        done.get()


def test_revoke_of_a_step_stops_what_comes_before_it():
    other = chain(add.s(1, 1), add.s(1))()
    chained = chain(add.s(1, 1), add.s(1), add.s(1))()
    body = chord([add.s(1, 1), add.s(2, 2)])(total.s() | add.s(1))
    for result in chained, body:
        result.revoke()
    for result in chained, body:
        with pytest.raises(TaskRevokedError):
            result.get()
    assert Batch.objects.get().state == "cancelled"
    assert Job.objects.filter(state="cancelled").count() == 3
    assert other.get() == 3


def test_revoke_of_a_plain_task_cancels_no_job(no_eager):
    """Even if its id is an argument of a step."""
    pk = str(uuid.uuid4())
    chain(add.s(1, 1), echo.s(pk))()
    app.control.revoke(pk)
    assert not Job.objects.filter(state="cancelled").exists()


# What Celery documents


def test_partial_arguments_and_immutable_signatures():
    assert echo.s(2, a=1).apply_async((1,), {"b": 2}).get() == [1, 2, ["a", 1], ["b", 2]]
    sums = chain(echo.s(2), echo.s(3))
    assert sums.apply_async((1,), {"b": 2}).get() == [[1, 2, ["b", 2]], 3]
    assert chain(echo.si(2), echo.si(3), echo.si())(1).get() == []
    assert group(echo.s(2), echo.si(3))(1).get() == [[1, 2], [3]]
    assert group(echo.s(2), echo.si(3)).apply_async(kwargs={"b": 2}).get() == [
        [2, ["b", 2]],
        [3],
    ]
    assert chord([echo.s(2), echo.si(3)]).apply_async((1,), {"body": echo.s(4)}).get() == [
        [[1, 2], [3]],
        4,
    ]
    assert chord([echo.s(2)])(echo.si(4)).get() == [4]
    assert echo.s(1).clone((2,), {"a": 3}).delay().get() == [2, 1, ["a", 3]]
    assert (~chain(add.s(1, 1), add.s(1))) == 3


def test_signatures_as_data():
    sums = chain(group(add.s(1, 1), add.s(2, 2)), total.s(), group(add.s(1), add.s(2)))
    for kind in dict, lambda sig: app.signature(pickle.loads(pickle.dumps(dict(sig)))):
        assert signature(kind(sums), app=app).delay().get() == [7, 8]
    assert signature(dict(chord([add.s(1, 1)], total.s()))).delay().get() == 2
    by_name = app.signature(add.name, (1, 2)) | app.signature(add.name, (3,))
    assert by_name().get() == 6


def test_nested_groups_and_groups_of_nothing():
    assert group(group(add.s(1, 1), add.s(2, 2)), add.s(3, 3))().get() == [2, 4, 6]
    assert chain(add.s(1, 1))().get() == 2
    assert group(chain(), add.s(1, 1))().get() == [2]
    assert chain(add.s(1, 1), group(), add.s(1))().get() == 3
    assert chain(group(add.s(1, 1), add.s(2, 2)), total.s() | group([add.s(1)]))().get() == 7
    assert chord([])(echo.s()).get() == [[]]
    assert chain(chord([], echo.s()), echo.s(1))().get() == [[[]], 1]
    with_end = group(add.s(1, 1), chain(add.s(2, 2), group(add.s(1), add.s(2))))()
    assert with_end.get() == [2, [5, 6]]
    assert (with_end.completed_count(), with_end.successful()) == (3, True)


def test_what_comes_next_keeps_its_parent():
    first = add.s(1, 1)
    last = (first | group(add.s(1), add.s(2)) | total.s())()
    assert last.get() == 7
    assert isinstance(last.parent, GroupResult) and last.parent.get() == [3, 4]
    assert last.parent.parent.get() == 2 and last.parent.parent.parent is None
    assert last.children is None


def test_options_are_for_the_jobs_that_celery_gives_them():
    chain(add.s(1, 1), add.s(1)).apply_async(countdown=60, queue="io")
    first = Job.objects.get(args=[1, 1])
    assert (first.queue, first.times_sent, first.then[0]["queue"]) == ("io", 0, "celery")
    group(add.s(5, 5).set(queue="cpu"), add.s(5, 5).set(countdown=60))()
    rows = Job.objects.filter(args=[5, 5]).values_list("queue", "times_sent")
    assert set(rows) == {("cpu", 1), ("celery", 0)}
    group(add.s(6, 6), add.s(6, 6)).apply_async(queue="io", countdown=60)
    assert set(Job.objects.filter(args=[6, 6]).values_list("queue", "times_sent")) == {("io", 0)}
    chord([add.s(7, 7)], total.s().set(countdown=9)).apply_async(queue="io", countdown=60)
    header = Job.objects.get(args=[7, 7])
    [body] = header.batch.then
    assert (header.queue, header.times_sent) == ("io", 0)
    assert (body["queue"], body["countdown"], body["eta"]) == ("io", 9, None)
    eta = timezone.now() + timedelta(hours=1)
    chain(add.s(8, 8).set(eta=eta), add.s(8).set(eta=eta))()
    assert abs(Job.objects.get(args=[8, 8]).due_at - eta) < timedelta(seconds=5)
    Job.objects.filter(args=[8, 8]).update(due_at=Now())
    publish([Job.objects.get(args=[8, 8])])
    second = Job.objects.get(args__1=8, follows__isnull=False)
    assert abs(second.due_at - eta) < timedelta(seconds=5)
    delayed = group([add.s(9, 9), add.s(9, 9)]).skew(start=60, stop=90)()
    assert set(Job.objects.filter(batch=delayed.id).values_list("times_sent", flat=True)) == {0}


def test_owner_and_label(user, run_jobs):
    steps = add.s(1, 1) | group(add.s(1), add.s(2).set(label="two")) | total.s()
    steps.apply_async(owner=user, label="Sum")
    chain(add.s(1, 1), add.s(1)).set(owner=user, label="Sum")()
    run_jobs()
    rows = Job.objects.values_list("owner", "label")
    assert sorted(rows) == [(user.pk, "Sum")] * 5 + [(user.pk, "two")]
    assert Batch.objects.filter(owner=user, label="Sum").exists()
    with pytest.raises(ValueError, match="must be a"):
        steps.apply_async(owner="me")


def test_a_single_signature_takes_the_options_of_enqueue(user):
    result = add.s(1).apply_async((2,), owner=user, label="Sum", unique="sum", idempotency_key="1")
    job = Job.objects.get(owner=user, label="Sum", unique_key="sum", idempotency_key="1")
    assert add.s(1, 2).set(unique="sum").delay().id == result.id == str(job.pk)
    assert add.s(1, 2).set(label="three", queue="io", owner=user).delay().get() == 3
    assert Job.objects.filter(label="three", queue="io", owner=user).exists()
    app.send_task(add.name, [3, 4], owner=user, label="by name")
    assert Job.objects.get(label="by name").owner == user
    act.body = lambda self: self.retry(label="x")
    with pytest.raises(TaskError, match="does not take label"):
        act.delay().get()


@pytest.mark.filterwarnings("ignore::celery.exceptions.CPendingDeprecationWarning")  # link_error
@pytest.mark.parametrize(
    "send",
    [
        lambda: chord([plain.si(), add.si(1, 2)])(plain.si()),
        lambda: chord([add.si(1, 2)])(plain.si()),
        lambda: chord([plain.si()])(add.si(1, 2)),
        lambda: (plain.si() | add.si(1, 2))(),
        lambda: (add.si(1, 2) | plain.si())(),
        lambda: group(plain.si(), add.si(1, 2))(),
        lambda: chain(add.s(1, 1), group(add.s(1), chain(add.s(1), plain.s())))(),
        lambda: chain(add.s(1, 1).set(link=add.s(1)), add.s(2))(),
        lambda: chain(add.s(1, 1), add.s(2)).apply_async(link=add.s(1)),
        lambda: chain(add.s(1, 1), add.s(2)).apply_async(link_error=echo.s()),
        lambda: chain(add.s(1, 1), add.s(2)).on_error(echo.s())(),
        lambda: chord([add.s(1, 1)], total.s()).on_error(echo.s())(),
        lambda: chord([add.s(1, 1)], total.s()).apply_async(link=echo.s()),
        lambda: chord([add.s(1, 1)], total.s().on_error(echo.s()))(),
        lambda: group(add.s(1, 1).set(expires=5), add.s(1, 1))(),
        lambda: group(add.s(1, 1), add.s(1, 1)).apply_async(priority=5),
        lambda: chain(add.s(1, 1), add.s(1).set(time_limit=5))(),
        lambda: chain(add.s(1, 1), add.s(1).set(unique="x"))(),
        lambda: group(add.s(1, 1), add.s(1, 1)).apply_async(idempotency_key="x"),
        lambda: group(add.s(1, 1).set(owner=1), add.s(1, 1))(),
        lambda: chain(xmap(add.s(), [(1, 2)]), echo.s())(),
        lambda: group(chunks(add.s(), [(1, 2)], 1), echo.s())(),
        lambda: xmap(add.s(), [(1, 2)]).apply_async(),
        lambda: xmap(add.s(), [(1, 2)]).delay(),
        lambda: chain(add.s(1, 1), add.s(1)).apply(),
        lambda: group(add.s(1, 1), add.s(1, 1)).apply(),
        lambda: chord([add.s(1, 1)], total.s()).apply(),
        lambda: plain.apply_async(link=chain(add.s(1, 1), add.s(1))),
    ],
)
@pytest.mark.parametrize("eager", [True, False])
def test_what_a_canvas_of_jobs_cannot_do_is_refused(send, eager):
    app.conf.task_always_eager = eager
    with pytest.raises(TypeError, match="group, chain or chord with plain tasks"):
        send()
    assert not Job.objects.exists() and not Batch.objects.exists()


@pytest.mark.parametrize(
    ("send", "error"),
    [
        (lambda: sums().apply_async(countdown=1, eta=timezone.now()), "not both"),
        (lambda: sums().apply_async(task_id="x"), "hexadecimal UUID"),
        (lambda: chain(sums(), add.s(1).set(countdown=1e9))(), "ten years"),
        (lambda: chain(sums(), add.s(object()))(), "JSON"),
        (lambda: chain(sums(), add.s(1).set(queue=5))(), "queue= must be"),
        (lambda: chain(sums(), app.signature("unknown"))(), "unknown is not a job"),
        (lambda: chord([add.s(1, 1)]).apply_async(), "is not a signature"),
        (lambda: chord([sums() | group(echo.s(), echo.s())] * 2)(echo.s()), "header"),
        (lambda: chord([group(sums(), sums() | group([echo.s()] * 2))])(echo.s()), "header"),
    ],
)
def test_a_canvas_that_cannot_be_stored_is_refused(send, error):
    with pytest.raises((TypeError, ValueError), match=error):
        send()
    assert not Job.objects.exists() and not Batch.objects.exists()


def test_a_body_may_start_a_canvas(run_jobs):
    act.body = lambda self: chord([add.s(1, 1), add.s(2, 2)])(total.s()).id
    pk = act.delay().get()
    assert AsyncResult(pk).get() == 6


# Django's tasks


def test_a_task_of_django_is_a_step(user):
    assert (add.s(1, 1) | double.s() | add.s(1)).delay().get() == 5
    assert chord([double.s(1), double.s(2)])(total.s() | double.s()).get() == 12
    assert (add.s(1, 1) | double.si(5)).delay().get() == 10
    labelled = double.using(queue_name="io", label="twice", countdown=60)
    (add.s(1, 1) | labelled.s())().get()
    assert Job.objects.filter(queue="io", label="twice", times_sent=0).count() == 1
    owned = double.using(owner=user, unique="u", idempotency_key="i").s(2).delay()
    assert Job.objects.get(owner=user, unique_key="u", idempotency_key="i").state == "queued"
    assert owned.get() == 4
    with pytest.raises(TypeError, match="does not take owner"):
        (add.s(1, 1) | double.using(owner=user).s())()


def test_a_task_of_django_is_enqueued_through_the_same_door(user, run_jobs):
    on_io = double.using(queue_name="io", label="twice")
    jobs = [
        Job.objects.enqueue(on_io, [1], owner=user),
        *Job.objects.enqueue_many(on_io, [[2], [3]], label="other"),
    ]
    batch = Batch.objects.enqueue(on_io, [[4], [5]], then=double.s(), ended=echo.si(6))
    assert {job.queue for job in [*jobs, *batch.jobs.all()]} == {"io"}
    assert [job.label for job in jobs] == ["twice", "other", "other"]
    run_jobs()
    values = Job.objects.order_by("created_at").values_list("result", flat=True)
    assert sorted(values, key=str) == sorted([2, 4, 6, 8, 10, [8, 10, 8, 10], [6]], key=str)
    for options in {"countdown": 5}, {"owner": user}, {"unique": "x"}, {"idempotency_key": "x"}:
        with pytest.raises(TypeError, match=f"give {[*options][0]} to this call, not to using()"):
            Job.objects.enqueue(double.using(**options), [1])
    with pytest.raises(TypeError):
        Job.objects.enqueue(double, [1, 2, 3])
