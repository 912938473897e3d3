"""The work as a plain task of Celery, and as a job."""

from contextlib import suppress

from celery import shared_task

from work import work

plain = shared_task(name="work.plain")(work)
with suppress(ImportError):  # bare Celery has no jobs
    from jobs.tasks import JobTask

    job = shared_task(name="work.job", base=JobTask)(work)
