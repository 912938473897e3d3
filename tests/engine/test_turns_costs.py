"""What limits and pauses cost: queries, and plans with 100,000 held jobs."""

import re

import pytest
from django.db import connection
from django.utils import timezone
from test_costs import queries
from test_jobs import CLAIM
from test_limits import alone, ask, call, free, sent, start  # noqa: F401  sent is a fixture

from jobs import turns
from jobs.models import Job
from jobs.runs import Run

pytestmark = pytest.mark.django_db

MANY = 5_000  # held jobs; 100,000 have the same plans


@pytest.fixture(params=[1, 1000], ids=["1 key", "1000 keys"])
def held(request, settings):
    """Thousands of held jobs."""
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    now = timezone.now()
    fields = {"task": call.name, "queue": "celery", "created_at": now, "due_at": now}
    # Other keys in each test: index entries of rows that were rolled back are still read.
    keys = [f"tenant:{request.param}-{n % request.param}" for n in range(MANY)]
    store_held(fields, keys)
    return keys[0]


def store_held(fields, keys):
    jobs = (Job(**fields, state="queued", limit_key=key, held_by=key) for key in keys)
    Job.objects.bulk_create(jobs, batch_size=2000)


@pytest.fixture
def key(held):
    connection.cursor().execute("ANALYZE jobs_job")
    return held


def kinds(statements):
    """Return the first word of each statement, without those of transactions."""
    words = [sql.split()[0] for sql in statements]
    return [word for word in words if word not in ("SAVEPOINT", "RELEASE", "BEGIN", "COMMIT")]


def test_a_job_without_a_limit_reads_no_table_of_limits(sent, commit):  # noqa: F811
    with commit():
        [insert] = queries(free.enqueue)
    job = Job.objects.get()
    run = Run(job.pk, task=free, **CLAIM)
    [claim] = queries(run.claim)
    with run:
        [end] = queries(run.succeed, 1)
    assert "jobs_start" not in insert + claim + end


def test_the_queries_of_a_job_with_a_limit(sent, commit):  # noqa: F811
    first, second, _ = Job.objects.enqueue_many(alone, [[1], [2], [3]])
    # A look without the lock, the lock, a look with it, take(). In eager mode it looks once more.
    lock = ["SELECT"] * (connection.vendor == "postgresql")
    assert kinds(queries(turns.grant, ["one"])) == ["SELECT", *lock, "SELECT", "UPDATE", "SELECT"]
    assert kinds(queries(turns.grant, ["one"])) == ["SELECT"]  # there is no place
    run = Run(first.pk, task=alone, limit_key="one", **CLAIM)
    assert kinds(queries(run.claim)) == ["UPDATE"]

    def end():
        with run:
            run.succeed(1)

    assert kinds(queries(end)) == ["UPDATE", "UPDATE"]
    assert sent == [first.pk, second.pk]


def test_a_start_with_a_rate_costs_one_more_query(sent, commit):  # noqa: F811
    with commit():
        job = ask.enqueue()
    run = Run(job.pk, task=ask, limit_key="api", **CLAIM)
    assert kinds(queries(run.claim)) == ["UPDATE", "INSERT"]


def test_take_reads_only_the_jobs_that_it_takes(key):
    """No node of the plan reads more rows."""
    [take] = queries(turns.take, key, 1, 2)
    assert rows_read(take) <= 20, explain(take)


def test_a_look_for_places_reads_only_jobs_with_a_place(key):
    statements = queries(turns.free_places, [key, "one"])
    assert max(map(rows_read, statements)) <= 20


def rows_read(sql):
    """Return the highest number of rows that a node of the plan read or removed."""
    plan = explain(sql)
    counts = re.findall(r"rows=(\d+)\S* loops=(\d+)", plan)
    nodes = [int(rows) * int(loops) for rows, loops in counts]
    removed = [int(rows) for rows in re.findall(r"Rows Removed by \w+: (\d+)", plan)]
    assert "Seq Scan on jobs_job" not in plan, plan
    return max([*nodes, *removed])


def explain(sql):
    with connection.cursor() as cursor:
        cursor.execute("SAVEPOINT explained")
        cursor.execute(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
        cursor.execute("ROLLBACK TO SAVEPOINT explained")
    return plan
