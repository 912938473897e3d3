"""`make bench` measures what docs/performance.md quotes, and writes its tables.

Contestants take turns, because no machine is quiet; ratios are those of the turns, their median.
"""

import argparse
import http.client
import json
import math
import os
import platform
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from statistics import median

from harness.bake import CHOICES, TEMPLATE
from harness.project import Project
from harness.servers import BROKERS, running
from stack import Output, bare, postgres

_, *POOLS = CHOICES["worker_pool"]  # besides the default
PAGE = TEMPLATE / "docs/performance.md"
TURNS = 4
CLIENTS = 4  # of the web, at once
LOOP = 250_000  # some 20 ms of computing
SIZES = {
    "renderings": 15,
    "tasks": 1500,  # sent at once
    "singles": 100,  # sent when the one before is done
    "seconds": 15,  # of requests
    "computes": 100,  # tasks for each slot of the pool, but no more than 200
    "waits 1 s": 10,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, help="0.1: a trial, which prints and writes nothing")
    scale = parser.parse_args().scale
    sizes = {name: max(2, int(size * (scale or 1))) for name, size in SIZES.items()}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        folder = Project(folder)
        tables = measure(folder, sizes)
    tables["machine"] += f" All of it took {(time.monotonic() - began) / 60:.0f} minutes.\n"
    page = PAGE.read_text("utf-8")
    for name, text in tables.items():
        print(f"\n{text}", end="")
        before, rest = page.split(f"<!-- {name} -->\n")
        page = f"{before}<!-- {name} -->\n{text}{rest[rest.index('<!-- end -->') :]}"
    if not scale:
        PAGE.write_text(page, "utf-8")


def measure(folder, sizes):
    """The texts of the page, {place: text}."""
    speeds, posts, goals = [], [], []
    rendered = rendering(folder, sizes)
    with postgres() as database:
        for broker in ("redis", "rabbitmq"):
            with running(BROKERS[broker], folder / broker) as server:
                urls = database, server.variables["CELERY_BROKER_URL"]
                output = Output(folder, *urls, broker=broker)
                rows, of_bare, of_plain = speed(output, sizes)
                speeds += [[broker, *row] for row in rows]
                if broker == "redis":  # these do not depend on it
                    more = [Output(folder, *urls, worker_pool=p) for p in POOLS]
                    pooled, used = pools([output, *more], sizes)
                    used += others(output)
                half, slow, rate = post(output, sizes)  # the last, because it leaves a queue
                posts += [[broker, f"{rate:.0f}", f"{half:.1f}", f"{slow:.1f}"]]
                goals += [
                    [f"plain tasks / bare Celery, {broker}", "≥ 0.95", *goal(of_bare, 0.95)],
                    [f"jobs / plain tasks, {broker}", "≥ 0.5", *goal(of_plain, 0.5)],
                    [f"POST → 202, {broker}: p99 in ms", "≤ 30", *goal(slow, 30, at_most=True)],
                ]
                if broker == "rabbitmq":  # which says its version
                    about = machine(output)
    return {
        "machine": about,
        "goals": table("what|goal|measured|", goals),
        "speed": table("broker|what|sent/s|done/s|one: median ms|p95 ms", speeds),
        "post": table("broker|202/s|median ms|p99 ms", posts),
        "pools": table("pool|slots|each task|tasks|plain tasks/s|jobs/s", pooled),
        "memory": table("process|RSS MB|PSS MB", used),
        "rendering": table("template|median s", rendered),
    }


def rendering(folder, sizes):
    """This template, and one with nothing but a README."""
    empty = folder / "empty"
    (empty / "{{cookiecutter.project_slug}}").mkdir(parents=True)
    (empty / "{{cookiecutter.project_slug}}/README.md").write_text("# Empty\n")
    (empty / "cookiecutter.json").write_text('{"project_slug": "my_project"}')
    taken = {empty: [], TEMPLATE: []}
    options = ["--default-config", "--no-input", "--overwrite-if-exists", "--output-dir"]
    for _ in range(sizes["renderings"]):
        for template, seconds in taken.items():
            began = time.perf_counter()
            folder.run("cookiecutter", template, *options, folder / "rendered")
            seconds.append(time.perf_counter() - began)
    nothing, this = taken.values()
    rows = [["an empty one", f"{median(nothing):.2f}"], ["this one", f"{median(this):.2f}"]]
    return [*rows, ["ratio", f"{ratio(this, nothing):.1f}"]]


def speed(output, sizes):
    """Rows, and the ratios of what is done: plain tasks to bare Celery, jobs to plain tasks."""
    contestants = {"bare Celery": (bare(output), "bare")}
    contestants |= {"plain tasks": (output, "plain"), "jobs": (output, "job")}
    sent, done, one = ({name: [] for name in contestants} for _ in range(3))
    for turn in range(TURNS):
        for name, (contestant, kind) in contestants.items():
            path = contestant.folder / f"{kind}{turn}.done"
            sent[name].append(contestant.send(kind, "all", sizes["tasks"], path))
            with contestant.running(contestant.worker):
                done[name].append(contestant.done(path, sizes["tasks"]))
                one[name] += contestant.send(kind, "each", sizes["singles"], path)
            say(output, f"{name}: {sent[name][-1]:.0f} sent/s, {done[name][-1]:.0f} done/s")
    rows = []
    for name in contestants:
        half, slow = median(one[name]) * 1000, slowest(one[name], 95) * 1000
        rates = f"{median(sent[name]):.0f}", f"{median(done[name]):.0f}"
        rows.append([name, *rates, f"{half:.1f}", f"{slow:.1f}"])
    of_bare = ratio(done["plain tasks"], done["bare Celery"])
    return rows, of_bare, ratio(done["jobs"], done["plain tasks"])


