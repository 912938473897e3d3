"""Uses of the engine's public names, as in an app. test_types.py checks them; nothing runs them.

Exactly the lines with the comment "wrong" must be reported.
"""

from datetime import datetime
from typing import assert_type

from celery import chain, chord, group, shared_task
from django.http import HttpRequest
from rest_framework.viewsets import ModelViewSet

from durable_jobs.admin import announce
from durable_jobs.backends import JobContext, JobFunction, TaskBackend
from durable_jobs.models import Batch, Job, Pause
from durable_jobs.pauses import PauseManager
from durable_jobs.queryset import JobManager, JobQuerySet
from durable_jobs.tasks import JobCall, JobError, JobTask
from durable_jobs.api.views import EnqueueMixin, accepted


@shared_task(base=JobTask, bind=True, max_retries=3)
def build_report(self: JobTask, pages: int):
    for page in range(self.cursor or 0, pages):
        self.report(page, pages, f"Page {page}", cursor=page)
    self.report("half")  # wrong
    self.report(1, percent=50)  # wrong
    self.progress(1)  # wrong
    self.then(build_report, [1], {"pages": 2}, label="Next", queue="io", countdown=60)
    self.then(build_report, 1)  # wrong
    self.then(build_report, [1], unique="x")  # wrong
    if self.batch:
        assert_type(self.batch.enqueue(build_report, [1]), Job)
    if pages == 7:
        raise JobError("Page 7 is empty")
    if pages == 8:
        raise self.retry(countdown=60, exc=ValueError("Page 8"))
    self.retry(countdown="60")  # wrong


@shared_task(base=JobTask, bind=True)
def crawl(self: JobTask, url: str):
    if self.batch:
        assert_type(self.batch, Batch)
        assert_type(self.batch.enqueue(crawl, [url], label=url), Job)
    self.then(build_report, [10], label="March", countdown=60)
    self.then(build_report, 10)  # wrong
    self.then(build_report, [10], unique="march")  # wrong


@shared_task(base=JobTask, limit="tenant:{tenant_id}")
def call_api(tenant_id: int):
    assert_type(call_api.enqueue(tenant_id), Job)


def in_context(context: JobContext, pages: int):
    context.report(1, pages, cursor=context.cursor)
    context.report("half")  # wrong
    context.then(build_report, [1], label="Next")
    context.then(build_report, [1], unique="x")  # wrong
    assert_type(context.batch, Batch | None)
    raise context.retry(countdown=60)


def view(request: HttpRequest, user):
    job = enqueue(
        build_report,
        [10],
        {"pages": 10},
        owner=user,
        label="March",
        queue="io",
        countdown=0.5,
        unique="march",
        idempotency_key="1",
    )
    assert_type(job, Job)
    assert_type(Job.objects, JobManager)
    enqueue(build_report, (10,), eta=datetime.now())
    enqueue(build_report, 10)  # wrong
    enqueue(build_report, [10], countdown="10")  # wrong
    enqueue(build_report, [10], priority=1)  # wrong
    assert_type(enqueue_many(build_report, [[10], [20]], label="all"), list[Job])
    enqueue_many(build_report, [[10]], unique="march")  # wrong
    return accepted(request, job)


def change(job: Job):
    assert_type(job.cancel(), bool)
    assert_type(job.run_again(), Job)
    assert_type(Job.objects.get(pk=job.pk), Job)
    print(job.attempts)  # wrong
    print(job.state, job.label, job.result, job.owner, job.failures.all())
    assert_type(Job.objects.filter(label="March"), JobQuerySet)
    assert_type(cancel(Job.objects.filter(label="March")), int)
    assert_type(Job.objects.exclude(label="March").order_by("label").run_again(), list[Job])
    assert_type(Job.objects.all().run_again(), list[Job])
    Job.objects.cancel()  # wrong
    Job.objects.claim()  # wrong


def pause(job: Job):
    assert_type(Pause.objects, PauseManager)
    assert_type(pauses.pause("io", "SMTP is down"), Pause)
    print(pauses.pause(name="io", reason="SMTP is down").since)
    assert_type(pauses.resume("io"), bool)
    print([pause.reason for pause in Pause.objects.filter(name="io")])
    assert_type(call_api.limit, str | None)
    print(job.blocked_by, job.limit_key)
    print(job.held)  # wrong
    pauses.pause()  # wrong
    pauses.pause("io", why="SMTP is down")  # wrong
    pauses.resume("io", "cpu")  # wrong


