"""What a worker makes of a project's tasks: functions of each kind, and requests."""

import asyncio
import inspect
from datetime import UTC, datetime, timedelta
from unittest.mock import Mock

import kombu
import pytest
from celery import Celery, Task
from celery.exceptions import WorkerShutdown, WorkerTerminate
from celery.worker.request import Request
from servers import LIMIT

from celery_steady import tasks
from celery_steady.consumer import Consumer, StockConsumer


class Runs(Task):
    """A project's own class, whose tasks may be of each kind."""

    def __call__(self, *args, **kwargs):
        if inspect.iscoroutinefunction(self.run):
            return asyncio.run(self.run(*args, **kwargs))
        if inspect.isgeneratorfunction(self.run):
            return list(self.run(*args, **kwargs))
        if inspect.isasyncgenfunction(self.run):
            return asyncio.run(self.collect(*args, **kwargs))
        return super().__call__(*args, **kwargs)

    async def collect(self, *args, **kwargs):
        return [each async for each in self.run(*args, **kwargs)]


async def coroutine(x):
    await asyncio.sleep(0)
    return x


def generator(x):
    yield x


async def asynchronous_generator(x):
    yield x


def plain(x):
    return x


async def limited(x):
    """Its loop cancels what it waits for."""
    try:
        await asyncio.wait_for(asyncio.sleep(LIMIT), 0.01)
    except TimeoutError:
        return x


KINDS = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
FUNCTIONS = coroutine, generator, asynchronous_generator, plain, limited


def make(function, bind=False):
    app = Celery(broker="memory://", task_cls=Runs, set_as_current=False)
    return app.task(shared=False, bind=bind)(function)


@pytest.mark.parametrize("prepare", [tasks.let_fail, tasks.let_end, tasks.end_copies])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_prepared_task_is_of_the_kind_it_was(function, prepare):
    task = make(function)
    prepare(task)
    assert [is_kind(task.run) for is_kind in KINDS] == [is_kind(function) for is_kind in KINDS]
    assert task(5) in (5, [5])


def test_a_bound_coroutine_stays_one():
    async def bound(self, x):
        return self.name, x

    task = make(bound, bind=True)
    tasks.let_fail(task)
    assert inspect.iscoroutinefunction(task.run)
    assert task(5) == (task.name, 5)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), BaseException()])
def test_what_a_coroutine_raises_is_an_exception(error):
    async def raises():
        await asyncio.sleep(0)
        raise error

    task = make(raises)
    tasks.let_fail(task)
    with pytest.raises(RuntimeError, match="raised"):
        task()


def test_a_coroutine_that_its_loop_cancels_sees_that():
    async def outer(x):
        waiting = asyncio.create_task(task.run(x))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    async def forever(x):
        await asyncio.sleep(LIMIT)

    task = make(forever)
    tasks.let_fail(task)
    asyncio.run(outer(5))


@pytest.mark.parametrize("seconds", [-1, 0.2])
def test_a_request_has_one_time_to_start(seconds):
    due = datetime.now(UTC) + timedelta(seconds=seconds)
    headers = {"id": "1", "task": "add", "eta": due.isoformat()}
    message = kombu.Message("[[], {}, {}]", headers=headers, content_type="application/json")
    task = make(plain)
    request = tasks.failing(Request)(message, app=task.app, task=task)
    before = request.eta
    while datetime.now(UTC) <= due:
        pass
    assert request.eta == before == (due if seconds > 0 else None)


@pytest.mark.parametrize(
    ("error", "is_error"),
    [(ValueError(), True), (RecursionError(), True), (MemoryError(), True)]
    + [(WorkerShutdown(1), False), (WorkerTerminate(1), False), (SystemExit(0), False)],
)
def test_a_consumer_says_whether_an_error_ends_it(error, is_error, monkeypatch):
    monkeypatch.setattr(StockConsumer, "start", Mock(side_effect=error))
    ending = object.__new__(Consumer)
    assert not ending.ends_by_error
    with pytest.raises(type(error)):
        ending.start()
    assert ending.ends_by_error is is_error
