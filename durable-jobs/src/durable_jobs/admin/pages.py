"""What the admin's pages "Queues" and "Workers" show: queues, limited keys, pauses, and workers."""

from collections import Counter, defaultdict
from datetime import timedelta
from urllib.parse import urlencode

from django.contrib.admin.models import LogEntry
from django.db.models import Count, F, Min, Q
from django.db.models.functions import Now
from django.utils import timezone
from django.utils.timesince import timesince

from durable_jobs import conf
from durable_jobs.admission import with_slot
from durable_jobs.diagnosis import problems, span
from durable_jobs.limits import name_of
from durable_jobs.messages import known_names
from durable_jobs.models import Job, Pause, Worker
from durable_jobs.states import RUNNING, STALLED
from durable_jobs.statistics import by_queue
from durable_jobs.worker.heartbeat import STALE_SECONDS

MOST_KEYS = 200
MOST_ENTRIES = 10  # of the log
MOST_RUNNING = 1000  # jobs of all workers together
MOST_SHOWN = 5  # jobs of a worker
COUNTS = {  # {filter of the list of jobs: the metric}
    "waiting": "durable_jobs_waiting",
    "waiting later": "durable_jobs_waiting_later",
    "blocked": "durable_jobs_blocked",
    "running": "durable_jobs_running",
    "stalled": "durable_jobs_stalled",
}


def page():
    """Return the context of the template."""
    pauses = {pause.name: pause for pause in Pause.objects.all()}
    _, tasks = known_names()
    found = {row["queue"]: row for row in by_queue()}
    names = sorted({*found, *pauses} - {*tasks})
    rows = {name: found.get(name, {}) for name in names}
    entries = LogEntry.objects.filter(content_type__app_label="durable_jobs").select_related("user")
    return {
        "problems": problems(found.values()),
        "queues": [
            shown(
                name,
                {"queue": name},
                {state: row.get(metric) for state, metric in COUNTS.items()},
                row.get("durable_jobs_oldest_wait_seconds"),
                workers=row.get("workers", []),
                slots=row.get("durable_jobs_slots"),
                busy=row.get("durable_jobs_busy_slots"),
                pause=pauses.get(name),
            )
            for name, row in rows.items()
        ],
        "keys": keys(),
        "paused_tasks": [pauses[name] for name in tasks if name in pauses],
        "tasks": [name for name in tasks if name not in pauses],
        "entries": entries.order_by("-pk")[:MOST_ENTRIES],
    }


def shown(name, query, counts, wait, **fields):
    """Return a line of a table. `query` finds its jobs in the list of jobs."""
    return {
        "name": name,
        "query": urlencode(query),
        "counts": [(urlencode({"state": state}), count or 0) for state, count in counts.items()],
        "wait": timesince(timezone.now() - wait) if wait else "",
        **fields,
    }


def keys():
    """Return the lines of the limited keys with active jobs: at most MOST_KEYS, the most blocked first."""
    is_due = Q(due_at__lte=Now())
    blocked = Job.objects.filter(blocked_by__isnull=False)
    blocked = blocked.values(key=F("blocked_by")).annotate(
        blocked=Count("blocked_by", filter=is_due), wait=Now() - Min("due_at", filter=is_due)
    )
    rows = {row["key"]: row for row in blocked.order_by("-blocked", "key")[:MOST_KEYS]}
    used = (
        with_slot()
        .values(key=F("limit_key"))
        .annotate(
            waiting=Count("pk", filter=Q(state="queued")),
            running=Count("pk", filter=RUNNING),
            stalled=Count("pk", filter=STALLED),
        )
    )
    for row in used.order_by("-running", "key"):
        rows[row["key"]] = rows.get(row["key"], {}) | row
    lines = []
    for key, row in list(rows.items())[:MOST_KEYS]:
        limit = conf.LIMITS.get(name_of(key))
        counts = {state: row.get(state) for state in ("waiting", "blocked", "running", "stalled")}
        query = {"q" if limit else "limit_key": key}
        lines.append(shown(key, query, counts, row.get("wait"), limit=limit or "none"))
    return lines


def workers_page():
    """Return the context of the template."""
    jobs, silent_time = defaultdict(list), timedelta(seconds=STALE_SECONDS)
    running = Job.objects.filter(state="running", sweep_at__isnull=False)
    running = running.only("task", "label", "worker", "started_at")
    for job in running.order_by("started_at")[:MOST_RUNNING]:
        job.age = span(timezone.now() - job.started_at)
        jobs[job.worker].append(job)
    rows = list(Worker.objects.annotate(age=Now() - F("seen_at")))
    for row in rows:
        row.is_silent, row.silence = row.age > silent_time, span(row.age)
        row.jobs, row.more = jobs[row.name][:MOST_SHOWN], len(jobs[row.name][MOST_SHOWN:])
        row.query = urlencode({"worker": row.name})
    rows.sort(key=lambda row: not row.is_silent)
    versions = Counter(row.version or "unknown" for row in rows if not row.is_silent)
    return {"problems": problems(by_queue()), "workers": rows, "versions": versions.most_common()}
