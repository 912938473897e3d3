"""Each public call of docs/reference.md, as a project writes it: type checkers find no error."""

from datetime import datetime
from typing import Any

from durable_jobs import actions, batches, pauses
from durable_jobs.admin import announce
from durable_jobs.api.serializers import BatchSerializer, JobSerializer
from durable_jobs.api.views import BatchViewSet, EnqueueMixin, JobViewSet, accepted
from durable_jobs.celery import Celery
from durable_jobs.contrib.django_tasks import TaskBackend
from durable_jobs.contrib.prometheus import Metrics
from durable_jobs.eager import run_jobs
from durable_jobs.enqueue import JobSignature, Options, enqueue_many
from durable_jobs.exceptions import JobError, JobLost, WorkerStopping
from durable_jobs.models import Batch, Failure, Job, Pause
from durable_jobs.tasks import JobTask, job

app = Celery("mysite")
CLASSES = [BatchSerializer, BatchViewSet, JobSerializer, JobViewSet, Metrics, TaskBackend]


@job
def build_report(self: JobTask, pages: int, title: str = "") -> dict[str, int]:
    for page in range(self.cursor or 0, pages):
        self.report(page + 1, pages, f"Page {page + 1}", cursor=page + 1)
    self.report(1)
    self.step("charge", print, "x", sep=title)
    self.enqueue_next(build_report.using(label=title, queue="io").s(pages, title="Next"))
    if self.batch:
        batches.add(self.batch, add_up.s([pages], "more"))
    return {"pages": pages}


@job(autoretry_for=(OSError,), max_retries=8, limit=lambda url, **_: f"host:{url}")
async def fetch(self: JobTask, url: str) -> int:
    try:
        return len(url)
    except (JobLost, WorkerStopping):
        raise
    except ValueError as error:
        raise self.retry(countdown=60, exc=JobError("It is down")) from error


@job(bind=False)
def add(x: int, y: int) -> int:
    return x + y


@job(base=JobTask, owner_may_run_again=True)
def add_up(self: JobTask, counts: list[int], title: str) -> str:
    return f"{title}: {sum(counts)}"


@job
def untyped(self, pages, title=""):  # type: ignore[no-untyped-def]
    return pages


def enqueue(user: object, options: Options, at: datetime) -> None:
    stored: Job = build_report.enqueue(10)
    build_report.enqueue(10, title="March")
    build_report.using(owner=user, label="March", unique="7", unique_until="start").enqueue(10)
    build_report.using(**options).enqueue(10, "March")
    build_report.using(eta=at).delay(10)
    build_report.using(countdown=3, idempotency_key="7").apply_async([10], {"title": "x"})
    build_report.delay(10, title="March").get()
    build_report.delay_on_commit(10)
    build_report.apply_async([10], task_id="…", countdown=5, queue="io")
    build_report.apply_async_on_commit((10,))
    build_report.apply((10,))
    build_report(10)
    fetch.enqueue("https://example.com")
    add.enqueue(1, y=2)
    add.s(1).enqueue(2)
    untyped.enqueue(3, title="4")
    print(stored.state, stored.is_new, stored.pk, build_report.name, build_report.limit)
    enqueue_many([build_report.s(1), fetch.using(label="x").s(url="y"), add.si(1, 2)])
    enqueue_many(build_report.s(page, title="x") for page in range(3))


async def enqueue_in_a_coroutine(batch: Batch) -> Job:
    await build_report.aenqueue(10)
    await build_report.using(label="x").aenqueue(10, "y")
    await batches.aenqueue([add.s(1, 2)], label="Numbers")
    return await batches.aadd(batch, add.s(1, 2))


def in_batches(user: object) -> Batch:
    then = add_up.using(queue="io").s("all")
    with batches.open_batch(owner=user, label="x", on_success=then) as batch:
        batches.add_many(batch, [add.s(1, 2)])
        batches.add(batch, untyped.s(3))
    batches.enqueue([add.s(1, 2)], on_success=add_up.s(title="x"), on_finish=fetch.si("u"))
    batches.enqueue((add.s(n, 2) for n in range(9)), owner=user, on_success=untyped.s())
    print(batches.cancel(batch) + 1, batches.run_failed_again(batch, most=5)[0])
    return batch


def sign() -> JobSignature[[]]:
    call = build_report.using(label="x").s(1)
    call.enqueue()
    return call.set(queue="io")


def manage(stored: Job, failure: Failure, request: Any) -> Pause:
    actions.cancel(stored)
    actions.cancel(Job.objects.filter(state="queued"))
    actions.run_again(stored).refresh_from_db()
    run_jobs()
    run_jobs(Job.objects.all())
    announce(request, [stored], "queued", "too many")
    print(accepted(request, stored).status_code, failure.error)
    print(pauses.resume("celery") is True)
    app.send_task("reports.tasks.build_report", [10])
    app.AsyncResult("…").get()
    app.control.revoke("…")
    return pauses.pause("celery", reason="Maintenance")


class OrderViewSet(EnqueueMixin):
    def perform_create(self, serializer: Any) -> None:
        batch = in_batches(None)
        order = serializer.save(job_id=self.job_id)
        self.enqueue(build_report.using(label=f"Confirm {order}").s(order.pk), batch=batch)

    def put(self, request: Any) -> Any:
        return self.create(request)
