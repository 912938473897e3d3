"""`make bench` measures the figures of docs/performance.md, writes its tables and prints goals.

Contestants take turns, because no machine is quiet. A ratio is the median of the turns' ratios.
"""

import argparse
import http.client
import json
import math
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median

import psycopg
from harness import results
from harness.bake import CHOICES, TEMPLATE
from harness.project import Project, started
from harness.servers import BROKERS, PostgreSQL, versions
from stack import Output, Rivals, bare, cpu_ms, flushes, pgbench

_, *POOLS = CHOICES["worker_pool"]  # besides the default
PAGE = TEMPLATE / "durable-jobs/docs/performance.md"
CLIENTS = 4  # that send requests at once
SLOTS = 2  # of each contestant's worker
LOOP = 250_000  # rounds: about 20 ms of computing
SIZES = {
    "turns": [3],
    "renderings": [15],
    "tasks": [1000],  # sent one by one, and as many again in bulk
    "bulk": [20_000],  # tasks in one call
    "together": [10_000],  # tasks that have one callback, and as many alone
    "limited": [2000],
    "snapshot": [24_000],  # jobs with a limit that end while it is held
    "blocked": [100_000],
    "singles": [100],  # each sent when the previous one is done
    "polled": [20],  # the same, for a queue that is polled once a second
    "waiting": [1000, 10_000, 100_000],
    "due": [5000, 1000],  # jobs, and how many queues they are in at most
    "rows": [1000, 100_000, 1_000_000],
    "clients": [1, 8],  # of pgbench
    "seconds": [5],  # of requests, in each turn
    "computes": [100],  # tasks for each slot of the pool, at most 200 in all
    "waits 1 s": [10],
}
LIMITS = [(None, 1), (5, 500), (5, 10), (5, 1), (1, 1)]  # (at once in a key, keys)
PAGES = [
    "`GET /api/jobs/`",
    "`?state=failed`",
    "page 90% down the list",
    "admin: list",
    "admin: search by id",
]
TABLES = {
    "speed": "broker|what|sent/s|in bulk/s|done/s|one: median ms|p95 ms",
    "costs": "broker|what|main process|children|PostgreSQL|broker|sum|to enqueue|flushes",
    "bulk": "what|stored/s|first start: ms|all done: s",
    "database": "finished jobs|clients|jobs/s|CPU-ms|jobs/s for each CPU|flushes|KB of WAL",
    "parts": "broker|with|INSERT/s|publish/s|one after the other/s|jobs sent/s|ratio",
    "together": "what|tasks|how|stored/s|done/s|CPU-ms each|callback starts after ms",
    "limits": "limit of a key|keys|stored/s|done/s|vs. unlimited|CPU-ms each"
    "|next start: median ms|p95 ms",
    "snapshot": "jobs|the first thousand: jobs/s|the last thousand: jobs/s",
    "blocked": "blocked jobs|by|ms of a round",
    "waiting": "waiting jobs|claims/s|jobs done/s",
    "sweep": "broker|queues|jobs sent/s",
    "rows": "finished jobs|" + "|".join(PAGES) + "|purged/s",
    "processes": "child processes|plain tasks/s|jobs/s",
    "post": "broker|what|202/s|median ms|p99 ms",
    "pools": "pool|slots|each task|tasks|plain tasks/s|jobs/s",
    "memory": "process|RSS MB|PSS MB",
    "rendering": "template|median s",
    "goals": "what|goal|measured|",
}
PRINTED = [  # and not written into the page
    *("costs", "bulk", "database", "parts", "together", "snapshot", "blocked", "waiting", "sweep"),
    *("processes", "post", "pools", "memory", "rendering", "goals"),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, help="0.1: a trial that leaves the page unchanged")
    scale = parser.parse_args().scale
    sizes = {name: [max(2, int(n * (scale or 1))) for n in all] for name, all in SIZES.items()}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Project(folder), sizes)
        bench.measure()
    for name, rows in bench.rows.items():
        print(f"\n{results.table(TABLES[name].split('|'), rows)}", end="")
    if not scale:
        rows = [{"table": name, "rows": rows} for name, rows in bench.rows.items()]
        rows = results.store(PAGE.with_suffix(".json"), rows, ("table",), **bench.versions)
        PAGE.write_text(quoted(PAGE.read_text("utf-8"), rows), "utf-8")


