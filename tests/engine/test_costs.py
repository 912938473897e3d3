"""A member of a batch costs one query, and a job without a batch none. Plans of these queries."""

import re

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from test_jobs import add, backlog, scanned  # noqa: F401  a fixture

from jobs import batches, publish
from jobs.models import Batch, Job

pytestmark = pytest.mark.django_db


def queries(function, *args):
    """Return the SQL of each query, without quotes."""
    with CaptureQueriesContext(connection) as captured:
        function(*args)
    return [query["sql"].replace('"', "") for query in captured]


def names_of(sql):
    """Return the tables and columns in a statement, in order."""
    return re.findall(r"\b[a-z]+_[a-z_]+\b", re.sub("'.*?'", "", sql))


def test_a_job_without_a_batch_is_stored_claimed_and_ended_with_one_query_each():
    insert = queries(Job.objects.enqueue, add, [1, 2])
    assert [sql.split()[:3] for sql in insert] == [["INSERT", "INTO", "jobs_job"]]
    claim, succeed = queries(publish.publish, [Job.objects.get()])
    assert claim.startswith("UPDATE jobs_job SET state = 'running'")
    assert succeed.startswith("UPDATE jobs_job SET state = 'succeeded'")
    assert "batch" not in claim + succeed


def test_a_member_of_a_batch_costs_one_more_query():
    alone = Job.objects.enqueue(add, [1, 2])
    batch = Batch.objects.enqueue(add, [[1, 2], [3, 4]])
    claim, succeed, ask = queries(publish.publish, [batch.jobs.first()])
    same = queries(publish.publish, [alone])
    assert list(map(names_of, same)) == [names_of(claim), names_of(succeed)]
    assert ask.startswith("SELECT jobs_job.id") and ask.endswith(" LIMIT 1")


def test_a_batch_is_stored_with_two_more_queries_however_many_jobs_it_has():
    def count(function, *args):
        return len([sql for sql in queries(function, *args) if not re.match("SAVE|RELEASE", sql)])

    for size in 10, 400:
        calls = [[1, 2]] * size
        many = count(Job.objects.enqueue_many, add, calls)
        # The batch is stored, locked, asked at the end of the block, and read.
        assert count(Batch.objects.enqueue, add, calls) == many + 4


def test_an_end_reads_no_backlog(backlog):  # noqa: F811
    batch = Batch.objects.enqueue(add, [[1, 2]] * 3000)
    oldest = batch.jobs.order_by("created_at").first()
    batch.jobs.exclude(pk=oldest.pk).cancel()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE jobs_job")
    [sql] = queries(batches.is_active, batch.pk)
    assert scanned(sql) == {"job_batch_active"}
    [sql] = queries(batches.end_all)
    assert "jobs_job" not in scanned(sql) and "job_batch_active" in scanned(sql)
