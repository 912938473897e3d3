"""The metrics of recently ended jobs: read from their rows, whatever else is in the table."""

import pytest
from django.db import connection
from django.db.models import F
from helpers import ago, explain, greet, queries, rows_read, scrape

from durable_jobs.models import Job
from durable_jobs.statistics import by_task, p95

pytestmark = pytest.mark.django_db


def end(at=10, state="succeeded", ran=4, waited=3, **changes):
    """Store a job that ended `at` seconds ago."""
    times = {"finished_at": ago(at), "started_at": ago(at + ran), "due_at": ago(at + ran + waited)}
    fields = {"task": greet.name, "queue": "celery", "state": state, **times, **changes}
    return Job.objects.create(**fields)


def test_the_metrics_of_jobs_that_ended_in_the_last_minutes(staff_api):
    end(retries=2)
    end(ran=20, waited=1, queue="io")
    end(state="failed", crashes=3, task="other")
    end(state="failed", started_at=None, task="refused")
    end(state="cancelled", ran=9999)
    end(at=301, crashes=1)
    found = {name: value for name, value in scrape(staff_api).items() if "beat" not in name}
    found.pop("durable_jobs_sweep_age_seconds")
    assert found == {
        f"durable_jobs_ended succeeded {greet.name}": 2,
        f"durable_jobs_ended cancelled {greet.name}": 1,
        "durable_jobs_ended failed other": 1,
        "durable_jobs_ended failed refused": 1,
        "durable_jobs_crashes failed other": 3,
        f"durable_jobs_retries succeeded {greet.name}": 2,
        f"durable_jobs_run_p95_seconds {greet.name}": pytest.approx(20, abs=0.01),
        "durable_jobs_run_p95_seconds other": pytest.approx(4, abs=0.01),
        "durable_jobs_wait_p95_seconds celery": pytest.approx(3, abs=0.01),
        "durable_jobs_wait_p95_seconds io": pytest.approx(1, abs=0.01),
    }


@pytest.mark.parametrize("jobs, expected", [(1, 1), (19, 19), (20, 19), (100, 95)])
def test_19_of_20_jobs_are_not_above_the_p95(staff_api, jobs, expected):
    for seconds in range(jobs):
        end(ran=1 + seconds)
    found = scrape(staff_api)[f"durable_jobs_run_p95_seconds {greet.name}"]
    assert found == pytest.approx(expected, abs=0.01)


def test_a_scrape_reads_only_jobs_that_ended_recently(backlog):
    """The other ended jobs of the backlog are made older than that."""
    Job.objects.filter(finished_at__isnull=False).update(finished_at=ago(3600))
    for _ in range(3):
        end()
    with connection.cursor() as cursor:
        cursor.execute("ANALYZE durable_jobs_job")
    ran = F("finished_at") - F("started_at")
    [counts] = queries(lambda: list(by_task()))
    [slowest] = queries(lambda: list(p95("p95", "task", ran)))
    for sql in counts, slowest:
        assert "durable_jobs_job_finished" in explain(sql) and rows_read(sql) <= 3, explain(sql)
