"""`make chaos`: post jobs, batches and chains; every two seconds kill, stop or empty something.

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

from .bake import TEMPLATE, WITH_JOBS
from .project import Project, children_of, started, wait_for
from .servers import BROKERS, PostgreSQL
from .stack import TIMINGS, prepare

EVERY = 2  # seconds between two faults
JOBS, SECONDS = 1000, 100
JOBS_FOR_EACH_WORK = 20  # jobs for each batch or chain
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


class Chaos:
    def __init__(self, stack, jobs, seconds, seed):
        self.stack, self.seconds = stack, seconds
        self.random = random.Random(seed)
        lengths = random.Random(seed)  # in seconds: most of the time, each worker has a job
        self.jobs = [(number, round(lengths.uniform(0, 1.5), 2)) for number in range(jobs)]
        self.accepted = {}  # number: job
        self.works = []  # numbers of batches and chains
        self.odd = {kind: [] for kind in ENDS}  # jobs of the faults
        self.started_in_pause = self.workers_stuck = self.jobs_stuck = 0
        self.round, self.faults = [], Counter()  # faults still to come, and how often each came
        self.timers = []

    def run(self):
        """Post jobs and inject faults, then wait for all jobs. Return whether nothing was lost."""
        start = time.monotonic()
        with self.stack.supervised(), self.old_snapshot(), ThreadPoolExecutor(8) as pool:
            posting = []
            for number, length in self.jobs:
                posting.append(pool.submit(self.post, number, length, start))
                if number % JOBS_FOR_EACH_WORK == 0:
                    posting.append(pool.submit(self.post_work, number, start))
            while (
                time.monotonic() - start < self.seconds
                or len(self.faults) < len(FAULTS)
                or not all(p.done() for p in posting)
            ):
                time.sleep(EVERY)
                self.inject_fault()
            for future in posting:
                future.result()
            self.wait(600)
            survey = self.survey()
        for timer in self.timers:
            timer.cancel()
        return self.report(survey)

    def post(self, number, seconds, start):
        data = {"task": "write", "args": [number, seconds], "key": f"chaos-{number}"}
        self.accepted[number] = self.post_until_accepted("/faults/", number, start, data)

    def post_work(self, number, start):
        """Post a batch or a chain."""
        work = number // JOBS_FOR_EACH_WORK
        data = {"number": work, "key": f"work-{work}"}
        self.post_until_accepted("/faults/batches/", number, start, data)
        self.works.append(work)

    def post_until_accepted(self, path, number, start, data):
        """Post until the answer is 202, as a client that needs its job accepted. Return the id."""
        due = start + number * self.seconds / len(self.jobs)
        time.sleep(max(0, due - time.monotonic()))
        while True:
            try:
                return self.stack.post_to(path, **data)
            except (OSError, AssertionError, ValueError):
                time.sleep(0.3)

    def inject_fault(self):
        if not self.round:  # each fault comes once in a round, in random order
            self.round = self.random.sample(FAULTS, len(FAULTS))
        fault = self.round.pop()
        name = fault.removeprefix("fault_")
        self.faults[name] += 1
        try:
            getattr(self, fault)()
        # The target is unavailable.
        except (OSError, AssertionError, ValueError, psycopg.Error) as error:
            print(f"  {name}: {str(error)[-200:]}", file=sys.stderr)

    def fault_worker_killed(self):
        self.random.choice(self.stack.workers).kill()

    def fault_child_killed(self):
        group = self.random.choice(self.stack.workers).pid
        if children := children_of(group):
            os.kill(self.random.choice(children), signal.SIGKILL)

    def fault_worker_stopped(self):
        os.kill(self.random.choice(self.stack.workers).pid, signal.SIGTERM)

    def fault_worker_paused(self):
        """Pause a worker for longer than its lease."""
        worker = self.random.choice(self.stack.workers)
        worker.pause()
        threading.Timer(5, worker.resume).start()

    def fault_web_killed(self):
        if children := children_of(self.stack.web.pid):
            os.kill(self.random.choice(children), signal.SIGKILL)

    def fault_beat_killed(self):
        self.stack.beat.kill()

    def fault_broker_restarted(self):
        self.stack.broker.kill()
        time.sleep(self.random.uniform(0, 3))
        self.stack.broker.start()

    def fault_broker_paused(self):
        self.stack.broker.pause()
        time.sleep(self.random.uniform(1, 3))
        self.stack.broker.resume()

    def fault_broker_emptied(self):
        self.stack.empty("celery")

    def fault_database_restarted(self):
        self.stack.database.kill()
        time.sleep(self.random.uniform(0, 3))
        self.stack.database.start()

    def fault_messages_copied(self):
        self.stack.ask("from faults.survey import copy_messages\ncopy_messages()")

    def fault_backlog(self):
        """Keep some plain tasks in the queue of the jobs for half a minute."""
        gate = self.stack.folder / f"gate-{time.monotonic()}"
        self.stack.ask("for _ in range(30): plain.circle.delay(gate, 0.1)", gate=str(gate))
        timer = threading.Timer(30, gate.touch)
        timer.daemon = True
        timer.start()
        self.timers.append(timer)

    def fault_row_locked(self):
        code = "result = Job.objects.filter(state='running').values_list('pk', flat=True).first()"
        if job := self.stack.ask(code):
            self.lock(f"SELECT FROM durable_jobs_job WHERE id = '{job}' FOR UPDATE")

    def fault_table_locked(self):
        self.lock("LOCK TABLE durable_jobs_job IN ACCESS EXCLUSIVE MODE")

    def fault_table_locked_for_writers(self):
        """As CREATE INDEX does. Everybody can read that leases lapse, and nobody can renew one."""
        self.lock("LOCK TABLE durable_jobs_job IN SHARE MODE")

    def lock(self, statement):
        """Hold a lock for longer than a lease."""
        with self.stack.locked(statement):
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
            self.fault_worker_killed()
            self.fault_messages_copied()
            time.sleep(3)
            ask = "result = Job.objects.filter(pk__in=jobs, started_at__isnull=False).count()"
            self.started_in_pause += self.stack.ask(ask, jobs=jobs)
        finally:
            self.stack.ask("pauses.resume('faults.tasks.limited')")

    def fault_dump(self):
        """Back the database up."""
        assert self.stack.database.run("pg_dump", "--file", os.devnull, self.stack.database_url())

    @contextmanager
    def old_snapshot(self):
        """Keep PostgreSQL from removing old row versions, as a long report does."""
        over = threading.Event()

        def hold():
            while not over.wait(0.1):
                # It ends with the database.
                with (
                    suppress(psycopg.Error),
                    psycopg.connect(self.stack.database_url()) as connection,
                ):
                    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    while not over.wait(0.5):
                        connection.execute("SELECT")

        with ThreadPoolExecutor(1) as pool:
            holder = pool.submit(hold)
            try:
                yield
            finally:
                over.set()
                holder.result()

    def fault_old_beat(self):
        """Let a Beat of older code send jobs of a new task, as in a deploy with Beat last."""
        variables = self.stack.beat.options["env"]
        variables["OLD_CODE"] = "1"
        self.stack.beat.kill()
        code = "result = [j.pk for j in enqueue_many([new.using(countdown=2).s()] * 5)]"
        jobs = self.stack.ask(code)
        self.odd["that Beat does not know"] += jobs
        try:
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
        names = {"jobs": list(self.accepted.values()), "numbers": list(self.accepted)}
        names |= {"odd": list(chain(*self.odd.values())), "works": self.works}
        ask = "from faults.survey import survey\nresult = survey(jobs, numbers, odd, works)"
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
        accepted, finished, states = len(self.accepted), survey["distinct"], survey["states"]
        works = [survey["batches"], survey["jobs of works"]]
        starts = Counter(job for kind, job, *_ in self.stack.lines() if kind == "start")
        redelivered = sum(starts[job] - 1 for job in self.accepted.values() if starts[job])
        print(f"  faults: {sum(self.faults.values())} {dict(sorted(self.faults.items()))}")
        print(f"  jobs: {accepted} {states}, redelivered {redelivered}, lapsed {survey['crashes']}")
        print(f"  batches and chains: {len(self.works)}, batches and their jobs: {works}")
        newsletters = [survey["chunks"].get(job, []) for job in self.odd[NEWSLETTERS]]
        wrong = {
            "jobs that were not accepted": len(self.jobs) - accepted,
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
        for kind, jobs in self.odd.items():
            ends = [survey["odd"].get(job, "deleted") for job in jobs]
            odd = [end for end in ends if not end.startswith(ENDS[kind])]
            wrong[f"of {len(jobs)} jobs {kind}, with another end"] = odd
        for what, count in wrong.items():
            print(f"  {what}: {count or 0}")
        return not any(wrong.values())


FAULTS = sorted(name for name in vars(Chaos) if name.startswith("fault_"))


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
    broker = BROKERS[name]
    answers = {**WITH_JOBS, **broker.answers, "worker_pool": pool}
    baked = cookiecutter(
        str(TEMPLATE), no_input=True, output_dir=str(folder), extra_context=answers
    )
    with started(PostgreSQL("fsync=off")) as [database]:
        project = Project(baked)
        project.answers = answers
        stack = prepare(project, broker, folder, database, **TIMINGS)
        third = stack.make_worker("test", "--queues celery,test")
        stack.workers.append(third)
        stack.processes.append(third)
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
