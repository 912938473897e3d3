"""A load of all kinds of tasks on a stack, while test_services.py or chaos harms its services."""

import json
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from math import inf

import requests

from .outputs import ORDER
from .project import wait_for

# Tasks of each kind that are sent after the fault: a report takes half a second.
FRESH = defaultdict(lambda: 30, report=10)
PLAIN = "retry", "countdown", "rest"  # and what the tests themselves send:
LONG = "short", "long", "longest"
CHORD = ("chord",)
PLAIN_NAMES = "trials.tasks.nap", "trials.tasks.retry_later", "trials.tasks.tick"
JOBS = "batch", "job-retry", "job-countdown", "job-rest"
PATHS = {
    "email": "/api/orders/",
    "report": "/api/orders/report/",
    "write": "/faults/",
    "work": "/faults/batches/",
}
PAUSES = {"email": 0.2, "report": 1}  # seconds between two requests of a load that is running
# What delay() may raise while a service is unavailable. Anything else is a failure.
REFUSALS = (
    "kombu.exceptions.OperationalError",
    "django.db.utils.",
    "redis.exceptions.",
    "botocore.exceptions.",
    "builtins.RuntimeError: \nRetry limit exceeded while trying to reconnect to the Celery result",
)
SEND_FRESH = """
import time
from load.kinds import KINDS
result, refused, until = [], [], time.monotonic() + seconds
while len(result) < count:
    try:
        result.append(str(KINDS[kind]()))
    except Exception as error:
        if time.monotonic() > until:
            raise
        name = f"{type(error).__module__}.{type(error).__name__}"
        refused.append(f"{name}: {error}")
        time.sleep(0.5)
result = [result, refused]
"""
STATES = """
from celery.result import AsyncResult
for _ in range(5):  # a client's first read may find a lost connection
    try:
        result = {id: AsyncResult(id).state for id in ids}
        break
    except Exception as failure:
        error = failure
        time.sleep(1)
else:
    raise error
"""
UNCONFIRMED = """
from orders.models import Order
result = list(Order.objects.filter(pk__in=ids, confirmed_at=None).values_list("pk", flat=True))
"""
FIND_FORGOTTEN = """
from datetime import timedelta
from django.utils import timezone
from orders.models import Order
from orders.tasks import confirm_forgotten_orders
old = timezone.now() - timedelta(hours=2)
Order.objects.filter(pk__in=ids).update(created_at=old)
confirm_forgotten_orders.delay()
"""
BATCHES = "result = [b.state for b in Batch.objects.filter(pk__in=ids)]"


