"""`make chaos`: post jobs, batches and chains; twice a second kill, stop, cut or empty something.

At the end, each accepted job must have succeeded once and written its row. Jobs that kill their
process and jobs over their time limit must have failed. No chunk of a newsletter was sent twice
because its worker was stopped. Each batch has ended, and each job that comes next was stored once.
No more functions of a limited key ran at once than it has slots, beside those of frozen workers. No
job started while it was paused.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from unittest import SkipTest

import psycopg
from cookiecutter.main import cookiecutter

from .bake import DEFAULTS, TEMPLATE, WITH_JOBS
from .load import Load
from .project import Project, children_of, started, wait_for
from .servers import BROKERS, PostgreSQL
from .services import Server, Service, cells_of, prepare

EVERY = 0.5  # seconds between two faults
JOBS, SECONDS = 1000, 100
JOBS_FOR_EACH_WORK = 20  # jobs for each batch or chain
LOCKS = {
    "row": "SELECT FROM durable_jobs_job WHERE state = 'running' LIMIT 1 FOR UPDATE",
    "table": "LOCK TABLE durable_jobs_job IN ACCESS EXCLUSIVE MODE",
    # As CREATE INDEX does. Everybody can read that leases lapse, and nobody can renew one.
    "table for writers": "LOCK TABLE durable_jobs_job IN SHARE MODE",
}
# Not in the first round, for which test_chaos.py waits: processes take half a minute to notice.
SLOW = ("harm", "database", "forget"), ("harm", "broker", "forget")
NEWSLETTERS = "that send a newsletter"
ENDS = {  # how the jobs of the faults must end
    "that kill their process": "failed Its worker died",
    "that held their row": "succeeded",
    "over their time limit in a query": "failed Exceeded its time limit",
    NEWSLETTERS: "succeeded",
    "that Beat does not know": "succeeded",
    "with a limit": "succeeded",
    "cancelled, with a limit": "cancelled",
    "old": "deleted",
    "old, which cannot be deleted": "cancelled",
}


class Supervised(Service):
    def start(self):
        """Its supervisor does."""


class Chaos:
    def __init__(self, stack, jobs, seconds, seed):
        self.stack, self.seconds, self.load = stack, seconds, Load(stack)
        self.random = random.Random(seed)
        lengths = random.Random(seed)  # in seconds: most of the time, each worker has a job
        self.jobs = [(number, round(lengths.uniform(0, 1.5), 2)) for number in range(jobs)]
        self.odd = {kind: [] for kind in ENDS}  # jobs of the faults
        self.started_in_pause = self.workers_stuck = self.jobs_stuck = 0
        self.services = {name: [stack.services[name]] for name in ("database", "broker")}
        processes = {"web": [stack.web], "beat": [stack.beat], "worker": stack.workers}
        self.services |= {name: list(map(Supervised, each)) for name, each in processes.items()}
        cells = [cell for cell in cells_of(stack.project.answers) if cell[0] in self.services]
        self.kinds = [*FAULTS, *(("harm", *cell) for cell in cells)]
        self.first = [kind for kind in self.kinds if kind not in SLOW]
        self.round, self.faults = [], Counter()  # faults still to come, and how often each came
        self.pool, self.futures, self.is_over = ThreadPoolExecutor(), [], threading.Event()

    def run(self):
        """Post jobs and inject faults, then wait for all jobs. Return whether nothing was lost."""
        start = time.monotonic()
        posters = ThreadPoolExecutor(8)

        def post(due, kind, **data):
            """Post until it is accepted, as a client does that needs it."""
            time.sleep(max(0, due - time.monotonic()))
            self.load.post_until_accepted(kind, **data)

        with self.stack.supervised(), posters, self.pool:
            self.beside(self.hold_snapshot)
            posting = []
            for number, length in self.jobs:
                due = start + number * self.seconds / len(self.jobs)
                data = {"task": "write", "args": [number, length], "key": f"chaos-{number}"}
                posting.append(posters.submit(post, due, "write", **data))
                work, rest = divmod(number, JOBS_FOR_EACH_WORK)
                if not rest:
                    data = {"number": work, "key": f"work-{work}"}
                    posting.append(posters.submit(post, due, "work", **data))
            try:
                while (
                    time.monotonic() - start < self.seconds
                    or len(self.faults) < len(self.first)
                    or not all(each.done() for each in posting)
                ):
                    time.sleep(EVERY)
                    self.inject_fault()
                self.wait(600)
                survey = self.survey()
            finally:
                self.is_over.set()
        for future in [*posting, *self.futures]:
            future.result()
        return self.report(survey)

    def beside(self, function):
        """Run a function while the next faults happen."""
        self.futures.append(self.pool.submit(function))

    def inject_fault(self):
        if not self.round:  # each fault comes once in a round, in random order
            kinds = self.kinds if self.faults else self.first
            self.round = self.random.sample(kinds, len(kinds))
        method, *arguments = fault = self.round.pop()
        name = " ".join(fault)
        self.faults[name] += 1
        try:
            getattr(self, method)(*arguments)
        # The target is unavailable.
        except (OSError, AssertionError, ValueError, psycopg.Error) as error:
            print(f"  {name}: {str(error)[-200:]}", file=sys.stderr)

    def harm(self, service, fault):
        """Let this happen to a server, or to a process while the next faults happen."""
        target = self.random.choice(self.services[service])
        if isinstance(target, Server):
            target.down = target.stalled = self.random.uniform(0, 3)
            getattr(target, fault)()
            return

        def happen():
            with suppress(ProcessLookupError):  # it has just ended
                getattr(target, fault)()

        self.beside(happen)

    def kill_child(self, service):
        parent = self.random.choice(self.services[service]).process.pid
        if children := children_of(parent):
            os.kill(self.random.choice(children), signal.SIGKILL)

    def fault_broker_emptied(self):
        self.stack.empty("celery")

    def fault_messages_copied(self):
        self.stack.ask("from faults.survey import copy_messages\ncopy_messages()")

    def fault_backlog(self):
        """Keep some plain tasks in the queue of the jobs for half a minute."""
        gate = self.stack.folder / f"gate-{time.monotonic()}"
        self.stack.ask("for _ in range(30): plain.circle.delay(gate, 0.1)", gate=str(gate))
        self.beside(lambda: self.is_over.wait(30) or gate.touch())

    def lock(self, what):
        """Hold a lock for longer than a lease."""
        with self.stack.locked(LOCKS[what]):
            time.sleep(5)

    def fault_killer(self):
        """Enqueue a job that kills its process in each run; jobs beside it must not fail."""
        self.odd["that kill their process"].append(self.stack.enqueue("die", 0.5))

    def fault_query_over_time_limit(self):
        """Enqueue a job whose time limit strikes during a query. It fails, but not as a crash."""
        self.odd["over their time limit in a query"].append(self.stack.enqueue("query", 600))

    def fault_row_held(self):
        """Stop a worker while a function has locked the row of its own job."""
        with self.gate() as gate:
            self.odd["that held their row"].append(job := self.stack.enqueue("hold_its_row", gate))
            self.stop_worker_of(job)

    def fault_newsletter_stopped(self):
        """Stop a worker that writes chunks and cursors. Another worker writes the rest."""
        with self.gate() as gate:
            self.odd[NEWSLETTERS].append(job := self.stack.enqueue("write_chunks", gate))
            self.stop_worker_of(job)
            self.stack.wait_until_started(job, times=2)

    @contextmanager
    def gate(self):
        """A file for which task functions wait. It is created at the end of the block."""
        gate = self.stack.folder / f"gate-{time.monotonic()}"
        try:
            yield gate
        finally:
            gate.touch()

    def stop_worker_of(self, job):
        """Ask the worker that runs this job to end, and wait until it has."""
        group = os.getpgid(self.stack.wait_until_started(job))
        [worker] = [w for w in self.stack.workers if w.pid == group]
        try:
            worker.stop()
        except subprocess.TimeoutExpired:
            self.workers_stuck += 1

    def fault_limited(self):
        """Enqueue jobs with limits. They run during the next faults."""
        code = """
