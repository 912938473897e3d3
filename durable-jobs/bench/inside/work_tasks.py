"""The work as a plain task of Celery, and as a job."""

import os

from celery import shared_task
from work import work

plain = shared_task(name="work.plain")(work)
if os.environ.get("DJANGO_SETTINGS_MODULE"):  # bare Celery has no jobs
    from durable_jobs.tasks import JobTask

    job = shared_task(name="work.job", base=JobTask)(work)

    def with_key(path, key):
        work(path)

    keyed = shared_task(name="work.keyed", base=JobTask)(with_key)
    five = shared_task(name="work.five", base=JobTask, limit=lambda key, **_: f"five:{key}")(
        with_key
    )
    one = shared_task(name="work.one", base=JobTask, limit=lambda key, **_: f"one:{key}")(with_key)