def post(output, sizes):
    """Median and p99 in ms, and the rate: clients that place order after order."""
    token = output.shell(
        "from users.models import User\n"
        "from rest_framework.authtoken.models import Token\n"
        "print(Token.objects.create(user=User.objects.create_user('demo')))"
    )
    headers = {"Authorization": f"Token {token}", "Content-Type": "application/json"}
    headers |= {"X-Forwarded-Proto": "https"}
    order = json.dumps({"email": "you@example.com", "product": "Tea"})

    def place_orders(port, until):
        client, taken = http.client.HTTPConnection("127.0.0.1", port, timeout=120), []
        while (began := time.perf_counter()) < until:
            client.request("POST", "/api/orders/", order, headers)
            answer = client.getresponse()
            text = answer.read()
            taken.append(time.perf_counter() - began)
            assert answer.status == 202, text
        return taken

    with output.web() as (_, port), ThreadPoolExecutor(CLIENTS) as clients:
        for seconds in (1, sizes["seconds"]):  # the first is a warm-up
            until = time.perf_counter() + seconds
            runs = [clients.submit(place_orders, port, until) for _ in range(CLIENTS)]
            taken = [each for run in runs for each in run.result()]
    say(output, f"POST: {len(taken) / seconds:.0f}/s")
    return median(taken) * 1000, slowest(taken, 99) * 1000, len(taken) / seconds


def pools(outputs, sizes):
    """Rows of speed, and of what the workers need."""
    rows, used = [], []
    for work, arguments in {"computes": {"rounds": LOOP}, "waits 1 s": {"seconds": 1}}.items():
        for output in outputs:
            pool = output.answers.get("worker_pool", "prefork")
            slots = int(output.shell("print(settings.CELERY_WORKER_CONCURRENCY or os.cpu_count())"))
            count, rates = sizes[work] * slots, {}
            if "rounds" in arguments:
                count = min(count, 200)
            for kind in ("plain", "job"):
                path = output.folder / f"{kind}-{work[0]}.done"
                output.send(kind, "all", count, path, **arguments)
                with output.running(output.worker) as process:
                    rates[kind] = output.done(path, count)
                    if (work, kind) == ("waits 1 s", "job"):
                        used += memory(f"worker, {pool}", output.memory(process))
            say(output, f"{work}: {rates['plain']:.1f} plain tasks/s, {rates['job']:.1f} jobs/s")
            measured = (f"{rate:.1f}" for rate in rates.values())
            rows.append([pool, str(slots), work, str(count), *measured])
    return rows, used


def others(output):
    """Rows of what the other processes need, after some work."""
    commands = dict(
        re.findall("^(beat|flower): .*(celery .+)$", output.folder.read("Procfile"), re.M)
    )
    path = output.folder / "others.done"
    with ExitStack() as stack:
        web, port = stack.enter_context(output.web())
        stack.enter_context(output.running(output.worker))
        beat, flower = (stack.enter_context(output.running(commands[p])) for p in sorted(commands))
        output.send("job", "all", 100, path)
        output.done(path, 100)
        for _ in range(100):
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            client.request("GET", "/login/", headers={"X-Forwarded-Proto": "https"})
            client.getresponse().read()
        processes = {"gunicorn": web, "Beat": beat, "Flower": flower}
        return [r for name, p in processes.items() for r in memory(name, output.memory(p))]


def memory(name, used):
    """Rows of a process and of its children."""
    main, *children = used
    rows = [[name, *(f"{megabytes:.0f}" for megabytes in main)]]
    if children:
        each = [f"{median(kind):.0f}" for kind in zip(*children, strict=True)]
        rows.append([f"{name}, each of {len(children)} children", *each])
    return rows


def machine(output):
    """A sentence about the machine and what ran on it."""
    cpu = re.search("model name.*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = output.shell(
        "import celery, django, kombu\n"
        "from django.db import connection\n"
        "connection.ensure_connection()\n"
        "with kombu.Connection(settings.CELERY_BROKER_URL) as broker:\n"
        "    print(f'Celery_{celery.__version__},_Django_{django.__version__}', end=',_')\n"
        "    print(f'PostgreSQL_{connection.pg_version // 10000}', end=',_')\n"
        "    print('RabbitMQ_' + broker.connection.server_properties['version'])"
    )
    redis = re.search("v=([0-9.]+)", output.folder.call("redis-server", "--version"))[1]
    return (
        f"Measured on {date.today()} with {os.cpu_count()} CPUs ({cpu[1] if cpu else 'unknown'}) "
        f"and {memory:.0f} GB, which servers and clients share: "
        f"Python {platform.python_version()}, {versions.replace('_', ' ')}, Redis {redis}."
    )


def ratio(ours, theirs):
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def slowest(taken, percent):
    """The time within which `percent` of 100 were done."""
    return sorted(taken)[math.ceil(len(taken) * percent / 100) - 1]


def goal(measured, limit, at_most=False):
    held = measured <= limit if at_most else measured >= limit
    return [f"{measured:.3g}", "held" if held else "**missed**"]


def table(header, rows):
    lines = [header.split("|"), ["---"] * len(rows[0]), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def say(output, text):
    print(f"{output.folder.name}: {text}", flush=True)


if __name__ == "__main__":
    main()
