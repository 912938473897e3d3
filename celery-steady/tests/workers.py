"""Real workers of worker_app.py, and the calls of their tasks."""

import json
import os
import select
import shutil
import socket
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from celery import chord
from celery.contrib.testing.worker import start_worker
from servers import LIMIT, Process

HERE = Path(__file__).parent
PATHS = [HERE, HERE.parent / "src"]


@contextmanager
def in_thread(app, pool="solo"):
    """A worker in a thread of this process."""
    # By default it looks for tasks, and whether it should end, each second or two.
    app.conf.worker_timer_precision = 0.01
    if app.conf.broker_url == "memory://":
        app.conf.broker_transport_options = {"polling_interval": 0.01}
    with start_worker(app, pool=pool, perform_ping_check=False, shutdown_timeout=LIMIT) as worker:
        yield worker
        app.control.shutdown([worker.hostname])


def sum_of_chord(app, ignored):
    """Return the sum of 2 and 4, from a chord whose members ignore their results, or not."""

    @app.task(shared=False, ignore_result=ignored)
    def double(x):
        return 2 * x

    @app.task(shared=False)
    def total(numbers):
        return sum(numbers)

    with in_thread(app):
        return chord([double.s(1), double.s(2)])(total.s()).get(timeout=LIMIT)


class Call:
    """An event of a worker, or a task that runs and waits for an answer()."""

    def __init__(self, line):
        self.line = line
        line.settimeout(LIMIT)
        with line.makefile() as file:
            vars(self).update(json.loads(file.readline()))

    def answer(self):
        """Let the task return its name."""
        self.line.close()


class Calls:
    """The calls that were not yet looked at."""

    def __init__(self):
        self.folder = tempfile.mkdtemp()  # short enough for the path of a socket
        self.path = f"{self.folder}/calls"
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(self.path)
        self.socket.listen(1000)
        self.waiting, self.taken = [], []

    def accept(self, seconds):
        """Wait for one more call. Return whether there was one."""
        if not select.select([self.socket], [], [], seconds)[0]:
            return False
        self.waiting.append(Call(self.socket.accept()[0]))
        return True

    def next(self, name, worker=None):
        """Wait for a call with this name, from this worker if one is given."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            assert worker is None or worker.is_running(), f"{name}: the worker has ended"
            for call in self.waiting:
                if call.name == name and (worker is None or call.group == worker.pid):
                    self.waiting.remove(call)
                    self.taken.append(call)  # keep its line open
                    return call
            self.accept(1)
        raise AssertionError(f"{name} doesn't call")

    def names(self):
        """Return the names of all calls that wait for an answer."""
        while self.accept(0.05):
            pass
        return [call.name for call in self.waiting]

    def close(self):
        self.socket.close()
        for call in self.waiting + self.taken:
            call.line.close()
        shutil.rmtree(self.folder)


class Worker(Process):
    """A worker with these settings, which has started."""

    def __init__(self, folder, calls, conf, pool="prefork", options=(), **variables):
        number = len(list(folder.glob("worker*")))
        self.calls = calls
        celery = [sys.executable, "-m", "celery", "-A", "worker_app", "worker"]
        words = f"-P {pool} -c 2 -n {number}@test -l INFO --without-mingle"
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, [*variables.pop("paths", []), *PATHS])),
            "CONF": json.dumps(conf),
            "CALLS": calls.path,
            **variables,
        }
        env.pop("DJANGO_SETTINGS_MODULE", None)
        log = folder / f"worker{number}.log"
        super().__init__([*celery, *words.split(), *options], log, cwd=folder, env=env)

    def start(self):
        super().start()
        self.parts = self.calls.next("ready", worker=self).parts
        return self

    def stop(self, number):
        """Signal the worker, and wait until it has begun to stop."""
        self.signal(number)
        self.calls.next("stopping", worker=self)
