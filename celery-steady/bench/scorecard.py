"""Kill workers, restart the broker and cut its connections under load. Count what was lost, and what ran twice.

    python celery-steady/bench/scorecard.py redis --kills 200 --restarts 50 --cuts 50

Each fifth task has a countdown, each tenth is retried. celery-steady and stock Celery get the same, one
after the other. Writes docs/scorecard.md, and what it counted to docs/scorecard.json.

    python celery-steady/bench/scorecard.py redis --kinds both --kills 0 --restarts 0 --cuts 0 --swaps 50

runs a worker of each kind side by side, as during an upgrade, and lets them change their kind.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent / "tests"), str(HERE.parent / "src")]

import results  # noqa: E402
from servers import SQS, Process, RabbitMQ, Redis  # noqa: E402

RATES = {"redis": 100, "rabbitmq": 100, "sqs": 10}  # tasks a second; moto does no more
KINDS = "celery-steady", "stock Celery"
BOTH = "both"
BROKERS = ["redis", "rabbitmq", "sqs"]
FAULTS = {
    "kill": "workers killed",
    "restart": "restarts",
    "cut": "times all connections cut",
    "swap": "workers replaced by the other kind",
}
COUNTS = ["sent", "lost", "interrupted, ran again", "sent twice", "ran twice otherwise"]
FIRST_IN_STOCK = "of them first in a stock worker"
COLUMNS = {
    "broker": "broker",
    "with": "kind",
    "faults": lambda row: ", ".join(
        f"{row[each]} {name}" for each, name in FAULTS.items() if each in row
    ),
    **{name: name for name in COUNTS[:-1]},
    COUNTS[-1]: lambda row: f"{row[COUNTS[-1]]}{by_stock(row)}",
}


def by_stock(row):
    return f", {row[FIRST_IN_STOCK]} of them by a stock worker first" if row["kind"] == BOTH else ""


PAGE = """# Scorecard

What became of tasks while their workers were killed (`kill -9`), their broker was stopped or killed and started again, and all its connections were closed. Stock Celery, too, has late acknowledgment, `task_reject_on_worker_lost` and a short visibility timeout. 100 tasks a second were sent, on SQS (moto) 10; each fifth had a countdown, each tenth was retried. A task that was not accepted doesn't count; runs of stock Celery took longer. With "both", a worker of each kind ran side by side, and was stopped and replaced by one of the other kind.

A task is interrupted, and runs again, if its worker is killed before it has acknowledged it; on RabbitMQ, also if its worker has lost its connection. A retry that gets no answer is sent again; on SQS, botocore does so for each sender.

