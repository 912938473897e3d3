"""The heartbeat of a worker: every ten seconds it writes a row that says what it is, and how busy.

The row goes when the worker ends. The row of a killed worker stays, and goes stale: the sweeper deletes it after
an hour. Two workers with one name share a row, which shows the one that wrote last.
"""

import atexit
import logging
from datetime import timedelta
from functools import partial

from celery.worker import state
from django.db import transaction
from django.utils import timezone

from durable_jobs import conf
from durable_jobs.database import Clock, Now, limit_locks
from durable_jobs.models import Worker
from durable_jobs.pools import pool, pool_name, shutting_down
from durable_jobs.worker.forks import between_forks

logger = logging.getLogger(__name__)

BEAT_SECONDS = 10  # between two heartbeats
KEEP_SECONDS = 3600  # until the row of a dead worker is deleted
LOCK_SECONDS = 5  # how long a worker that ends waits for a heartbeat that is being written


def delete_old():
    Worker.objects.filter(seen_at__lt=Now() - timedelta(seconds=KEEP_SECONDS)).delete()


class Heartbeat:
    """Writes the row of this process, if it is a worker's main process."""

    def __init__(self):
        self.row_key = {}  # the key of the row: two processes may have the same name
        # Locked while the row is written, and forever after it is deleted.
        self.lock = pool.Lock()

    def start(self, sender, **kwargs):
        """Start the heartbeat of a worker that is ready. `sender` is its consumer."""
        self.row_key.update(name=sender.hostname, started_at=timezone.now())
        atexit.register(self.forget)
        # A native thread: with gevent, a function that does not let others run must not stop it.
        pool.start_thread(partial(self.beat, sender))

    def beat(self, consumer):
        while True:
            try:
                with self.lock:
                    between_forks(self.write, consumer)
            except Exception as error:  # the next try may succeed
                logger.warning("cannot write the heartbeat: %r", error)
            pool.sleep(BEAT_SECONDS)

    def write(self, consumer):
        """Insert or update the row, with one query."""
        scaler = consumer.controller.autoscaler
        fields = {
            "pool": pool_name(consumer.controller.pool_cls),
            # Autoscaling starts as many processes as there are tasks, up to its maximum.
            "slots": scaler.max_concurrency if scaler else consumer.pool.num_processes,
            "busy": len(state.active_requests),
            "queues": queues_of(consumer),
            "version": str(conf.VERSION)[:255],
            "seen_at": Clock(),
        }
        update = {"update_conflicts": True, "unique_fields": ["name"]}
        row = Worker(**self.row_key, **fields)
        Worker.objects.bulk_create([row], **update, update_fields=["started_at", *fields])

    def forget(self):
        """Delete the row of this worker, which ends. Writes no heartbeat after it."""
        if self.row_key and self.lock.acquire(timeout=LOCK_SECONDS):
            try:
                with transaction.atomic():
                    limit_locks()
                    Worker.objects.filter(**self.row_key).delete()
            except Exception as error:  # the worker ends without the database
                logger.warning("could not delete this worker's row, so it stays an hour: %r", error)


def queues_of(consumer):
    """Return from which queues this worker takes tasks now: none without the broker."""
    is_taking = consumer.connection and consumer.task_consumer and not shutting_down.value
    return sorted(queue.name for queue in consumer.task_consumer.queues) if is_taking else []


heartbeat = Heartbeat()
