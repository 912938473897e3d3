"""What jobs cost: a fixed number of queries, which read no backlog on PostgreSQL."""

import re
import statistics
import uuid
from datetime import timedelta

import pytest
from django.db import connection, transaction
from django.db.models.sql import InsertQuery
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from helpers import (
    act,
    add,
    alone,
    ask,
    call,
    claim,
    explain,
    free,
    kinds,
    multiply,
    queries,
    rows_read,
    run_of,
)

from durable_jobs import admission, batches, publish, transitions
from durable_jobs.actions import cancel
from durable_jobs.contrib.prometheus import Collector
from durable_jobs.database import IDLE_TIMEOUT, LOCK_TIMEOUT, Now, limit_locks
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.models import Job
from durable_jobs.worker import runs

pytestmark = pytest.mark.django_db


def names_of(sql):
    """Return the tables and columns in a statement, in order."""
    return re.findall(r"\b[a-z]+_[a-z_]+\b", re.sub("'.*?'", "", sql))


MANY = 5_000  # blocked jobs; 100,000 have the same plans


@pytest.fixture(params=[1, 1000], ids=["1 key", "1000 keys"])
def blocked(request, settings):
    """Thousands of blocked jobs."""
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    now = timezone.now()
    fields = {"task": call.name, "queue": "celery", "created_at": now, "due_at": now}
    # Other keys in each test: index entries of rows that were rolled back are still read.
    first = f"tenant:{request.param}-"
    job = Job.objects.create(**fields, limit_key=f"{first}0", blocked_by=f"{first}0")
    key = f"'{first}' || n %% {request.param}"
    multiply(job, MANY, limit_key=key, blocked_by=key)
    return job.limit_key


@pytest.fixture
def key(blocked):
    connection.cursor().execute("ANALYZE durable_jobs_job")
    return blocked


# Queries


def test_a_job_that_succeeds_at_once_needs_two_statements():
    job = enqueue(add, [1, 2])
    with CaptureQueriesContext(connection) as captured:
        publish.publish([job])
    assert len(captured) == 2
    job.refresh_from_db()
    assert job.state == "succeeded" and not job.failures.exists()


def test_the_sql_of_an_insert_is_built_once(monkeypatch):
    enqueue(add, [1, 2])
    monkeypatch.setattr(InsertQuery, "get_compiler", None)
    enqueue(add, [1, 2], label="another", countdown=5)
    assert Job.objects.filter(label="another").exists()


def test_a_job_that_uses_no_cursor_makes_no_query_for_it():
    act.function = lambda task: task.report(1, 2)
    job = enqueue(act)
    with CaptureQueriesContext(connection) as captured:
        publish.publish([job])
    assert not [query for query in captured if query["sql"].startswith("SELECT")]


def test_a_job_without_a_batch_is_stored_claimed_and_ended_with_one_query_each():
    [insert] = queries(enqueue, add, [1, 2])
    assert insert.startswith("INSERT ") and " INTO durable_jobs_job " in insert
    claim, succeed = queries(publish.publish, [Job.objects.get()])
    assert claim.startswith("UPDATE durable_jobs_job SET state = 'running'")
    assert succeed.startswith("UPDATE durable_jobs_job SET state = 'succeeded'")
    assert "batch" not in claim + succeed


def test_a_member_of_a_batch_costs_one_more_query():
    alone = enqueue(add, [1, 2])
    batch = batches.enqueue([add.s(1, 2), add.s(3, 4)])
    claim, succeed, ask = queries(publish.publish, [batch.jobs.first()])
    same = queries(publish.publish, [alone])
    assert list(map(names_of, same)) == [names_of(claim), names_of(succeed)]
    assert ask.startswith("SELECT durable_jobs_job.id") and ask.endswith(" LIMIT 1")


def test_a_batch_is_stored_with_two_more_queries_however_many_jobs_it_has():
    def count(function, *args):
        return len([sql for sql in queries(function, *args) if not re.match("SAVE|RELEASE", sql)])

    for size in 10, 400:
        calls = [add.s(1, 2)] * size
        many = count(enqueue_many, calls)
        # The batch is stored, locked, asked at the end of the block, and read.
        assert count(batches.enqueue, calls) == many + 4


def test_a_job_without_a_limit_reads_no_table_of_limits(sent, commit):
    with commit():
        [insert] = queries(free.enqueue)
    job = Job.objects.get()
    run = run_of(job)
    [claim] = queries(run.claim)
    with run:
        [end] = queries(run.succeed, 1)
    assert "durable_jobs_key" not in insert + claim + end


