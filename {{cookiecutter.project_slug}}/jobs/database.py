"""How a worker waits for a database that is away, and clears up what a body left open in it."""

import logging
import time
from contextlib import suppress

from celery.exceptions import SoftTimeLimitExceeded
from django.db import Error, close_old_connections, connection
from django.db.utils import InterfaceError, OperationalError

from .pools import pool

logger = logging.getLogger(__name__)


def wait_for(query, *args, **kwargs):
    """Return query(…), tried until the database answers."""
    return pool.query(try_until_answered, query, *args, **kwargs)


def try_until_answered(query, *args, **kwargs):
    while True:
        try:
            return query(*args, **kwargs)
        except Error as error:
            if not is_away(error):
                raise
            logger.warning("waiting for the database: %s", error)
            close_old_connections()
            time.sleep(1)


def insist(update, *args, **kwargs):
    """Do as wait_for(), also over the soft time limit: how a job ended must not get lost."""
    while True:
        with suppress(SoftTimeLimitExceeded):
            return wait_for(update, *args, **kwargs)


def is_away(error):
    """Whether it may pass: PostgreSQL's 25006, "read only", may; class 54, "too large", does not."""
    state = getattr(error.__cause__, "sqlstate", None) or ""
    away = isinstance(error, (OperationalError, InterfaceError)) and not state.startswith("54")
    return away or state == "25006"


def in_transaction():
    return connection.connection and (connection.in_atomic_block or not connection.autocommit)


def leave_transaction():
    """Roll back what a body left open, or else how it ended would be part of it. Returns if so."""
    with suppress(Error):
        if connection.connection and not (connection.in_atomic_block or connection.autocommit):
            connection.set_autocommit(True)  # perhaps all was committed
    if left := in_transaction():
        connection.close()
        with suppress(Error):
            connection.connect()  # forgets the blocks, also if it fails
    return left
