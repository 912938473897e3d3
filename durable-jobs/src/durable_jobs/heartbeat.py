"""The heartbeat of a worker: every ten seconds it writes a row that says what it is, and how busy.

The row goes when the worker ends. The row of a killed worker stays, and is silent: the sweep deletes it after
an hour. Two workers with one name share a row, which shows the one that wrote last.
"""

import atexit
import logging
import time
from collections import defaultdict
from contextlib import closing
from datetime import timedelta
from functools import partial

from celery.worker import state
from django.db import connection
from django.db.models.functions import Now
from django.utils import timezone

from . import conf
from .expressions import Clock
from .models import Job, Worker
from .pools import pool, pool_name, shutting_down

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10  # between two heartbeats
SILENT_SECONDS = 30  # a worker that is silent for this time counts as dead
KEEP_SECONDS = 3600  # until the row of a dead worker is deleted
LOCK_SECONDS = 5  # that a worker that ends waits for its last heartbeat

own = {}  # the key of this worker's row: two processes may have the same name
lock = pool.Lock()  # held while a heartbeat is written, and for ever after the row is deleted


def workers():
    """Return the rows, also if a router sends reads to a replica, which lags behind."""
    return Worker.objects.using(Job.objects.db)


def alive():
    """Return the workers that are not silent."""
    return workers().filter(seen_at__gt=Now() - timedelta(seconds=SILENT_SECONDS))


def takers():
    """Return {queue: the workers that take jobs from it}, without those that are silent."""
    found = defaultdict(list)
    for worker in alive():
        for queue in worker.queues:
            found[queue].append(worker)
    return found


def delete_old():
    workers().filter(seen_at__lt=Now() - timedelta(seconds=KEEP_SECONDS)).delete()


def start(sender, **kwargs):
    """Start the heartbeat of a worker that is ready. `sender` is its consumer."""
    own.update(name=sender.hostname, started_at=timezone.now())
    atexit.register(forget)
    # A native thread: with gevent, a body that does not let others run must not stop it.
    pool.start_thread(partial(beat, sender))


def beat(consumer):
    is_first = True
    while True:
        try:
            with lock, closing(connection):  # closed, because a child must not inherit it
                write(consumer, is_first)
                is_first = False
        except Exception as error:  # the next try may succeed
            logger.warning("cannot write the heartbeat: %r", error)
        time.sleep(BEAT_SECONDS)


def write(consumer, is_first):
    """Write the row, with one query unless it is new or another worker has the same name."""
    scaler = consumer.controller.autoscaler
    fields = {
        "pool": pool_name(consumer.controller.pool_cls),
        # Autoscaling starts as many processes as there are tasks, up to its maximum.
        "slots": scaler.max_concurrency if scaler else consumer.pool.num_processes,
        "busy": len(state.active_requests),
        "queues": queues_of(consumer),
        "version": conf.VERSION[:255],
        "seen_at": Clock(),
    }
    if workers().filter(**own).update(**fields):
        return
    if not is_first and alive().filter(name=own["name"]).exists():
        logger.warning("two workers have the name %s: give each its own with -n", own["name"])
    update = {"update_conflicts": True, "unique_fields": ["name"]}
    row = Worker(**own, **fields)
    workers().bulk_create([row], **update, update_fields=["started_at", *fields])


def queues_of(consumer):
    """Return from which queues this worker takes tasks now: none without the broker."""
    is_taking = consumer.connection and consumer.task_consumer and not shutting_down[0]
    return sorted(queue.name for queue in consumer.task_consumer.queues) if is_taking else []


def forget():
    """Delete the row of this worker, which ends. Writes no heartbeat after it."""
    if own and lock.acquire(timeout=LOCK_SECONDS):
        try:
            workers().filter(**own).delete()
        except Exception as error:  # the worker ends without the database
            logger.warning("the worker's row stays for an hour: %r", error)