def test_the_queries_of_a_job_with_a_limit(sent, commit):
    first, second, _ = enqueue_many([alone.s(1), alone.s(2), alone.s(3)])
    # A look, the row of the key, its lock, a look with it, unblock().
    expected = ["SELECT", "INSERT", "SELECT", "SELECT", "SELECT", "UPDATE"]
    assert kinds(queries(admission.admit, ["one"])) == expected
    assert kinds(queries(admission.admit, ["one"])) == ["SELECT"]  # no slot is free
    run = run_of(first)
    assert kinds(queries(run.claim)) == ["UPDATE"]

    def end():
        with run:
            run.succeed(1)

    assert kinds(queries(end)) == ["UPDATE", "SELECT", "UPDATE"]
    assert sent == [first.pk, second.pk]


def test_a_start_with_a_rate_costs_one_more_query(sent, commit):
    for expected in [["UPDATE", "UPDATE", "INSERT", "UPDATE"], ["UPDATE", "UPDATE"]]:
        job = ask.enqueue()
        Job.objects.filter(pk=job.pk).update(blocked_by=None, send_at=Now())
        run = run_of(job)
        assert kinds(queries(run.claim)) == expected


def test_timeouts_can_be_left_out(settings):
    """RDS Proxy reserves a connection for a client that sets one."""

    def statements():
        rows = Job.objects.filter(LOCK_TIMEOUT, IDLE_TIMEOUT)
        return " ".join([*queries(limit_locks), *queries(rows.exists)]).upper()

    sets_them = re.search("SET LOCAL|SET_CONFIG", statements())
    assert bool(sets_them) == (connection.vendor == "postgresql")
    settings.DURABLE_JOBS = settings.DURABLE_JOBS | {"SET_CONFIG": False}
    assert not re.search("SET LOCAL|SET_CONFIG", statements())


# Plans of PostgreSQL, with many jobs


def scanned(sql):
    """Return the indexes, or the table, that PostgreSQL reads for a statement."""
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN {sql}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
    return set(re.findall(r"(?:Seq Scan|Index Scan) (?:using|on) (\w+)", plan))


@pytest.fixture
def by_key(backlog):
    """A function that does an UPDATE, and fails unless PostgreSQL finds the rows by primary key."""

    def check(update, *args, **kwargs):
        with CaptureQueriesContext(connection) as captured:
            assert update(*args, **kwargs)
        [sql] = [query["sql"] for query in captured if query["sql"].startswith("UPDATE")]
        assert scanned(sql) - {"durable_jobs_pause"} == {"durable_jobs_job_pkey"}

    return check


def kept_plans():
    with connection.cursor() as cursor:
        cursor.execute("SELECT statement FROM pg_prepared_statements ORDER BY prepare_time")
        return [sql for [sql] in cursor.fetchall()]


def start_and_end_a_job():
    job, token = enqueue(add, [1, 2]), uuid.uuid4()
    assert claim(job.pk, token)
    assert transitions.succeed(id=job.pk, run_token=token, result=3, message="")


@pytest.mark.django_db(transaction=True)  # it closes its connection
@pytest.mark.parametrize("options", [{}, {"prepare_threshold": 0}])
def test_postgresql_keeps_the_plans_of_what_each_job_needs(options, monkeypatch, published):
    """Only if the project says so: behind a pooler, each transaction may have another connection."""
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL keeps plans: set DATABASE_URL=postgres://…")
    connection.close()  # other tests may have left plans
    monkeypatch.setitem(connection.settings_dict, "OPTIONS", options)
    for _ in range(3):
        start_and_end_a_job()
    assert kinds(kept_plans()) == (["INSERT", "UPDATE", "UPDATE"] if options else [])
    connection.close()


def test_an_update_of_a_job_reads_no_backlog(by_key):
    jobs = [enqueue(add, [1, 2]) for _ in range(3)]
    first, *others = three = [run_of(job) for job in jobs]
    for run in three:
        by_key(claim, run.job_id, run.token)
    by_key(transitions.renew, runs.jobs_of(three))
    by_key(transitions.report, first.row, cursor=7)
    end = {"id": first.job_id, "run_token": first.token, "result": 7, "message": ""}
    by_key(transitions.succeed, **end)
    by_key(transitions.release, others[0].row)
    by_key(cancel, Job.objects.filter(pk=jobs[1].pk))
    by_key(transitions.release, runs.jobs_of(others))


def test_the_job_of_a_unique_key_is_found_by_its_index(backlog):
    job = enqueue(add, [1, 2], unique="key")
    with CaptureQueriesContext(connection) as captured:
        assert enqueue(add, [1, 2], unique="key") == job
    assert [scanned(query["sql"]) for query in captured] == [{"durable_jobs_job_unique_key"}]