def quoted(page, rows):
    """Return the text of the page with these tables, and how they were measured."""
    page = results.quote(page, "machine", "\n".join([*results.measured(rows), ""]))
    for row in rows:
        if (name := row["table"]) not in PRINTED:
            page = results.quote(page, name, results.table(TABLES[name].split("|"), row["rows"]))
    return page


class Bench:
    """Each method measures one topic and adds rows to its tables."""

    def __init__(self, folder, sizes):
        self.folder, self.sizes = folder, sizes
        self.rows = {name: [] for name in TABLES}

    def size(self, name):
        return self.sizes[name][0]

    def measure(self):
        self.rendering()
        with started(PostgreSQL("max_connections=300")) as [database]:
            rivals = Rivals(self.folder, database.url)
            for broker in ("redis", "rabbitmq"):
                with started(BROKERS[broker](self.folder / broker)) as [server]:
                    urls = database.url, server.variables["CELERY_BROKER_URL"]
                    output = Output(self.folder, *urls, broker=broker)
                    self.speed(broker, output, rivals, database, server)
                    if broker == "redis":  # topics that do not depend on the broker
                        self.bulk(output, rivals)
                        self.database(output, database)
                        self.together(output, database, server)
                        self.limits(output, database, server)
                        self.waiting(output)
                        self.pages(output)
                        self.processes(output)
                        more = [Output(self.folder, *urls, worker_pool=pool) for pool in POOLS]
                        self.pools([output, *more])
                        self.others(output)
                    else:
                        self.versions = packages(output, rivals) | versions()
                    self.sweep(broker, output)
                    self.post(broker, output)  # last, because it leaves messages in a queue

    def goal(self, what, limit, measured, at_most=False):
        is_met = measured <= limit if at_most else measured >= limit
        sign, word = "≤" if at_most else "≥", "met" if is_met else "**missed**"
        limit, measured = (whole(x) if x >= 100 else f"{x:.3g}" for x in (limit, measured))
        self.rows["goals"].append([what, f"{sign} {limit}", measured, word])

    def rendering(self):
        """Compare this template with one that has only a README."""
        empty = self.folder / "empty"
        (empty / "{{cookiecutter.project_slug}}").mkdir(parents=True)
        (empty / "{{cookiecutter.project_slug}}/README.md").write_text("# Empty\n")
        (empty / "cookiecutter.json").write_text('{"project_slug": "my_project"}')
        taken = {empty: [], TEMPLATE: []}
        options = ["--default-config", "--no-input", "--overwrite-if-exists", "--output-dir"]
        for _ in range(self.size("renderings")):
            for template, seconds in taken.items():
                began = time.perf_counter()
                self.folder.run("cookiecutter", template, *options, self.folder / "rendered")
                seconds.append(time.perf_counter() - began)
        nothing, this = taken.values()
        rows = [["an empty one", f"{median(nothing):.2f}"], ["this one", f"{median(this):.2f}"]]
        self.rows["rendering"] = [*rows, ["ratio", f"{ratio(this, nothing):.1f}"]]

    def speed(self, broker, output, rivals, database, server):
        contestants = {
            "bare Celery": (bare(output), "plain"),
            "plain tasks": (output, "plain"),
            "jobs": (output, "job"),
            "Procrastinate": (rivals, "procrastinate"),
            "django-tasks-db": (rivals, "django-tasks"),
        }
        sent, bulk, done, one, costs = ({name: [] for name in contestants} for _ in range(5))
        parts = []
        for turn in range(self.size("turns")):
            for name, (contestant, kind) in contestants.items():
                if kind == "job":
                    parts.append(output.ask("ledger.parts", self.size("tasks")))
                path = contestant.folder / f"{broker}-{kind}{turn}.done"
                before = flushes(database)
                one_by_one, to_enqueue, _ = contestant.send(
                    kind, self.size("tasks"), path, in_bulk=False
                )
                sent[name].append(one_by_one)
                with contestant.working(kind, WORKER_CONCURRENCY=SLOTS) as worker:
                    used = self.used_by(contestant, path, worker, database, server)
                    contestant.ask("sending.wait_for_rows", kind)
                time.sleep(1)  # until PostgreSQL has counted the flushes of ended connections
                costs[name].append(
                    [*used, to_enqueue, (flushes(database) - before) / contestant.sent]
                )
                path = path.with_suffix(".more")
                *_, many = contestant.send(kind, self.size("tasks"), path)
                bulk[name] += [many] if many else []
                with contestant.working(kind, WORKER_CONCURRENCY=SLOTS):
                    done[name].append(contestant.done(path))
                    contestant.ask("sending.wait_for_rows", kind)
                    singles = self.size("polled" if kind == "django-tasks" else "singles")
                    one[name] += contestant.ask("sending.send_each", kind, singles, str(path))
                say(output, f"{name}: {sent[name][-1]:.0f} sent/s, {done[name][-1]:.0f} done/s")
        for name, (contestant, _) in contestants.items():
            if contestant is rivals and broker != "redis":
                continue  # they have no broker: one row is enough
            ms = [f"{figure * 1000:.1f}" for figure in (median(one[name]), slowest(one[name], 95))]
            many = whole(median(bulk[name])) if bulk[name] else "–"
            rates = whole(median(sent[name])), many, whole(median(done[name]))
            where = "–" if contestant is rivals else broker
            self.rows["speed"].append([where, name, *rates, *ms])
            cost = [median(figures) for figures in zip(*costs[name], strict=True)]
            self.rows["costs"].append([where, name, *(f"{figure:.2f}" for figure in cost)])
            if name == "jobs":
                *_, together, _, flushed = cost
                limit = 3.0 if broker == "rabbitmq" else 2.6
                self.goal(f"CPU-ms a job, {broker}", limit, together, at_most=True)
                self.goal(f"flushes a job, {broker}", 2.1, flushed, at_most=True)
        for place, means in enumerate(["bare SQL, kombu", "`create()`, `delay()`"]):
            insert, publish, both = zip(*(turn[place] for turn in parts), strict=True)
            of_both = ratio(sent["jobs"], both)
            rates = [whole(median(figures)) for figures in (insert, publish, both, sent["jobs"])]
            self.rows["parts"].append([broker, means, *rates, f"{of_both:.2f}"])
            self.goal(f"jobs / INSERT and publish ({means}), {broker}: sent", 0.8, of_both)
        of_bare = ratio(done["plain tasks"], done["bare Celery"])
        of_plain = ratio(done["jobs"], done["plain tasks"])
        self.goal(f"plain tasks / bare Celery, {broker}: done", 1, of_bare)
        self.goal(f"jobs / plain tasks, {broker}: done", 0.5, of_plain)
        many, theirs = median(bulk["jobs"]), median(bulk["Procrastinate"])
        self.goal(f"jobs sent in bulk a second, {broker}", min(3000, 0.35 * theirs), many)
        of_rival = ratio(done["jobs"], done["Procrastinate"])
        self.goal(f"jobs / Procrastinate, {broker}: done", 1.4, of_rival)
        of_rival = median(one["jobs"]) / median(one["Procrastinate"])
        what = f"jobs / Procrastinate, {broker}: median ms of one"
        self.goal(what, 1.15, of_rival, at_most=True)

    def bulk(self, output, rivals):
        """Store many tasks with one call, while a worker takes them."""
        count = self.size("bulk")
        contestants = {
            "jobs, without Beat": (output, "job"),
            "jobs": (output, "job"),
            "Procrastinate": (rivals, "procrastinate"),
        }
        taken = {name: [] for name in contestants}
        for turn in range(self.size("turns")):
            for name, (contestant, kind) in contestants.items():
                path = contestant.folder / f"bulk-{name.split()[-1]}-{turn}.done"
                with ExitStack() as stack:
                    if is_swept := name == "jobs":
                        stack.enter_context(output.beat())
                    stack.enter_context(contestant.working(kind, WORKER_CONCURRENCY=SLOTS))
                    call = kind, count, str(path), is_swept
                    began, seconds = contestant.ask("sending.send_many", *call)
                    lines = contestant.wait_for_lines(path, count)
                starts, ends = zip(*(map(float, line.split()) for line in lines), strict=True)
                first, last = 1000 * (min(starts) - began), max(ends) - began
                taken[name].append([count / seconds, first, last])
                say(output, f"{name}: {count / seconds:.0f} stored/s, done after {last:.1f} s")
        for name, turns in taken.items():
            stored, first, last = (median(figures) for figures in zip(*turns, strict=True))
            self.rows["bulk"].append([name, whole(stored), whole(first), f"{last:.1f}"])
            if name == "jobs":
                self.goal("jobs stored a second by one call", 4000, stored)

    def database(self, output, database):
        """Let pgbench store, start and end jobs, without Python, broker and worker."""
        script = output.folder / "job.sql"
        script.write_text(output.ask("ledger.statements"))
        for rows in self.sizes["rows"][::2]:
            output.ask("ledger.fill", rows)
            for clients in SIZES["clients"]:
                seconds = self.size("seconds") * 2
                url = output.environment["DATABASE_URL"].partition("?")[0]
                rate, cpu, synced, wal = pgbench(database, url, script, clients, seconds)
                figures = [whole(rate), f"{cpu:.2f}", whole(1000 / cpu)]
                figures += [f"{synced:.2f}", f"{wal / 1000:.2f}"]
                self.rows["database"].append([f"{rows:,}", str(clients), *figures])
                say(output, f"{rows} rows, {clients} clients: {figures}")

    def together(self, output, database, server):
        """Let tasks have a callback when all have ended."""
        url = server.variables["CELERY_BROKER_URL"]
        contestants = {"bare Celery": (bare(output, RESULTS=url), "plain"), "jobs": (output, "job")}
        sizes = {"alone": "together", "with a callback": "together"}
        pairs = [(shape, name) for shape in sizes for name in contestants]
        stored, done, costs, delays = ({pair: [] for pair in pairs} for _ in range(4))
        for turn in range(self.size("turns") - 1):
            for shape, name in pairs:
                contestant, kind = contestants[name]
                count = contestant.sent = self.size(sizes[shape])
                path = contestant.folder / f"{shape.replace(' ', '-')}-{kind}-{turn}.done"
                seconds = contestant.ask("together.store", kind, shape, count, str(path))
                stored[shape, name].append(count / seconds)
                with contestant.working(kind, WORKER_CONCURRENCY=SLOTS) as worker:
                    *_, cost = self.used_by(contestant, path, worker, database, server)
                    costs[shape, name].append(cost)
                    done[shape, name].append(contestant.done(path))
                    if shape == "with a callback":
                        [then] = contestant.wait_for_lines(path.with_suffix(".done.then"), 1)
                        ends = [float(line.split()[1]) for line in path.read_text().splitlines()]
                        delays[shape, name].append(1000 * (float(then.split()[0]) - max(ends)))
                say(output, f"{name}, {shape}: {done[shape, name][-1]:.0f} done/s, {cost:.2f} ms")
        for pair in pairs:
            rates = whole(median(stored[pair])), whole(median(done[pair]))
            shape, name = pair
            cost = f"{median(costs[pair]):.2f}"
            delay = whole(median(delays[pair])) if delays[pair] else "–"
            row = [name, f"{self.size(sizes[shape]):,}", shape, *rates, cost, delay]
            self.rows["together"].append(row)
        more = ratio(costs["with a callback", "jobs"], costs["alone", "jobs"])
        self.goal("CPU-ms of a job of a batch / alone", 1.25, more, at_most=True)

    def limits(self, output, database, server):
        """Run jobs in keys with a limit, and let the sweeper look at blocked jobs."""
        stored, done, costs = ({shape: [] for shape in LIMITS} for _ in range(3))
        gaps, count = [], self.size("limited")
        for turn in range(self.size("turns")):
            for shape in LIMITS:
                name = "-".join(map(str, ["limit", *shape, turn]))
                output.sent, path = count, output.folder / f"{name}.done"
                stored[shape].append(count / output.ask("limits.store", *shape, count, str(path)))
                # A call lets jobs of a hundred keys go, and Beat those of the others.
                with output.beat(), output.working("job", WORKER_CONCURRENCY=SLOTS) as worker:
                    *_, cost = self.used_by(output, path, worker, database, server)
                    costs[shape].append(cost)
                    done[shape].append(output.done(path))
                    output.ask("sending.wait_for_rows", "job")
                if shape == (1, 1):
                    gaps += output.ask("limits.gaps")
                say(output, f"{shape}: {done[shape][-1]:.0f} done/s, {cost:.2f} ms")
        for shape in LIMITS:
            at_once, keys = shape if shape[0] else ("no limit", "–")
            rates = whole(median(stored[shape])), whole(median(done[shape]))
            of_unlimited = ratio(done[shape], done[LIMITS[0]])
            row = [str(at_once), str(keys), *rates, f"{of_unlimited:.2f}"]
            ms = [median(gaps), slowest(gaps, 95)] if shape == (1, 1) else []
            ms = [f"{figure:.1f}" for figure in ms] or ["–", "–"]
            self.rows["limits"].append([*row, f"{median(costs[shape]):.2f}", *ms])
            if at_once == 5:
                what = f"jobs done with limits, keys: {keys} / without"
                self.goal(what, 0.5, of_unlimited)
        self.snapshot(output)
        count = self.size("blocked")
        for keys, by in {1: "a limit", 1000: "1,000 limits", 0: "a pause", -1: "a rate"}.items():
            ms = output.ask("limits.blocked", count, keys)
            self.rows["blocked"].append([f"{count:,}", by, f"{ms:.1f}"])
            self.goal(f"ms for {count:,} jobs blocked by {by}", 30, ms, at_most=True)

    def snapshot(self, output):
        """Run jobs of one key while a transaction keeps PostgreSQL from removing old row versions."""
        count, path = self.size("snapshot"), output.folder / "snapshot.done"
        output.sent = count
        output.ask("limits.store", 5, 1, count, str(path))
        url, _, _ = output.environment["DATABASE_URL"].partition("?")
        with psycopg.connect(url) as connection:
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            connection.execute("SELECT pg_export_snapshot()")
            with output.beat(), output.working("job", WORKER_CONCURRENCY=SLOTS):
                output.done(path)
                output.ask("sending.wait_for_rows", "job")
        ends = sorted(float(line.split()[1]) for line in path.read_text().splitlines())
        first, last = (some[-1] - some[0] for some in (ends[:1000], ends[-1000:]))
        rates = [len(ends[:1000]) / seconds for seconds in (first, last)]
        self.rows["snapshot"].append([f"{count:,}", *map(whole, rates)])
        self.goal("jobs with a limit beside a snapshot: last / first", 0.8, rates[1] / rates[0])

    def used_by(self, contestant, path, worker, database, server):
        """Return the CPU-ms of one task: worker's main process, children, PostgreSQL, broker, sum.

        Measured from when the worker has done the first task until it has done all that were sent.
        """
        readings = []
        for lines in (1, contestant.sent):
            count = len(contestant.wait_for_lines(path, lines))
            servers = [sum(cpu_ms(process.pid)) for process in (database, server)]
            readings.append([count, *cpu_ms(worker.pid), *servers])
        count, *used = (after - before for before, after in zip(*readings, strict=True))
        count = count or math.nan  # in a trial, all may have been done
        return [*(each / count for each in used), sum(used) / count]

    def waiting(self, output):
        sizes = [0, *self.sizes["waiting"]]
        claims, done = ({size: [] for size in sizes} for _ in range(2))
        for turn in range(self.size("turns")):
            for size in sizes:
                count = self.size("tasks")
                if size:
                    claims[size].append(output.ask("ledger.claims", size, min(count, size) // 2))
                else:
                    output.ask("sending.empty", "job")
                path = output.folder / f"waiting{size}-{turn}.done"
                output.send("job", count, path, fresh=False)
                with output.working("job", WORKER_CONCURRENCY=SLOTS):
                    done[size].append(output.done(path))
                say(output, f"{size} waiting: {done[size][-1]:.0f} done/s")
        for size in sizes:
            claimed = whole(median(claims[size])) if size else "–"
            self.rows["waiting"].append([f"{size:,}", claimed, whole(median(done[size]))])
        least, *_, most = sizes[1:]
        of_least = min(ratio(claims[size], claims[least]) for size in sizes[2:])
        self.goal(f"claims/s: slowest / with {least:,} waiting", 0.9, of_least)
        self.goal(f"jobs done with {most:,} others waiting / none", 0.9, ratio(done[most], done[0]))

    def sweep(self, broker, output):
        due, many = self.sizes["due"]
        for queues in [1, many] if broker == "redis" else [1]:
            sent = output.ask("ledger.sweep_due", due, queues)
            self.rows["sweep"].append([broker, f"{queues:,}", whole(sent)])
            if (broker, queues) == ("redis", 1):
                self.goal("jobs that the sweep sends a second, redis", 2000, sent)

    def pages(self, output):
        sizes = self.sizes["rows"]
        few, *_, many = taken = [output.ask("ledger.pages", size) for size in sizes]
        for size, (pages, purged) in zip(sizes, taken, strict=True):
            ms = [f"{page:.1f} ms" for page in pages]
            self.rows["rows"].append([f"{size:,}", *ms, whole(purged)])
        for name, first, last in zip(PAGES, few[0], many[0], strict=True):
            what = f"{name}, {sizes[-1]:,} jobs: ms"
            self.goal(what, max(15, 2 * first), last, at_most=True)

    def processes(self, output):
        rates = {processes: {"plain": [], "job": []} for processes in (1, 2, 4)}
        for turn in range(self.size("turns") // 2):
            for processes, kinds in rates.items():
                for kind, done in kinds.items():
                    path = output.folder / f"{kind}-{processes}-{turn}.done"
                    output.send(kind, self.size("tasks"), path)
                    with output.working(kind, WORKER_CONCURRENCY=processes):
                        done.append(output.done(path))
                    say(output, f"{processes} processes, {kind}: {done[-1]:.0f} done/s")
        for processes, kinds in rates.items():
            row = [str(processes), *(whole(median(done)) for done in kinds.values())]
            self.rows["processes"].append(row)

    def post(self, broker, output):
        """Let clients place order after order, with and without jobs."""
        token = output.shell(
            "from users.models import User\n"
            "from rest_framework.authtoken.models import Token\n"
            "print(Token.objects.create(user=User.objects.create_user('demo')))"
        )
        headers = {"Authorization": f"Token {token}", "Content-Type": "application/json"}
        headers |= {"X-Forwarded-Proto": "https"}
        order = json.dumps({"product": "Tea"})

        def place_orders(port, path, until):
            client, taken = http.client.HTTPConnection("127.0.0.1", port, timeout=120), []
            while (began := time.perf_counter()) < until:
                client.request("POST", path, order, headers)
                answer = client.getresponse()
                text = answer.read()
                taken.append(time.perf_counter() - began)
                assert answer.status in (201, 202), text
            return taken

        def from_all(port, path, seconds):
            until = time.perf_counter() + seconds
            runs = [clients.submit(place_orders, port, path, until) for _ in range(CLIENTS)]
            return [each for run in runs for each in run.result()]

        paths = {"jobs": "/api/orders/", "without": "/plain/orders/"}
        taken, rates = ({name: [] for name in paths} for _ in range(2))
        with output.web() as (_, port), ThreadPoolExecutor(CLIENTS) as clients:
            for path in paths.values():
                from_all(port, path, 1)  # a warm-up
            for _ in range(self.size("turns")):
                for name, path in paths.items():
                    seconds = self.size("seconds")
                    answers = from_all(port, path, seconds)
                    taken[name] += answers
                    rates[name].append(len(answers) / seconds)
        for name in paths:
            ms = [median(taken[name]) * 1000, slowest(taken[name], 99) * 1000]
            row = [broker, name, whole(median(rates[name])), *(f"{figure:.1f}" for figure in ms)]
            self.rows["post"].append(row)
            say(output, f"POST, {name}: {row[2]}/s")
        slow, of_plain = slowest(taken["jobs"], 99), ratio(rates["jobs"], rates["without"])
        of_slow = slow / slowest(taken["without"], 99)
        self.goal(f"POST → 202, {broker}: p99 in ms", 30, slow * 1000, at_most=True)
        self.goal(f"POST → 202 / without jobs, {broker}: rate", 0.85, of_plain)
        self.goal(f"POST → 202 / without jobs, {broker}: p99", 1.3, of_slow, at_most=True)

    def pools(self, outputs):
        """Measure the speed of each pool and the memory of its workers."""
        for work, arguments in {"computes": (0, LOOP), "waits 1 s": (1, 0)}.items():
            for output in outputs:
                pool = output.answers.get("worker_pool", "prefork")
                slots = "settings.CELERY_WORKER_CONCURRENCY or os.cpu_count()"
                slots = output.shell(f"print({slots})")
                count, rates = self.size(work) * int(slots), {}
                if work == "computes":
                    count = min(count, 200)
                for kind in ("plain", "job"):
                    path = output.folder / f"{kind}-{work[0]}.done"
                    output.send(kind, count, path, *arguments, in_bulk=False)
                    with output.working(kind) as process:
                        rates[kind] = output.done(path)
                        if (work, kind) == ("waits 1 s", "job"):
                            self.memory(f"worker, {pool}", output.memory(process))
                say(
                    output, f"{work}: {rates['plain']:.1f} plain tasks/s, {rates['job']:.1f} jobs/s"
                )
                measured = (f"{rate:.1f}" for rate in rates.values())
                self.rows["pools"].append([pool, slots, work, str(count), *measured])

    def others(self, output):
        """Measure the memory of the other processes after some work."""
        procfile = output.folder.read("Procfile.dev")
        commands = dict(re.findall("^(beat|flower): .*(celery .+)$", procfile, re.M))
        path = output.folder / "others.done"
        with ExitStack() as stack:
            web, port = stack.enter_context(output.web())
            stack.enter_context(output.working("job"))
            beat, flower = (
                stack.enter_context(output.running(commands[p])) for p in sorted(commands)
            )
            output.send("job", 100, path, in_bulk=False)
            output.done(path)
            for _ in range(100):
                client = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
                client.request("GET", "/login/", headers={"X-Forwarded-Proto": "https"})
                client.getresponse().read()
            for name, process in {"gunicorn": web, "Beat": beat, "Flower": flower}.items():
                self.memory(name, output.memory(process))

    def memory(self, name, used):
        """Add a row for a process and one for its children."""
        main, *children = used
        self.rows["memory"].append([name, *map(whole, main)])
        if children:
            each = [whole(median(kind)) for kind in zip(*children, strict=True)]
            self.rows["memory"].append([f"{name}, each of {len(children)} children", *each])


def packages(*contestants):
    """Return the versions of what these have installed."""
    freeze = "uv", "pip", "freeze", "--python", ".venv/bin/python"
    found = "\n".join(each.folder.call(*freeze) for each in contestants)
    names = "celery|kombu|redis|django|django-tasks-db|procrastinate"
    return dict(re.findall(f"^({names})==(.+)$", found, re.M | re.I))


def ratio(ours, theirs):
    """Return the median of the ratios of each turn."""
    return median(our / their for our, their in zip(ours, theirs, strict=True))


def slowest(taken, percent):
    """Return the time within which this percentage was done."""
    return sorted(taken)[math.ceil(len(taken) * percent / 100) - 1]


def whole(figure):
    return f"{figure:.0f}"


def say(output, text):
    print(f"{output.folder.name}: {text}", flush=True)


if __name__ == "__main__":
    main()
