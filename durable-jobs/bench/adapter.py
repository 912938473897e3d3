"""durable-jobs for the harness hardbyte/postgresql-job-queue-benchmarking: see its CONTRIBUTING_ADAPTERS.md.

One process: a worker with threads, a thread that enqueues what the harness asks for, and one that
prints what has happened. Beat is its child, and dies with it.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from datetime import UTC, datetime
from urllib.parse import urlsplit

import django
from django.conf import settings

from durable_jobs.celery import Celery

url = urlsplit(os.environ["DATABASE_URL"])
DATABASE = {"ENGINE": "django.db.backends.postgresql", "NAME": url.path[1:], "CONN_MAX_AGE": None}
DATABASE |= {"USER": url.username, "PASSWORD": url.password, "HOST": url.hostname, "PORT": url.port}
SAMPLE, WORK = int(os.environ["SAMPLE_EVERY_S"]), int(os.environ["JOB_WORK_MS"]) / 1000
NAME, TABLE = "durable-jobs", "public.durable_jobs_job"
WHO = {"system": NAME, "instance_id": int(os.environ["BENCH_INSTANCE_ID"])}

settings.configure(
    DATABASES={"default": DATABASE},
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "durable_jobs"],
    USE_TZ=True,
    CELERY_BROKER_URL=os.environ.get("CELERY_BROKER_URL", "redis://127.0.0.1:6379/0"),
    CELERY_TASK_TIME_LIMIT=600,
    CELERY_WORKER_REDIRECT_STDOUTS=False,  # the harness reads them
)
app = Celery(NAME)
app.config_from_object(settings, namespace="CELERY")
django.setup()

from django.core.management import call_command  # noqa: E402
from django.db import close_old_connections  # noqa: E402

from durable_jobs.enqueue import enqueue_many  # noqa: E402
from durable_jobs.models import Job  # noqa: E402
from durable_jobs.tasks import job  # noqa: E402

started = deque(maxlen=100_000)  # (when, ms since it was enqueued)
counts = {"enqueue_rate": 0, "completion_rate": 0}


@job(name="adapter.work")
def work(self, enqueued):
    started.append((time.time(), 1000 * (time.time() - enqueued)))
    time.sleep(WORK)
    counts["completion_rate"] += 1


def enqueue():
    """Enqueue what the harness asks for: lines such as ENQUEUE 20."""
    for line in sys.stdin:
        try:
            close_old_connections()
            enqueue_many([work.s(time.time())] * int(line.split()[1]))
            counts["enqueue_rate"] += int(line.split()[1])
        except Exception as error:
            print(f"not enqueued: {error}", file=sys.stderr)


def sample():
    """Print each metric of the last seconds, at the same time as other replicas."""
    before = dict(counts)
    while True:
        time.sleep(SAMPLE - time.time() % SAMPLE)
        now = dict(counts)
        found = {each: (now[each] - before[each]) / SAMPLE for each in counts}
        before = now
        recent = sorted(ms for at, ms in started if at > time.time() - 30)
        for percent in 50, 95, 99:
            found[f"claim_p{percent}_ms"] = recent[len(recent) * percent // 100] if recent else 0
        if WHO["instance_id"] == 0:
            try:
                close_old_connections()
                found["queue_depth"] = Job.objects.filter(state="queued").count()
            except Exception as error:
                print(f"not counted: {error}", file=sys.stderr)
        for metric, value in found.items():
            record = {"t": iso(), "kind": "adapter", "subject_kind": "adapter", "subject": ""}
            seconds = 30 if "claim" in metric else SAMPLE
            emit(**record, metric=metric, value=value, window_s=seconds)


def emit(**record):
    print(json.dumps(record | WHO), flush=True)


def iso():
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def main():
    call_command("migrate", verbosity=0)
    prctl = ctypes.CDLL(None).prctl
    beat = f"{sys.executable} -m celery -A adapter beat --schedule /tmp/beat-{os.getpid()}"
    subprocess.Popen(
        beat.split(),
        cwd=os.path.dirname(__file__),
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        preexec_fn=lambda: prctl(1, signal.SIGKILL),  # PR_SET_PDEATHSIG
    )
    emit(kind="descriptor", event_tables=[TABLE], extensions=[], db_name=DATABASE["NAME"])
    for each in enqueue, sample:
        threading.Thread(target=each, daemon=True).start()
    slots = int(os.environ["WORKER_COUNT"])
    app.Worker(pool="threads", concurrency=slots, loglevel="WARNING").start()


if __name__ == "__main__":
    main()
