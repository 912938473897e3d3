"""Wrong calls: type checkers find an error in each line that is marked, and in no other.

Celery and Django have no hints of their own, so mypy takes tasks and querysets for anything.
"""

from durable_jobs import actions, batches, pauses
from durable_jobs.enqueue import enqueue_many
from durable_jobs.models import Batch
from durable_jobs.tasks import JobTask, job


@job
def build_report(self: JobTask, pages: int, title: str = "") -> None:
    self.report("half")  # wrong
    self.step("half", divmod, 1)  # wrong
    self.enqueue_next(add_up)  # wrong to pyright
    self.enqueue_next(add_up.s("more"))  # wrong


@job(max_retries=8)
def add_up(self: JobTask, counts: list[int], title: str) -> None: ...


@job(bind=False)
def add(x: int, y: int) -> None: ...


@job  # wrong
def without_self() -> None: ...


def enqueue(batch: Batch) -> None:
    build_report.enqueue()  # wrong
    build_report.enqueue("ten")  # wrong
    build_report.enqueue(10, "March", 1)  # wrong
    build_report.enqueue(10, titel="March")  # wrong
    build_report.delay("ten")  # wrong
    build_report.delay_on_commit()  # wrong
    build_report.using(lable="March").enqueue(10)  # wrong
    build_report.using(countdown="5").enqueue(10)  # wrong
    build_report.using(unique="7", unique_until="now").enqueue(10)  # wrong
    build_report.using(label="March").enqueue("ten")  # wrong
    build_report.using(label="March").delay(pages=None)  # wrong
    build_report("ten")  # wrong
    build_report.s(10, 7)  # wrong
    build_report.si("ten")  # wrong
    build_report.s(10).enqueue(11)  # wrong
    build_report.s(10).set(lable="March")  # wrong
    add.enqueue(1)  # wrong
    add_up.s(counts=[1])  # wrong
    enqueue_many(build_report)  # wrong to pyright
    enqueue_many([[1], [2]])  # wrong
    enqueue_many([add.s(1)])  # wrong
    batches.enqueue([build_report.s(10)], on_success=add_up)  # wrong to pyright
    batches.enqueue([build_report.s(10)], on_succes=add_up.s("all"))  # wrong
    batches.add(batch, build_report)  # wrong to pyright
    batches.add_many(batch, build_report.s(10))  # wrong
    actions.cancel(7)  # wrong to pyright
    pauses.pause(build_report)  # wrong to pyright


async def enqueue_in_a_coroutine() -> None:
    await build_report.aenqueue("ten")  # wrong
    await batches.aenqueue(build_report)  # wrong to pyright