class Load:
    def __init__(self, stack):
        self.stack = stack
        self.has_jobs = stack.project.answers["durable_jobs"] == "yes"
        self.has_results = stack.project.answers["result_backend"] != "none"
        self.kinds = [*PLAIN]
        if self.has_jobs:
            self.kinds += JOBS
        # Not on moto, whose counter of a chord's ended tasks is not atomic, as DynamoDB's is.
        elif self.has_results and stack.project.answers["result_backend"] != "dynamodb":
            self.kinds += CHORD
        self.accepted = defaultdict(list)  # {kind: ids}
        self.refused, self.failures = Counter(), []
        self.failed_chords = set()
        self.slowest = 0  # seconds of a request
        self.first_line = len(stack.lines())
        self.is_over = threading.Event()

    # While the load runs

    @contextmanager
    def running(self, *long, rate):
        """Send tasks of each kind until the block ends: some through the API, some by a process.

        The tasks of the kinds `long` start before the block does. The process sends `rate` tasks
        a second: if those are many, only kinds that take no time.
        """
        kinds = self.kinds if rate < 10 else ["short", "retry", "countdown"]
        path = self.stack.folder / f"sent-{self.first_line}"
        path.touch()
        variables = {"DJANGO_SETTINGS_MODULE": "config.settings", "PYTHONPATH": self.stack.project}
        command = f"python -m load.send {path} {rate} {' '.join(kinds)}"
        sender = self.stack.process(command, "sender", **variables)
        sender.launch()
        threads = [threading.Thread(target=self.post_continuously, args=[kind]) for kind in PAUSES]
        for thread in threads:
            thread.start()
        try:
            for kind in long:
                self.send(kind)
            wait_for(lambda: len(path.read_text().splitlines()) > len(kinds))
            wait_for(lambda: all(self.accepted[kind] for kind in PAUSES))
            yield
        finally:
            self.is_over.set()
            path.with_name(f"{path.name}.stop").touch()
            for thread in threads:
                thread.join()
            assert sender.wait() == 0, sender.printed
        for line in path.read_text().splitlines():
            self.add(*json.loads(line))

    def add(self, kind, task, error):
        if not error:
            self.accepted[kind].append(task)
        elif error.startswith(REFUSALS):
            self.refused[kind] += 1
        else:
            self.failures.append(f"{kind}: {error}")

    def send(self, kind, count=1):
        """Send tasks of a kind from a console, which tries again until they are accepted."""
        ids, refused = self.stack.ask(SEND_FRESH, kind=kind, count=count, seconds=60)
        for error in refused:
            self.add(kind, None, error)
        self.accepted[kind] += ids
        return ids

    def post_continuously(self, kind):
        while not self.is_over.wait(PAUSES[kind]):
            self.post(kind)

    def post(self, kind, **data):
        """Post an order, start a report, or post this data. Return whether it was accepted."""
        start = time.monotonic()
        try:
            data = data or (ORDER if kind == "email" else None)
            status, headers, answer = self.stack.request(PATHS[kind], data, method="POST")
        except requests.RequestException:
            status = 503
        self.slowest = max(self.slowest, time.monotonic() - start)
        if status == 503:
            self.refused[kind] += 1
        elif status >= 300:
            self.failures.append(f"{kind}: {status}")
        else:
            # Without results, a report's answer has no id.
            place = headers.get("Location", "") if self.has_jobs else ""
            self.accepted[kind].append(place.split("/")[-2] if place else answer and answer["id"])
            return True

    def post_until_accepted(self, kind, **data):
        wait_for(lambda: self.post(kind, **data))

    # Afterwards

    def wait_until_success(self):
        """Send tasks until one has succeeded. Return when."""
        sent = []

        def succeeded():
            with suppress(AssertionError):  # a console may have lost its connection, too
                sent.extend(self.send("short"))
            ended = self.ended()
            return next((ended[task] for task in sent if task in ended), None)

        return wait_for(succeeded)[2]

    def send_fresh(self):
        """Send tasks of each kind that must all succeed. Return {kind: ids}."""
        before = {kind: len(ids) for kind, ids in self.accepted.items()}
        with ThreadPoolExecutor(4) as pool:
            posted = [
                pool.submit(self.post_until_accepted, kind)
                for kind in PAUSES
                for _ in range(FRESH[kind])
            ]
            for kind in ["short", *self.kinds]:
                if kind not in ("rest", "job-rest"):
                    self.send(kind, FRESH[kind])
            for each in posted:
                each.result()
        return {kind: ids[before.get(kind, 0) :] for kind, ids in self.accepted.items()}

    def lines(self):
        return self.stack.lines()[self.first_line :]

    def ended(self):
        """Return {task: (name, state, time)} of all that have ended, and are not to run again."""
        return {
            task: (words[0], words[1], float(at))
            for kind, task, _, at, *words in self.lines()
            if kind == "ended" and words[1] not in ("RETRY", "None")
        }

    def tasks(self, accepted):
        """Return the ids of these that are plain tasks' ids."""
        if self.has_jobs:
            kinds = [*LONG, *PLAIN]
        else:
            kinds = [*LONG, *self.kinds] + ["report"] * self.has_results
        return [task for kind in kinds for task in accepted.get(kind, ())]

    def jobs(self, accepted):
        kinds = ["email", "report", "job-long", *JOBS[1:]] if self.has_jobs else []
        return [job for kind in kinds for job in accepted.get(kind, ())]

    def wait_until_ended(self):
        """Wait until all that was accepted has ended."""
        try:
            wait_for(lambda: not self.missing())
        except AssertionError as error:
            raise AssertionError(f"lost: {self.describe(self.missing())}") from error
        if not self.has_jobs and not self.has_results:
            wait_for(
                lambda: (
                    self.count_ended("orders.tasks.email_report") >= len(self.accepted["report"])
                )
            )
        if jobs := self.jobs(self.accepted):
            self.stack.wait_until_final(*jobs)
        if batches := self.accepted["batch"]:
            wait_for(lambda: not {"open", "closed"} & set(self.stack.ask(BATCHES, ids=batches)))

    def missing(self):
        """Return the ids of accepted tasks that have not ended.

        The callback of a chord never starts if a member failed. Its state then says so.
        """
        missing = set(self.tasks(self.accepted)) - self.ended().keys() - self.failed_chords
        if missing and missing <= set(self.accepted["chord"]):
            with suppress(AssertionError):
                states = self.stack.ask(STATES, ids=list(missing))
                self.failed_chords |= {task for task in missing if states[task] == "FAILURE"}
        return missing - self.failed_chords

    def count_ended(self, name):
        return sum(ended == name for ended, _, _ in self.ended().values())

    def describe(self, tasks):
        """Return how many of these tasks have not started, and have started, for each kind."""
        began = {line[1] for line in self.lines() if line[0] == "began"}
        kinds = Counter(
            f"{kind}, {'started' if task in began else 'not started'}"
            for kind, ids in self.accepted.items()
            for task in ids
            if task in tasks
        )
        return dict(kinds)

    def succeeded(self):
        return {task for task, (_, state, _) in self.ended().items() if state == "SUCCESS"}

    def failed(self):
        """Return {name of a task: how often it ended in another way than with success}."""
        ended = self.ended().values()
        found = Counter(
            name for name, state, _ in ended if state != "SUCCESS" and self.is_plain(name)
        )
        if self.failed_chords:
            found["orders.tasks.email_forecasts"] += len(self.failed_chords)
        if jobs := self.jobs(self.accepted):
            rows = [row for row in self.stack.rows(*jobs) if row["state"] != "succeeded"]
            found.update(f"job: {row['error']}" for row in rows)
        return dict(found)

    def without_result(self):
        """Return the states of tasks that have ended, but have no result that can be read."""
        if not self.has_results:
            return {}
        ids = [task for task in self.tasks(self.accepted) if task not in self.accepted["chord"]]

        def without():
            states = self.stack.ask(STATES, ids=ids)
            return [id for id, state in states.items() if state not in ("SUCCESS", "FAILURE")]

        with suppress(AssertionError):  # a task may be running again
            wait_for(lambda: not without())
        return self.describe(without())

    def repeated(self, before=inf):
        """Return {name of a task: how many of its runs started twice}, without jobs.

        Only runs that had started at the time `before`.
        """
        runs = defaultdict(list)  # {(id, name, retries): when it started}
        for kind, task, _, at, *words in self.lines():
            if kind == "began":
                runs[task, *words[:2]].append(float(at))
        twice = [
            name
            for (_, name, _), starts in runs.items()
            if len(starts) > 1 and min(starts) < before
        ]
        return dict(Counter(filter(self.is_plain, twice)))

    def is_plain(self, name):
        """Whether a task with this name is no job. A job may start again, and ends once."""
        return not self.has_jobs or name in PLAIN_NAMES

    def find_forgotten_orders(self):
        """Let the hourly task find accepted orders that nothing has confirmed. Count them."""
        if self.has_jobs:
            return 0
        ids = self.accepted["email"]
        with suppress(AssertionError):
            self.wait_for_idle("orders.tasks.send_confirmation")
        forgotten = self.stack.ask(UNCONFIRMED, ids=ids)
        if forgotten:
            self.stack.ask(FIND_FORGOTTEN, ids=forgotten)
            wait_for(lambda: not self.stack.ask(UNCONFIRMED, ids=ids))
        return len(forgotten)

    def wait_for_idle(self, name):
        """Wait until each run of this task that has begun has ended."""

        def is_idle():
            began = {line[1] for line in self.lines() if line[0] == "began" and line[4] == name}
            return began <= self.ended().keys()

        wait_for(is_idle)
