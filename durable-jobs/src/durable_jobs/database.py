"""The database: its clock, settings of a transaction, waiting while it is down, connections after task functions."""

import logging
import time
from contextlib import suppress

from celery.exceptions import SoftTimeLimitExceeded
from django.db import DEFAULT_DB_ALIAS, Error, connection, connections, models
from django.db.models import functions
from django.db.utils import InterfaceError, OperationalError

from durable_jobs import conf
from durable_jobs.pools import pool

logger = logging.getLogger(__name__)


class Now(functions.Now):
    """Django's Now(), on SQLite with as many digits as stored times: as text, 41.648 comes before 41.648000."""

    def as_sqlite(self, compiler, connection, **context):
        text = "STRFTIME('%%%%Y-%%%%m-%%%%d %%%%H:%%%%M:%%%%f000', 'NOW')"
        return self.as_sql(compiler, connection, template=text, **context)


class Clock(Now):
    """The database's time when a row is written, even if the statement has waited for a lock.

    Use it only for times that are written. In a WHERE clause use Now(), the time when the statement began: it
    lets PostgreSQL use an index.

    On SQLite the value has Django's format, because SQLite compares times as text.
    """

    def as_postgresql(self, compiler, connection, **context):
        return self.as_sql(compiler, connection, template="CLOCK_TIMESTAMP()", **context)


class SetLocal(models.Func):
    """A condition that is always true, and sets a setting of PostgreSQL until the transaction ends.

    `value` is SQL. It needs no query of its own. Do not use it in a transaction of a task function.
    DURABLE_JOBS['SET_CONFIG'] = False leaves it out: RDS Proxy reserves a connection for whoever calls set_config().
    """

    output_field = models.BooleanField()
    template = "SET_CONFIG('%(name)s', %(value)s, TRUE) IS NOT NULL"

    def as_postgresql(self, compiler, connection, **context):
        if conf.SET_CONFIG:
            return self.as_sql(compiler, connection, **context)
        return self.as_sqlite(compiler, connection, **context)

    def as_sqlite(self, compiler, connection, **context):
        return self.as_sql(compiler, connection, template="TRUE", **context)


# The UPDATE waits a second for a locked row, then fails.
LOCK_TIMEOUT = SetLocal(name="lock_timeout", value="'1s'")
# PostgreSQL ends the transaction of a process that does nothing in it: if a worker freezes while it renews a
# lease, the job must not stay locked.
IDLE_TIMEOUT = SetLocal(name="idle_in_transaction_session_timeout", value="'10s'")
# The commit of a claim does not wait for the disk: a worker runs 1.8 times as many jobs if that takes 1 ms. With a limit
# it does, because a crash of PostgreSQL must free no slot. It is on disk after three times `wal_writer_delay` at most.
ASYNC_CLAIM = SetLocal(
    name="synchronous_commit",
    value="CASE WHEN limit_key IS NULL THEN 'off' ELSE CURRENT_SETTING('synchronous_commit') END",
)


def limit_locks():
    """In this transaction, wait a second for locks of tables, too. A statement that has LOCK_TIMEOUT locks them first."""
    if connection.vendor == "postgresql" and conf.SET_CONFIG:
        connection.cursor().execute("SET LOCAL lock_timeout = '1s'")


# SQLSTATEs, see the appendix "PostgreSQL Error Codes" of its manual
TEMPORARY = {
    "25006",  # a standby is read-only
    "25P03",  # the transaction was idle for too long: its process froze
    "26000",  # a kept plan is gone, for example after DISCARD ALL
    "42P05",  # a kept plan exists: a pooler gave this connection to someone else
    "0A000",  # a kept plan does not fit the altered table
}
PROGRAM_LIMIT = "54"  # the class of "program limit exceeded"


def cursor_that_prepares():
    """Return a cursor whose plans PostgreSQL keeps if the project sets psycopg's `prepare_threshold`.

    Django's own cursor sends each statement as text. In debug mode it is used here, too, to log the SQL.
    """
    database = connections[DEFAULT_DB_ALIAS]  # `connection` would look it up for each attribute
    if database.vendor != "postgresql" or database.queries_logged:
        return database.cursor()
    database.close_if_health_check_failed()
    database.ensure_connection()
    return database._prepare_cursor(database.Database.Cursor(database.connection))