result = []
for key in ["one:chaos", "two:chaos", f"one:{number}", f"two:{number}"]:
    jobs = enqueue_many([limited.s(key, "/", 0.2)] * 10)
    result += [job.pk for job in jobs]
"""
        jobs = self.odd["with a limit"]
        jobs += self.stack.ask(code, number=len(jobs))

    def fault_cancelled_with_a_limit(self):
        """Cancel a job whose function then keeps its slot."""
        with self.gate() as gate:
            jobs = self.odd["cancelled, with a limit"]
            job = self.stack.enqueue("limited", f"one:cancelled-{len(jobs)}", gate)
            wait_for(lambda: self.stack.row(job)["state"] == "running")
            jobs.append(job)
            self.stack.ask("cancel(Job.objects.get(pk=job))", job=job)
            time.sleep(2)

    def fault_paused(self):
        """Pause a task for a while, during which a worker is killed and others send its jobs."""
        code = """
pauses.pause("faults.tasks.limited", "chaos")
result = [job.pk for job in enqueue_many([limited.s("one:paused")] * 10)]
"""
        jobs = self.stack.ask(code)
        self.odd["with a limit"] += jobs
        try:
            self.harm("worker", "kill")
            self.fault_messages_copied()
            time.sleep(3)
            ask = "result = Job.objects.filter(pk__in=jobs, started_at__isnull=False).count()"
            self.started_in_pause += self.stack.ask(ask, jobs=jobs)
        finally:
            self.stack.ask("pauses.resume('faults.tasks.limited')")

    def fault_dump(self):
        """Back the database up."""
        assert self.stack.database.run("pg_dump", "--file", os.devnull, self.stack.database_url())

    def hold_snapshot(self):
        """Keep PostgreSQL from removing old row versions, as a long report does."""
        url, _, _ = self.stack.database.variables["DATABASE_URL"].partition("?")
        while not self.is_over.wait(0.1):
            # It ends with the database.
            with suppress(psycopg.Error), psycopg.connect(url) as connection:
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                while not self.is_over.wait(0.5):
                    connection.execute("SELECT")

    def fault_old_beat(self):
        """Let a Beat of older code send jobs of a new task, as in a deploy with Beat last."""
        variables = self.stack.beat.options["env"]
        variables["OLD_CODE"] = "1"
        code = "result = [j.pk for j in enqueue_many([new.using(countdown=2).s()] * 5)]"
        jobs = []
        try:
            self.stack.beat.kill()
            jobs += self.stack.ask(code)
            self.odd["that Beat does not know"] += jobs
            self.stack.wait_until_final(*jobs)
        except AssertionError:
            self.jobs_stuck += len(jobs)
            raise
        finally:
            del variables["OLD_CODE"]
            self.stack.beat.kill()

    def fault_old_jobs(self):
        """Make old jobs: one of them cannot be deleted, the others must be."""
        kept, *old = self.stack.ask("from faults.survey import age_jobs\nresult = age_jobs()")
        self.odd["old, which cannot be deleted"].append(kept)
        self.odd["old"] += old

    def wait(self, seconds):
        """Wait until all batches and all jobs have ended."""
        until = time.monotonic() + seconds
        code = """
