"""What the admin's page "Queues" shows: queues, limited keys, pauses, and which workers take from a queue."""

import logging
from collections import defaultdict
from urllib.parse import urlencode

from celery import current_app
from django.contrib.admin.models import LogEntry
from django.db.models import Count, F, Min, Q
from django.db.models.functions import Now
from django.utils import timezone
from django.utils.timesince import timesince

from . import conf
from .limits import PAUSE, name_of
from .metrics import by_queue
from .models import Job, Pause
from .pauses import known_names
from .turns import with_place

logger = logging.getLogger(__name__)

MOST_KEYS = 200
MOST_ENTRIES = 10  # of the log
REPLY_SECONDS = 0.5  # for which workers may answer
COUNTS = {  # {filter of the list of jobs: the metric}
    "waiting": "jobs_waiting",
    "waiting later": "jobs_waiting_later",
    "held": "jobs_held",
    "running": "jobs_running",
}


def page():
    """Return the context of the template."""
    pauses = {pause.name: pause for pause in Pause.objects.all()}
    _, tasks = known_names()
    found = {row["queue"]: row for row in by_queue()}
    names = {*found, *pauses} - {*tasks}
    workers, problem = workers_by_queue()
    entries = LogEntry.objects.filter(content_type__app_label="jobs").select_related("user")
    return {
        "queues": [
            shown(
                name,
                {"queue": name},
                {state: found.get(name, {}).get(metric) for state, metric in COUNTS.items()},
                found.get(name, {}).get("jobs_oldest_wait_seconds"),
                workers=sorted(workers[name]),
                pause=pauses.get(name),
            )
            for name in sorted(names)
        ],
        "keys": keys(),
        "paused_tasks": [pauses[name] for name in tasks if name in pauses],
        "tasks": [name for name in tasks if name not in pauses],
        "problem": problem,
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
    """Return the lines of the limited keys with active jobs: at most MOST_KEYS, the most held first."""
    is_due = Q(due_at__lte=Now())
    held = Job.objects.filter(held_by__isnull=False).exclude(held_by__startswith=PAUSE)
    held = held.values(key=F("held_by")).annotate(
        held=Count("held_by", filter=is_due), wait=Now() - Min("due_at", filter=is_due)
    )
    rows = {row["key"]: row for row in held.order_by("-held", "key")[:MOST_KEYS]}
    used = (
        with_place()
        .values(key=F("limit_key"))
        .annotate(
            waiting=Count("pk", filter=Q(state="queued")),
            running=Count("pk", filter=Q(state="running")),
        )
    )
    for row in used.order_by("-running", "key"):
        rows[row["key"]] = rows.get(row["key"], {}) | row
    lines = []
    for key, row in list(rows.items())[:MOST_KEYS]:
        limit = conf.JOB_LIMITS.get(name_of(key))
        counts = {state: row.get(state) for state in ("waiting", "held", "running")}
        query = {"q" if limit else "limit_key": key}
        lines.append(shown(key, query, counts, row.get("wait"), limit=limit or "none"))
    return lines


def workers_by_queue():
    """Return {queue: names of workers}, and a sentence that says why it is empty."""
    found = defaultdict(list)
    try:
        with current_app.connection_for_write() as broker:
            broker.ensure_connection(max_retries=1, interval_start=0)
            if not broker.supports_exchange_type("fanout"):
                return found, "This broker cannot ask the workers which queues they take from."
            ask = current_app.control.inspect(timeout=REPLY_SECONDS, connection=broker)
            answers = ask.active_queues() or {}
    except Exception as error:  # each transport has its own exceptions
        logger.warning("the broker cannot ask the workers: %r", error)
        return found, "The broker does not answer, so the workers are unknown."
    for worker, queues in answers.items():
        for queue in queues:
            found[queue["name"]].append(worker)
    return found, "" if answers else "No worker has answered."
