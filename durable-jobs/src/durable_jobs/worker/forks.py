"""Queries in other threads of a worker's main process, which forks its child processes meanwhile."""

import os
import threading
from contextlib import closing, nullcontext

from django.db import connection

from durable_jobs.database import wait_for
from durable_jobs.pools import pool
from durable_jobs.process import process

forking = pool.Lock()
if hasattr(os, "register_at_fork"):  # not on Windows, where only web servers and commands run
    os.register_at_fork(
        before=forking.acquire, after_in_parent=forking.release, after_in_child=forking.release
    )


def between_forks(query, *args):
    """Call query(*args), and close the connection, because a child must not inherit it.

    With SQLite, no child is forked meanwhile: it would inherit the lock of a transaction, which then never ends.
    """
    must_not_fork = process.is_prefork and connection.vendor == "sqlite"
    with forking if must_not_fork else nullcontext(), closing(connection):
        return query(*args)


def in_thread(update, *args, delay=0):
    """Call update(*args) in a thread: a worker's loop must not wait for a lock or the database."""
    timer = threading.Timer(delay, wait_for, [between_forks, update, *args])
    timer.daemon = True  # a worker that ends does not wait for the database
    timer.start()
