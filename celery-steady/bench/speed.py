"""Compare celery-steady's transport for Redis with stock Celery: tasks that do nothing, in turns.

It writes docs/speed.md, and what it measured to docs/speed.json.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
SOURCE = HERE.parent / "src"
sys.path += [str(HERE.parent / "tests"), str(SOURCE)]

import psutil  # noqa: E402
import redis  # noqa: E402
import results  # noqa: E402
from servers import Process, Redis, until  # noqa: E402

SIZES = 10_000, 100_000, 200  # tasks; those that wait, or have a countdown; sent one by one
TURNS = 3
KINDS = "celery-steady", "stock Celery"
PAGE = f"""# Speed on Redis

One worker with two processes runs tasks that do nothing. celery-steady and stock Celery take turns: the figures are medians of {TURNS} turns, and the last column is the median of the turns' ratios.

[bench/speed.py](../bench/speed.py) writes this page: `make bench`. [speed.json](speed.json) has each turn.
"""
COLUMNS = {
    "": "what",
    **{kind: lambda row, kind=kind: short(median(row[kind])) for kind in KINDS},
    "ratio": lambda row: f"{row['ratio']:.2f}",
}


class Run:
    """An app, its Redis and its worker."""

    def __init__(self, kind, server, folder):
        self.server, self.folder = server, folder
        self.client = redis.Redis.from_url(server.url)
        self.client.flushall()
        conf = {
            "broker_url": server.url,
            "task_acks_late": True,
            "worker_prefetch_multiplier": 1,
        }
        if kind == "celery-steady":
            conf["broker_transport"] = server.transport
            conf["worker_consumer"] = "celery_steady.consumer:Consumer"
        path = os.pathsep.join([str(HERE), str(SOURCE)])
        self.env = os.environ | {"CONF": json.dumps(conf), "PYTHONPATH": path}

    def send(self, code, *arguments):
        """Call a function of speed_app.py in a process of its own, and return what it prints."""
        call = f"import json, speed_app; print(json.dumps(speed_app.{code}(*{arguments})))"
        found = subprocess.run(
            [sys.executable, "-c", call], env=self.env, stdout=subprocess.PIPE, check=True
        )
        return json.loads(found.stdout)

    def worker(self):
        words = "-m celery -A speed_app worker -c 2 -l WARNING".split()
        return Process([sys.executable, *words], self.folder / "worker.log", cwd=HERE, env=self.env)

    def until_waiting(self, count):
        while (found := self.client.llen("celery")) > count:
            time.sleep(0.02)
        return found

    def speed(self, tasks, waiting):
        """Return what it costs to send and to run so many tasks of those that wait."""
        seconds, cpu = self.send("send", waiting)
        with self.worker() as worker:
            first = self.until_waiting(waiting - 100)
            start, before = time.monotonic(), cpu_of(worker.pid)
            last = self.until_waiting(waiting - tasks)
            ran, done = time.monotonic() - start, first - last
            main, children = (b - a for a, b in zip(before, cpu_of(worker.pid), strict=True))
            self.client.delete("celery")
            stop(worker)
        return {
            "sent a second": waiting / seconds,
            "ms of CPU to send": 1000 * cpu / waiting,
            "done a second": done / ran,
            "ms of CPU, main process": 1000 * main / done,
            "ms of CPU, with children": 1000 * (main + children) / done,
        }

    def single(self, count):
        with self.worker() as worker:
            self.send("until_started", 1)
            seconds = self.send("until_started", count)
            stop(worker)
        return {"ms from send to start": 1000 * median(seconds)}

    def countdowns(self, count):
        """Return what so many countdowns take in Redis, and in a worker, in MB."""
        with self.worker() as worker:
            self.send("until_started", 1)
            before = self.memory(worker)
            self.send("send", count, 3600)
            time.sleep(20)  # a stock worker fetches them meanwhile
            found = [b - a for a, b in zip(before, self.memory(worker), strict=True)]
            worker.kill()
        self.client.flushall()
        names = [f"MB in {place}, {count:,} countdowns" for place in ("Redis", "the worker")]
        return dict(zip(names, found, strict=True))

    def memory(self, worker):
        used = psutil.Process(worker.pid).memory_info().rss
        return [size / 1e6 for size in (self.client.info("memory")["used_memory"], used)]


def cpu_of(pid):
    """Return the seconds of CPU of a process, and those of its children."""
    main = psutil.Process(pid)
    return [
        sum(sum(each.cpu_times()[:2]) for each in some)
        for some in ([main], main.children(recursive=True))
    ]


def stop(worker):
    worker.signal(signal.SIGTERM)
    until(lambda: not worker.is_running(), "the worker stops")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, help="0.1: a trial that leaves the page unchanged")
    scale = parser.parse_args().scale
    tasks, many, singles = (max(200, int(size * (scale or 1))) for size in SIZES)
    turns = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder, Redis(Path(folder) / "redis") as server:
        for _ in range(TURNS):
            for kind, taken in turns.items():
                run = Run(kind, server, Path(folder))
                found = run.speed(tasks, tasks + 500) | run.single(singles)
                deep = run.speed(tasks, many)["done a second"]
                found[f"done a second, {many:,} waiting"] = deep
                found |= run.countdowns(many)
                taken.append(found)
                print(kind, found, flush=True)
    rows = []
    for what in turns["celery-steady"][0]:
        ours, theirs = ([turn[what] for turn in turns[kind]] for kind in KINDS)
        ratio = median(our / their for our, their in zip(ours, theirs, strict=True) if their)
        rows.append({"what": what, **dict(zip(KINDS, (ours, theirs), strict=True)), "ratio": ratio})
        print(f"{what}: {median(ours):.2f}, {median(theirs):.2f}, ratio {ratio:.2f}", flush=True)
    if not scale:
        results.write("speed", PAGE, rows, COLUMNS, key=("what",))


def short(figure):
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.2f}"


if __name__ == "__main__":
    main()
