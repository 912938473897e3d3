"""How a worker waits for a database that is unavailable, and rolls back what a body left open."""

import logging
import time
from contextlib import suppress

from celery.exceptions import SoftTimeLimitExceeded
from django.db import Error, connection
from django.db.utils import InterfaceError, OperationalError

from .pools import pool

logger = logging.getLogger(__name__)


def wait_for(query, *args, **kwargs):
    """Return query(…). While the database is unavailable, try again every second."""
    while True:
        try:
            return pool.query(try_once, query, *args, **kwargs)
        except Error as error:
            if not is_unavailable(error):
                raise
            logger.warning("waiting for the database: %s", error)
            time.sleep(1)


def try_once(query, *args, **kwargs):
    try:
        return query(*args, **kwargs)
    except Error:
        if not connection.in_atomic_block:  # of a test
            connection.close()  # perhaps it is broken, or a body has changed its settings
        raise


def try_in_halves(function, keys):
    """Call function(keys). If it fails, call it for each half, so that one row stops no other.

    Returns how many keys failed alone. Raises what function() does if the database is unavailable.
    """
    try:
        function(keys)
    except Exception as error:  # an owner's signal handler may raise anything
        if not connection.is_usable():
            raise
        if middle := len(keys) // 2:
            return try_in_halves(function, keys[:middle]) + try_in_halves(function, keys[middle:])
        logger.warning("%s fails for the job %s: %r", function.__name__, keys[0], error)
        return 1
    return 0


def store_outcome(update, *args, **kwargs):
    """Do as wait_for(), and ignore the soft time limit: a claim or an outcome must not get lost."""
    while True:
        with suppress(SoftTimeLimitExceeded):
            return wait_for(update, *args, **kwargs)


def is_unavailable(error):
    """Return whether the same query may succeed later."""
    state = getattr(error.__cause__, "sqlstate", None) or ""
    # PostgreSQL's class 54 is "program limit exceeded", 25006 "read-only transaction": a standby.
    may_pass = isinstance(error, (OperationalError, InterfaceError)) and not state.startswith("54")
    return may_pass or state == "25006"


def in_transaction():
    is_open = connection.in_atomic_block or not connection.autocommit
    return bool(connection.connection and is_open)


def roll_back_open_transaction():
    """Roll back a transaction that a body left open: the outcome would be written inside it and lost.

    Return whether there was one.
    """
    with suppress(Error):
        if connection.connection and not (connection.in_atomic_block or connection.autocommit):
            connection.set_autocommit(True)  # PostgreSQL refuses while a transaction is open
    if was_open := in_transaction():
        connection.close()
        with suppress(Error):
            connection.connect()  # resets Django's atomic blocks, even if it fails
    return was_open