def use(user):
    assert_type(build_report, JobTask)
    assert_type(build_report.using(owner=user, label="March", countdown=60), JobCall)
    assert_type(build_report.using(queue="io", unique="march").enqueue(10), Job)
    assert_type(build_report.enqueue(10), Job)
    build_report.delay(10)
    build_report.using(priority=1)  # wrong
    build_report.using(eta="tomorrow")  # wrong
    build_report.using(owner=user).delay(10)  # wrong


def view_of_many(request: HttpRequest, user):
    step = build_report.s()
    batch = batches.enqueue(
        crawl, [["a"], ["b"]], owner=user, label="March", then=step, ended=step, queue="io"
    )
    assert_type(batch, Batch)
    with Batch.objects.open(owner=user, label="March", then=step) as batch:
        assert_type(batch, Batch)
        assert_type(batch.enqueue_many(crawl, [["a"]], countdown=60), list[Job])
        batch.enqueue(crawl, ["a"], owner=user)  # wrong
    batches.enqueue(crawl, [["a"]], then="build_report")  # wrong
    batches.enqueue(crawl, [["a"]], unique="march")  # wrong
    assert_type(batch.cancel(), int)
    assert_type(batch.run_failed_again(), list[Job])
    print(batch.state, batch.counts, batch.error, batch.jobs.filter(state="failed").cancel())
    return accepted(request, batch)


def use_batches(user, count: JobFunction):
    batch = batches.enqueue(
        build_report,
        [[1], [2]],
        owner=user,
        label="Reports",
        queue="io",
        countdown=60,
        then=build_report.si(3),
        ended=chain(build_report.s(4), count.s(5)),
    )
    assert_type(batch, Batch)
    with Batch.objects.open(owner=user, then=count.si(3)) as opened:
        assert_type(opened, Batch)
        assert_type(opened.enqueue(build_report, [1], label="One"), Job)
        assert_type(opened.enqueue_many(count, [[1], [2]]), list[Job])
        opened.enqueue(build_report, 1)  # wrong
        opened.enqueue(build_report, [1], owner=user)  # wrong
    assert_type(batch.cancel(), int)
    assert_type(batch.run_failed_again(), list[Job])
    print(batch.state, batch.counts, batch.error, batch.ended_at, batch.jobs.filter(state="failed"))
    batches.enqueue(build_report, [[1]], unique="x")  # wrong
    batches.enqueue(build_report, [[1]], label=3)  # wrong
    Batch.objects.open(calls=[[1]])  # wrong
    print(batch.progress)  # wrong


def use_canvas(user, count: JobFunction):
    chain(build_report.s(1), count.s(), build_report.si(2)).apply_async(owner=user, label="x")
    chord([build_report.s(1), count.s(2)])(build_report.s())
    print(group(build_report.s(n) for n in range(3))().completed_count())
    build_report.apply_async([1], owner=user, label="x", unique="x", idempotency_key="1")
    (build_report.s(1) | count.s()).delay()


def use_with_django(count: JobFunction):
    count.using(owner=1, label="x", queue="io", queue_name="io", idempotency_key="1").enqueue(3)
    count.using(countdown="1")  # wrong
    count.using(args=[1])  # wrong
    TaskBackend("default", {}).enqueue(count, [3], {})


async def async_view(request):
    assert_type(await Job.objects.aenqueue(build_report, [10], label="March"), Job)
    assert_type(await build_report.using(label="March").aenqueue(10), Job)
    assert_type(await build_report.aenqueue(10), Job)
    assert_type(await Batch.objects.aenqueue(build_report, [[1]], label="March"), Batch)
    assert_type(await Job.objects.aenqueue(build_report), Job)
    await Job.objects.aenqueue(build_report, 10)  # wrong
    await Job.objects.aenqueue(build_report, [10], labl="March")  # wrong
    print(Job.objects.aenqueue(build_report, [10]).state)  # wrong


class ReportViewSet(EnqueueMixin, ModelViewSet):
    def perform_create(self, serializer):
        report = serializer.save(job_id=self.job_id)
        assert_type(self.enqueue(build_report, [report.pk], label="March"), Job)
        self.enqueue(build_report, [report.pk], owner=1)  # wrong
        self.enqueue(build_report, label=3)  # wrong


def run_reports(modeladmin, request: HttpRequest, queryset):
    jobs = enqueue_many(build_report, queryset.values_list("pk"))
    announce(request, jobs, rest="None is missing.")
    announce(request, jobs, text="None")  # wrong
