"""`make chaos`: jobs are posted while every two seconds something is killed, stopped or emptied.

At the end each accepted job must have reached a final state once, and have written its row.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import SkipTest

from cookiecutter.main import cookiecutter

from .bake import TEMPLATE
from .project import Project
from .servers import BROKERS, PostgreSQL
from .stack import TIMINGS, prepare

EVERY = 2  # seconds
JOBS, SECONDS = 1000, 100


class Chaos:
    def __init__(self, stack, jobs, seconds, seed):
        self.stack, self.seconds = stack, seconds
        self.random = random.Random(seed)
        lengths = random.Random(seed)
        self.jobs = [(number, round(lengths.uniform(0, 1), 2)) for number in range(jobs)]
        self.accepted = {}  # number: job
        self.faults = {}  # name: how often

    def run(self):
        """Post and disturb, then wait until all has ended; return whether nothing was lost."""
        start = time.monotonic()
        with self.stack.supervised(), ThreadPoolExecutor(8) as pool:
            posting = [pool.submit(self.post, *job, start) for job in self.jobs]
            while time.monotonic() - start < self.seconds or not all(p.done() for p in posting):
                time.sleep(EVERY)
                self.disturb()
            for future in posting:
                future.result()
            survey = self.wait(180)
        return self.report(survey)

    def post(self, number, seconds, start):
        """Post until the answer is 202, as a client does that wants its job accepted."""
        due = start + number * self.seconds / len(self.jobs)
        time.sleep(max(0, due - time.monotonic()))
        while True:
            try:
                job = self.stack.post("write", number, seconds, key=f"chaos-{number}")
            except (OSError, AssertionError, ValueError):
                time.sleep(0.3)
            else:
                self.accepted[number] = job
                return

    def disturb(self):
        faults = [getattr(self, name) for name in sorted(vars(Chaos)) if name.startswith("fault_")]
        fault = self.random.choice(faults)
        name = fault.__name__.removeprefix("fault_")
        self.faults[name] = self.faults.get(name, 0) + 1
        try:
            fault()
        except (ProcessLookupError, AssertionError) as error:  # it is just starting, or away
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
        """For longer than its lease."""
        worker = self.random.choice(self.stack.workers)
        worker.pause()
        threading.Timer(5, worker.resume_if_running).start()

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

    def wait(self, seconds):
        until = time.monotonic() + seconds
        numbers, jobs = list(self.accepted), list(self.accepted.values())
        ask = "from faults.survey import survey\nresult = survey(jobs, numbers)"
        while True:
            survey = self.stack.ask(ask, jobs=jobs, numbers=numbers)
            states = survey["states"]
            active = states.get("queued", 0) + states.get("running", 0)
            if not active or time.monotonic() > until:
                time.sleep(2)  # what ends a second time, does it now
                return self.stack.ask(ask, jobs=jobs, numbers=numbers)
            time.sleep(1)

    def report(self, survey):
        accepted = len(self.accepted)
        finished = survey["distinct"]
        twice = survey["finals"] - finished
        starts = [self.stack.notes("start", job) for job in self.accepted.values()]
        redelivered = sum(len(pids) - 1 for pids in starts if pids)
        lost = max(accepted - finished, accepted - survey["written"])
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        states = ", ".join(f"{state} {count}" for state, count in sorted(survey["states"].items()))
        print(f"  faults: {sum(self.faults.values())} ({faults})")
        print(f"  states: {states}; leases lapsed: {survey['crashes']}")
        for error in survey["errors"]:
            print(f"  {error}")
        print(
            f"  accepted {accepted}, finished {finished}, finished twice {twice},"
            f" redelivered {redelivered}, rows {survey['written']}, lost {lost}"
        )
        return accepted == len(self.jobs) and not lost and not twice


def children_of(pid):
    try:
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    except OSError:  # it is just starting again
        return []


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("brokers", nargs="*", default=list(BROKERS), metavar="broker")
    parser.add_argument("--pool", default="prefork")
    parser.add_argument("--jobs", type=int, default=JOBS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of disturbance")
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
    """Disturb a project on this broker; print what happened, return whether nothing was lost."""
    print(f"{name}, {pool}, seed {seed}", flush=True)
    broker = BROKERS[name]
    answers = {**broker.answers, "worker_pool": pool}
    baked = cookiecutter(
        str(TEMPLATE), no_input=True, output_dir=str(folder), extra_context=answers
    )
    database = PostgreSQL("fsync=off")
    database.start()
    try:
        stack = prepare(Project(baked), broker, folder, database, **TIMINGS)
        stack.add_worker("test")
        try:
            stack.start()
            return Chaos(stack, jobs, seconds, seed).run()
        finally:
            stack.stop()
    finally:
        database.remove()


if __name__ == "__main__":
    main()