def test_an_end_reads_no_backlog(backlog):
    batch = batches.enqueue([add.s(1, 2)] * 3000)
    oldest = batch.jobs.order_by("created_at").first()
    cancel(batch.jobs.exclude(pk=oldest.pk))
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")
    [sql] = queries(lambda: batches.is_active(batch=batch.pk))
    assert scanned(sql) == {"durable_jobs_job_batch_active"}
    [sql] = queries(batches.end_all)
    assert "durable_jobs_job" not in scanned(sql) and "durable_jobs_job_batch_active" in scanned(
        sql
    )


def test_unblock_reads_only_the_job_that_it_unblocks(key):
    """No node of the plan reads more rows."""

    def hand_over_twice(key):
        """The second time, it looks from the first one's job."""
        assert admission.hand_over(key) and admission.hand_over(key)

    for statement in queries(hand_over_twice, key):
        assert rows_read(statement) <= 20, explain(statement)


@pytest.mark.django_db(transaction=True)
def test_a_slot_is_handed_over_beside_a_long_transaction(snapshot):
    """Mostly, that reads none of the old row versions, which PostgreSQL can't remove then."""
    now = timezone.now()
    fields = {"task": alone.name, "queue": "celery", "due_at": now, "limit_key": "one"}
    running = Job.objects.create(**fields, created_at=now, send_at=now)
    first = Job.objects.create(**fields, created_at=now, blocked_by="one")
    multiply(first, 300, created_at="created_at + n * INTERVAL '1 second'")
    read = []
    while running:
        with transaction.atomic():
            before = entries_read()
            cancel(Job.objects.filter(pk=running.pk))
            [running] = admission.hand_over("one") or [None]
            read.append(entries_read() - before)
    assert len(read) == 302 and statistics.median(read) <= 20


@pytest.fixture
def snapshot():
    """A transaction that sees the rows as they are now."""
    if connection.vendor != "postgresql":
        pytest.skip(
            "only PostgreSQL keeps old versions in its indexes: set DATABASE_URL=postgres://…"
        )
    with connection.copy().cursor() as cursor:
        cursor.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        cursor.execute("SELECT 1 FROM durable_jobs_job LIMIT 1")
        yield
        cursor.execute("ROLLBACK")
        cursor.connection.close()


def entries_read():
    """Return how many entries of indexes, dead ones included, this transaction has read."""
    names = ["durable_jobs_job_blocked", "durable_jobs_job_slot"]
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT SUM(pg_stat_get_xact_tuples_returned(name::regclass)) FROM UNNEST(%s::text[]) AS name",
            [names],
        )
        return cursor.fetchone()[0]


def test_a_round_of_the_sweeper_reads_the_oldest_job_of_each_key(key, published):
    """A rate has rounds every few milliseconds, whatever waits."""
    keys = Job.objects.filter(blocked_by__isnull=False).values("blocked_by").distinct().count()
    [sql] = queries(admission.look_at_keys, Job.objects.all())
    assert rows_read(sql) <= keys + 2


def test_a_look_for_free_slots_reads_only_jobs_with_a_slot(key):
    statements = queries(admission.free_slots, [key, "one"])
    assert max(map(rows_read, statements)) <= 20


@pytest.mark.django_db(transaction=True)  # VACUUM cannot run in a transaction
def test_a_scrape_scans_no_table():
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    now = timezone.now()
    fields = {"task": add.name, "queue": "celery", "created_at": now}
    final = {"state": "succeeded", "finished_at": now - timedelta(hours=1)}
    with connection.cursor() as cursor:
        cursor.execute(
            "TRUNCATE durable_jobs_job CASCADE"
        )  # and what other tests left in its indexes
        multiply(Job.objects.create(**fields, **final), 5000)
        multiply(Job.objects.create(**fields, due_at=now, send_at=now), 50)
        cursor.execute("VACUUM ANALYZE durable_jobs_job")
        with CaptureQueriesContext(connection) as captured:
            list(Collector().collect())
        scans = [
            "Index Only Scan using durable_jobs_job_queued",
            "Index Only Scan using durable_jobs_job_leased",
            "Index Only Scan using durable_jobs_job_blocked",
        ]
        scans += [
            "Index Scan using durable_jobs_job_finished"
        ] * 3  # what ended in the last minutes
        queries = [
            query for query in captured.captured_queries if "durable_jobs_job" in query["sql"]
        ]
        for query, scan in zip(queries, scans, strict=True):
            cursor.execute(f"EXPLAIN {query['sql']}")
            plan = "\n".join(line for (line,) in cursor.fetchall())
            assert scan in plan and "Seq Scan" not in plan, plan


def test_autovacuum_starts_at_two_percent_of_dead_rows():
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL has autovacuum: set DATABASE_URL=postgres://…")
    with connection.cursor() as cursor:
        cursor.execute("SELECT reloptions FROM pg_class WHERE relname = 'durable_jobs_job'")
        [[options]] = cursor.fetchall()
    assert "autovacuum_vacuum_scale_factor=0.02" in options
