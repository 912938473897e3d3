"""Deletes rows that ended more than RETENTION_DAYS ago."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from django.db import close_old_connections, transaction
from django.db.models import Q

from durable_jobs import admission, batches, conf, transitions
from durable_jobs.database import skip_locked, try_in_halves
from durable_jobs.models import Batch, Job
from durable_jobs.worker.heartbeat import delete_old as delete_old_workers

logger = logging.getLogger(__name__)

PAGE = 2000  # rows that the purge deletes in one transaction
PURGE_SECONDS = 1  # then it rests for SWEEP_SECONDS: enough for millions an hour
PURGE_RETRY_SECONDS = 3600  # until jobs that could not be deleted are tried again


@dataclass
class Purge:
    """Deletes the rows of a table that ended more than DURABLE_JOBS['RETENTION_DAYS'] ago, oldest first.

    Each page starts after the last one, so it costs the same however many rows must be kept.
    """

    model: type
    field: str  # when a row has ended
    batch: str  # the field with the id of its batch
    unneeded: Callable  # batches.unneeded_jobs or batches.unneeded_batches
    last: tuple = ()  # of the last page, the last row: when it has ended, and its id
    start_over_at: float = 0  # as time.monotonic()

    def delete_pages(self):
        if time.monotonic() > self.start_over_at:
            self.last, self.start_over_at = (), time.monotonic() + PURGE_RETRY_SECONDS
        until = time.monotonic() + PURGE_SECONDS
        while self.delete_page() and time.monotonic() < until:
            pass

    def delete_page(self):
        """Delete the next rows, except those that are still needed or cannot be deleted.

        Returns whether there are more.
        """
        old = self.model.objects.filter(**{f"{self.field}__lt": transitions.retention_end()})
        remaining = old.order_by(self.field, "pk").values_list(self.field, "pk")
        if self.last:  # rows after it. The plain __gte lets the database use the index.
            at, pk = self.last
            later = Q(**{f"{self.field}__gt": at}) | Q(pk__gt=pk)
            remaining = remaining.filter(later, **{f"{self.field}__gte": at})
        if page := list(remaining[:PAGE]):
            self.last = page[-1]
            try_in_halves(self.delete, old, [pk for _, pk in page])
        return len(page) == PAGE

    @transaction.atomic
    def delete(self, rows):
        """Delete these rows, except those that are locked or needed."""
        in_batches = rows.filter(**{f"{self.batch}__isnull": False})
        pks = list(in_batches.values_list(self.batch, flat=True).distinct())
        old = Batch.objects.filter(pk__in=pks, ended_at__lt=transitions.retention_end())
        # Their jobs cannot run again meanwhile.
        locked = old.order_by("pk").select_for_update().values_list("pk", flat=True)
        unneeded = self.unneeded(list(locked))
        # Django loads what it deletes. Load only the keys, because results may be large.
        _, deleted = skip_locked(rows.filter(unneeded)).only("pk").delete()
        if count := deleted.get("durable_jobs.Job"):
            logger.info("deleted %d jobs older than %g days", count, conf.RETENTION_DAYS)


def of_jobs():
    return Purge(Job, "finished_at", "batch", batches.unneeded_jobs)


def of_batches():
    return Purge(Batch, "ended_at", "pk", batches.unneeded_batches)


def clean_forever():
    """Delete old rows."""
    purges = of_jobs().delete_pages, of_batches().delete_pages
    steps = *purges, admission.delete_old_keys, delete_old_workers
    while True:
        time.sleep(conf.SWEEP_SECONDS)
        for step in steps:
            try:
                close_old_connections()
                step()
            except Exception as error:
                logger.warning("%s failed and will be retried: %r", step.__qualname__, error)
