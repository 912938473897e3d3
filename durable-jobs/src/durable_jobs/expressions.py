"""Parts of queries: the states of a job, the database's clock, and settings of one transaction."""

from datetime import timedelta

from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Least, Now

from durable_jobs import conf

ACTIVE = ["queued", "running"]
FINAL = ["succeeded", "failed", "cancelled"]
# In an UPDATE by ids, use these instead of state=…. With state=… and old statistics, PostgreSQL may
# choose the index `job_active` and read the whole backlog to find one row. Constraints keep these fields
# and the state consistent.
UNFINISHED = Q(finished_at=None)
QUEUED = Q(run_token=None) & UNFINISHED
RUNNING = Q(state="running", sweep_at__gte=Now())
STALLED = Q(state="running", sweep_at__lt=Now())  # its lease has lapsed
STILL_RUNNING = Q(state="cancelled", sweep_at__isnull=False)  # jobs with a limit, see admission.py


class Clock(Now):
    """The database's time when a row is written, even if the statement has waited for a lock.

    Use it only for the times of a run and its lease. Elsewhere use Now(), the time when the statement
    began: in a WHERE clause, it lets PostgreSQL use an index.

    On SQLite the value has Django's format, because SQLite compares times as text.
    """

    def as_postgresql(self, compiler, connection, **context):
        return self.as_sql(compiler, connection, template="CLOCK_TIMESTAMP()", **context)

    def as_sqlite(self, compiler, connection, **context):
        text = "STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f000', 'NOW')"
        return self.as_sql(compiler, connection, template=text, **context)


class SetLocal(models.Func):
    """A condition that is always true, and sets a setting of PostgreSQL until the transaction ends.

    It needs no query of its own. Do not use it in a transaction of a task function.
    """

    output_field = models.BooleanField()
    template = "SET_CONFIG('%(name)s', '%(value)s', TRUE) IS NOT NULL"

    def as_sqlite(self, compiler, connection, **context):
        return self.as_sql(compiler, connection, template="TRUE", **context)


# The UPDATE waits a second for a locked row, then fails.
LOCK_TIMEOUT = SetLocal(name="lock_timeout", value="1s")
# PostgreSQL ends the transaction of a process that does nothing in it: if a worker freezes while it renews a
# lease, the job must not stay locked.
IDLE_TIMEOUT = SetLocal(name="idle_in_transaction_session_timeout", value="10s")
# The commit does not wait until the WAL is on disk.
ASYNC_COMMIT = SetLocal(name="synchronous_commit", value="off")


def lease_end():
    """Return the end of a lease that is renewed now, but no later than the deadline of its run."""
    return Least(Clock() + timedelta(seconds=conf.LEASE_SECONDS), F("deadline"))