[bench/scorecard.py](../bench/scorecard.py) writes this page: `make scorecard`. [scorecard.json](scorecard.json) has all that it counted.
"""
AWS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
AWS["AWS_DEFAULT_REGION"] = "eu-central-1"


class Broker:
    """A server, and how its connections are cut."""

    def __init__(self, name, folder, visibility):
        self.visibility = visibility  # seconds
        self.server = {"redis": Redis, "rabbitmq": RabbitMQ, "sqs": SQS}[name](folder)
        self.name = name

    def cut(self):
        if self.name == "redis":
            from redis import Redis

            client = Redis.from_url(self.server.url)
            for kind in "normal", "pubsub":
                client.client_kill_filter(_type=kind)
        elif self.name == "rabbitmq":
            command = ["rabbitmqctl", "close_all_connections", "scorecard"]
            env = self.server.popen["env"]
            subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        else:  # as root; answers "Invalid argument" for the listening socket
            command = ["ss", "--kill", "sport", "=", f":{self.server.port}"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def conf(self, kind):
        is_quorum = self.name == "rabbitmq"
        conf = {
            "broker_url": self.server.url,
            "broker_transport_options": {
                "visibility_timeout": self.visibility,
                **self.server.transport_options,
            },
            "broker_connection_retry_on_startup": True,
            "broker_connection_max_retries": None,
            "task_acks_late": True,
            "task_reject_on_worker_lost": True,
            "task_default_queue_type": "quorum" if is_quorum else "classic",
            "worker_prefetch_multiplier": 1,
            "worker_soft_shutdown_timeout": 10,
        }
        if self.name == "redis":  # kombu's own check takes ten times as long
            conf["broker_transport_options"]["unacked_restore_throttle"] = 1
        if kind == "celery-steady":
            conf["worker_consumer"] = "celery_steady.consumer:Consumer"
            if self.server.transport:
                conf["broker_transport"] = self.server.transport
        return conf


class Sender(threading.Thread):
    """Sends tasks until stop() is called. `refused` counts errors.

    `accepted` has for each number how often it runs, and when it was sent: from and until.
    """

    def __init__(self, app, rate):
        super().__init__(daemon=True)
        self.app, self.rate, self.accepted, self.refused = app, rate, {}, 0
        self.is_stopped = threading.Event()

    def run(self):
        number, due = 0, time.monotonic()
        while not self.is_stopped.is_set():
            number, due = number + 1, due + 1 / self.rate
            kind = random.random()
            options = {"countdown": random.uniform(1, 5)} if kind < 0.2 else {}
            is_retried = 0.2 <= kind < 0.3
            seconds = random.choice([0, 0, 0, 0.01, 0.02])
            began = time.time()
            try:
                # What was sent without an answer may have arrived: neither lost nor doubled.
                self.app.send_task(
                    "scorecard_app.work", [number, seconds, is_retried], retry=False, **options
                )
                self.accepted[number] = 1 + is_retried, began, time.time()
            except Exception:
                self.refused += 1
                time.sleep(0.2)
                due = max(due, time.monotonic())
            time.sleep(max(0, due - time.monotonic()))

    def stop(self):
        self.is_stopped.set()
        self.join()


class Run:
    def __init__(self, name, kind, folder, visibility):
        self.folder = folder
        self.broker = Broker(name, folder / "broker", visibility)
        self.marks = folder / "marks"
        self.marks.touch()
        self.kinds = list(KINDS) if kind == BOTH else [kind] * 2  # of each worker
        self.faults, self.workers = Counter(), []
        self.at = []  # (fault, when it began, when it was over)
        self.killed = {}  # {worker, as its marks name it: when it was killed}

    def env(self, kind):
        env = os.environ | AWS | {"CONF": json.dumps(self.broker.conf(kind)), "KIND": kind}
        env |= {"MARKS": str(self.marks), "PYTHONPATH": os.pathsep.join(sys.path)}
        if self.broker.name == "sqs":
            env["AWS_ENDPOINT_URL"] = self.broker.server.endpoint
        return env

    def app(self):
        os.environ.update(self.env(self.kinds[0]))
        sys.modules.pop("scorecard_app", None)
        import scorecard_app

        return scorecard_app.app

    def start_worker(self, number):
        command = (
            f"{sys.executable} -m celery -A scorecard_app worker -c 2 -l WARNING -n {number}@x"
        )
        log = self.folder / f"worker{number}.log"
        return Process(
            command.split(), log, cwd=self.folder, env=self.env(self.kinds[number])
        ).start()

    def starts(self):
        with open(self.marks) as file:
            return sum(line.endswith("start\n") for line in file)

    def wait_for_work(self, seconds=30):
        """Wait until tasks start again. A stock worker may never."""
        before, until = self.starts(), time.monotonic() + seconds
        while self.starts() < before + 5 and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(random.uniform(0.2, 1.2))

    def kill(self):
        number = random.randrange(2)
        worker = self.workers[number]
        self.killed[f"{self.kinds[number].split()[0]}-{worker.pid}"] = time.time()
        worker.kill()
        worker.start()

    def restart(self):
        server = self.broker.server
        if random.random() < 0.5:
            server.kill()
        else:
            server.signal(signal.SIGTERM)
            server.wait()
        time.sleep(1)
        server.start()

    def cut(self):
        self.broker.cut()

    def swap(self):
        """Stop a worker as a deploy does, and start the other kind in its place."""
        number = random.randrange(2)
        self.workers[number].signal(signal.SIGTERM)
        self.workers[number].wait()
        self.kinds[number] = next(kind for kind in KINDS if kind != self.kinds[number])
        self.workers[number] = self.start_worker(number)

    def go(self, faults):
        with self.broker.server:
            sender = Sender(self.app(), RATES[self.broker.name])
            self.workers = [self.start_worker(number) for number in range(2)]
            try:
                sender.start()
                self.wait_for_work()
                for number, fault in enumerate(faults):
                    began = time.time()
                    getattr(self, fault)()
                    self.at.append((fault, began, time.time()))
                    self.faults[fault] += 1
                    self.wait_for_work()
                    if number % 20 == 19:
                        print(f"  {number + 1} faults of {len(faults)}", flush=True)
                sender.stop()
                self.wait_until_quiet()
            finally:
                for worker in self.workers:
                    worker.kill()
        return self.count(sender)

    def wait_until_quiet(self):
        """Wait until nothing has started for longer than a lost message could take."""
        seen, since = self.starts(), time.monotonic()
        while time.monotonic() < since + 3 * self.broker.visibility:
            time.sleep(1)
            if (now := self.starts()) > seen:
                seen, since = now, time.monotonic()

    def count(self, sender):
        """Return what became of the accepted tasks. What a task does on its retry is a run of its own."""
        starts, ends = {}, {}
        for line in self.marks.read_text().splitlines():
            number, retries, group, at, what = line.split()
            run = int(number), int(retries)
            into = starts if what == "start" else ends
            into.setdefault(run, []).append((group, float(at)))
        lost = [
            number
            for number, (runs, _, _) in sender.accepted.items()
            if not all((number, retries) in ends for retries in range(runs))
        ]
        again, sent_again, twice = 0, 0, []
        for run, found in starts.items():
            if run[0] in sender.accepted and (extra := len(found) - 1):
                stopped = sum(
                    self.was_interrupted(group, at, ends.get(run, [])) for group, at in found
                )
                if run[1]:  # its first run may have sent the retry again
                    stopped += len(starts[run[0], 0]) - 1
                again += min(extra, stopped)
                if extra > stopped and self.was_cut(*self.sent(run, ends, sender)):
                    sent_again += 1
                elif extra > stopped:
                    twice.append((run, found, ends.get(run)))
        return {
            **self.faults,
            "sent": len(sender.accepted),
            "refused": sender.refused,
            "lost": len(lost),
            "interrupted, ran again": again,
            "sent twice": sent_again,
            "ran twice otherwise": len(twice),
            FIRST_IN_STOCK: sum(runs[0][0].startswith("stock") for _, runs, _ in twice),
            "which": twice[:20],
            "faults at": self.at if twice else [],
        }

    def sent(self, run, ends, sender):
        """Return from when until when this run was sent. A worker sends a retry until it has an answer."""
        if run[1]:
            ended = [at for _, at in ends[run[0], 0]]
            return min(ended), max(ended) + 30
        return sender.accepted[run[0]][1:]

    def was_cut(self, since, until):
        return any(
            fault in ("restart", "cut") and began < until and since < over
            for fault, began, over in self.at
        )

    def was_interrupted(self, group, start, ends):
        """Return whether this run's worker could not acknowledge it."""
        killed = self.killed.get(group, float("inf"))
        ended = min((at for other, at in ends if other == group and at >= start), default=killed)
        lost_connection = self.was_cut(start, ended + 2)
        # Without a connection, it acknowledges when it has connected again.
        seconds = 10 if lost_connection else 2
        return ended + seconds > killed or (self.broker.name == "rabbitmq" and lost_connection)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("broker", choices=BROKERS)
    for fault, count in {"kills": 200, "restarts": 50, "cuts": 50, "swaps": 0}.items():
        parser.add_argument(f"--{fault}", type=int, default=count)
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=[*KINDS, BOTH])
    parser.add_argument("--visibility", type=int, default=30, help="seconds; outputs have 120")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="into docs/")
    parser.add_argument("--check", action="store_true", help="fail if any is lost or ran twice")
    options = parser.parse_args()
    if options.broker == "sqs":
        options.restarts = 0  # moto keeps nothing
    rows = []
    for kind in options.kinds:
        random.seed(options.seed)
        with tempfile.TemporaryDirectory() as folder:
            print(f"{options.broker}, {kind}", flush=True)
            run = Run(options.broker, kind, Path(folder), options.visibility)
            start = time.monotonic()
            faults = [each for each in FAULTS for _ in range(vars(options)[f"{each}s"])]
            random.shuffle(faults)
            found = run.go(faults)
            found["minutes"] = round((time.monotonic() - start) / 60)
        rows.append({"broker": options.broker, "kind": kind, **found, "seed": options.seed})
        print(rows[-1], flush=True)
        if options.write:
            results.write("scorecard", PAGE, rows[-1:], COLUMNS, key=("broker", "kind"))
    if options.check:
        sys.exit(any(row["lost"] or row["ran twice otherwise"] or not row["sent"] for row in rows))


if __name__ == "__main__":
    main()