def wait_for(query, *args, **kwargs):
    """Return query(…). While the database is unavailable, try again every second."""
    while True:
        try:
            return pool.query(try_once, query, *args, **kwargs)
        except Error as error:
            if not may_succeed_later(error):
                raise
            logger.warning("waiting for the database: %s", error)
            time.sleep(1)


def try_once(query, *args, **kwargs):
    try:
        return query(*args, **kwargs)
    except Error:
        if not connection.in_atomic_block:  # in a test's atomic(), leave it open
            connection.close()  # it may be broken, or a task function may have changed its settings
        raise


def try_in_halves(function, rows, keys):
    """Call function(the rows with these keys). If it fails, call it for each half of them.

    So one row does not stop the others. If the database is unavailable, raises the function's error.
    """
    try:
        function(rows.filter(pk__in=keys))
    except Exception as error:  # a project's signal handler may raise anything
        if not connection.is_usable():
            raise
        if middle := len(keys) // 2:
            try_in_halves(function, rows, keys[:middle])
            try_in_halves(function, rows, keys[middle:])
        else:
            logger.warning("%s fails for %s: %r", function.__name__, keys[0], error)


def wait_past_soft_limit(update, *args, **kwargs):
    """Do the same as wait_for(), but ignore the soft time limit: a claim or outcome must not be lost."""
    while True:
        with suppress(SoftTimeLimitExceeded):
            return wait_for(update, *args, **kwargs)


def may_succeed_later(error):
    """Return whether the same query may succeed later, on a new connection.

    OperationalError and InterfaceError are a lost connection, a lock, a deadlock, or a server that shuts down. But
    what exceeds a limit of PostgreSQL would exceed it again.
    """
    state = getattr(error.__cause__, "sqlstate", None) or ""
    is_operational = isinstance(error, (OperationalError, InterfaceError))
    return state in TEMPORARY or (is_operational and state[:2] != PROGRAM_LIMIT)


def locking(rows):
    """Return these rows, without those that another transaction has locked. A query of them locks them."""
    return rows.filter(IDLE_TIMEOUT).select_for_update(skip_locked=True)


def skip_locked(rows):
    """Lock these rows, except those that another transaction has locked, and return them."""
    keys = locking(rows).values_list("pk", flat=True)
    return rows.model.objects.filter(pk__in=list(keys))


def in_transaction():
    """Return whether a transaction is open, even one of a raw BEGIN, of which Django does not know."""
    raw = connection.connection
    # sqlite3's own attribute; libpq's PQTRANS_INTRANS and PQTRANS_INERROR
    is_open = getattr(raw, "in_transaction", False) or transaction_status() in (2, 3)
    return bool(raw and (is_open or connection.in_atomic_block or not connection.autocommit))


def transaction_status():
    """Return what libpq knows without a query. None: there is no connection to PostgreSQL."""
    return getattr(getattr(connection.connection, "info", None), "transaction_status", None)


def timeouts():
    """Return filters that set timeouts in a transaction of our own. In a caller's, where they would stay: none."""
    return [] if in_transaction() else [LOCK_TIMEOUT, IDLE_TIMEOUT]


def end_interrupted_query(execute, *args):
    """Wrap each query of a run. If a time limit or a shutdown interrupts one, end it."""
    try:
        return execute(*args)
    except BaseException:
        close_if_busy()
        raise


def close_if_busy():
    """Close the connection if its query was interrupted, because it would refuse all others.

    Cancel the query first: it may hold a lock on the row of the job.
    """
    if transaction_status() == 1:  # libpq's PQTRANS_ACTIVE
        with suppress(Exception):
            connection.connection.cancel_safe(timeout=5)
        connection.close()


def roll_back_open_transaction():
    """Roll back a transaction that a task function left open, unless SQLite commits it.

    Otherwise the outcome would be written inside it, and lost with it. Returns whether one was rolled back.
    """
    close_if_busy()
    # A function may have called set_autocommit(False): switch it back. If its transaction is open, SQLite commits it.
    # psycopg refuses: then close() ends it.
    with suppress(Error):
        if connection.connection and not (connection.in_atomic_block or connection.autocommit):
            connection.set_autocommit(True)
    if was_open := in_transaction():
        connection.close()
        with suppress(Error):
            connection.connect()  # resets Django's atomic blocks, even if it fails
    return was_open