rows = Job.objects.filter(Q(state__in=ACTIVE) | Q(pk__in=old))
is_open = Batch.objects.filter(ended_at=None)
result = rows.exists() or is_open.exists()
"""
        while self.stack.ask(code, old=self.odd["old"]) and time.monotonic() < until:
            time.sleep(1)
        time.sleep(2)  # a job that ends a second time does so now

    def survey(self):
        accepted, odd = self.load.accepted, list(chain(*self.odd.values()))
        names = {"jobs": accepted["write"], "odd": odd, "works": len(accepted["work"])}
        ask = "from faults.survey import survey\nresult = survey(jobs, odd, works)"
        return self.stack.ask(ask, **names)

    def count_exceeded(self):
        """Return how many functions found all slots of their key in use.

        Not if a frozen one had the slot: its lease had lapsed, so its job has a crash.
        """
        crashed = "result = Job.objects.filter(pk__in=jobs, crashes__gt=0).exists()"
        return sum(
            not self.stack.ask(crashed, jobs=words[1:])
            for kind, _, _, _, *words in self.stack.lines()
            if kind == "exceeded"
        )

    def report(self, survey):
        """Print what happened, and how often what must not. Return whether that never did."""
        jobs, finished, states = self.load.accepted["write"], survey["distinct"], survey["states"]
        accepted = len(jobs)
        works = [survey["batches"], survey["jobs of works"]]
        starts = Counter(job for kind, job, *_ in self.stack.lines() if kind == "start")
        redelivered = sum(starts[job] - 1 for job in jobs if starts[job])
        print(f"  faults: {sum(self.faults.values())} {dict(sorted(self.faults.items()))}")
        print(f"  jobs: {accepted} {states}, redelivered {redelivered}, lapsed {survey['crashes']}")
        print(f"  batches and chains, and their jobs: {works}")
        newsletters = [survey["chunks"].get(job, []) for job in self.odd[NEWSLETTERS]]
        wrong = {
            "jobs lost": max(accepted - finished, accepted - survey["written"]),
            "jobs that ended twice": survey["finals"] - finished,
            "jobs that failed": accepted - states.get("succeeded", 0),
            "their errors": survey["errors"],
            "batches and their jobs with another end": [
                each for each in works if [*each] != ["succeeded"]
            ],
            "jobs of batches and chains that are missing": survey["missing"],
            "jobs of batches and chains that are there twice": survey["twice"],
            "workers that did not end when asked to": self.workers_stuck,
            "jobs that Beat did not send because it did not know them": self.jobs_stuck,
            "task functions over their limit": self.count_exceeded(),
            "slots still in use": survey["slots"],
            "jobs that started during a pause": self.started_in_pause,
            "newsletters with a chunk twice or without one": sum(
                not chunks or chunks != list(range(len(chunks))) for chunks in newsletters
            ),
        }
        for kind, odd in self.odd.items():
            ends = [survey["odd"].get(job, "deleted") for job in odd]
            ends = [end for end in ends if not end.startswith(ENDS[kind])]
            wrong[f"of {len(odd)} jobs {kind}, with another end"] = ends
        for what, count in wrong.items():
            print(f"  {what}: {count or 0}")
        return not any(wrong.values())


FAULTS = [
    *((name,) for name in sorted(vars(Chaos)) if name.startswith("fault_")),
    *(("lock", what) for what in LOCKS),
    *(("kill_child", service) for service in ("web", "worker")),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("brokers", nargs="*", default=list(BROKERS), metavar="broker")
    parser.add_argument("--pool", default="prefork")
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of faults")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000))
    options = vars(parser.parse_args())
    fine = True
    for broker in options.pop("brokers"):
        try:
            with tempfile.TemporaryDirectory() as folder:
                fine &= run(broker, Path(folder), **options)
        except SkipTest as reason:
            print(f"{broker}: not tried, {reason}")
            fine = False
    sys.exit(not fine)


def run(name, folder, *, jobs=JOBS, seconds=SECONDS, seed, pool="prefork"):
    """Run chaos on a project with this broker. Print a report, return whether nothing was lost."""
    print(f"{name}, {pool}, seed {seed}", flush=True)
    answers = {**WITH_JOBS, **BROKERS[name].answers, "worker_pool": pool}
    project = Project(cookiecutter(str(TEMPLATE), None, True, answers, output_dir=str(folder)))
    project.answers = {**DEFAULTS, **answers}
    with started(PostgreSQL("fsync=off")) as [database]:
        stack = prepare(project, folder, database, WORKER_CONCURRENCY=4)
        stack.workers.append(stack.make_worker("test", "--queues celery,test"))
        stack.processes = [stack.web, stack.beat, *stack.workers]
        fine = False
        try:
            stack.start()
            fine = Chaos(stack, jobs, seconds, seed).run()
            return fine
        finally:
            if not fine:
                print(stack.printed())
            stack.end()


if __name__ == "__main__":
    main()
