"""Queries in a thread of a worker's main process, while it forks a child. Forks of jobs."""

import os
import sqlite3
import threading
import time
from contextlib import closing
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from durable_jobs.process import process
from durable_jobs.tasks import job
from durable_jobs.worker import forks
from durable_jobs.worker.consumer import Consumer


@pytest.mark.django_db  # so that it runs in no process with greenlets, which forks no children
def test_a_child_does_not_inherit_the_lock_of_a_transaction(tmp_path, monkeypatch):
    """It would find the database locked, for ever."""
    monkeypatch.setattr(process, "is_prefork", True)
    monkeypatch.setattr(forks, "connection", SimpleNamespace(vendor="sqlite", close=Mock()))
    began = threading.Event()

    def insert(database):
        database.execute("INSERT INTO numbers VALUES (1)")

    def write():
        with sqlite3.connect(tmp_path / "database") as database:
            insert(database)
            began.set()
            time.sleep(0.3)

    with closing(sqlite3.connect(tmp_path / "database")) as database:
        database.execute("CREATE TABLE numbers (number)")
    thread = threading.Thread(target=forks.between_forks, args=[write])
    thread.start()
    began.wait()
    child = os.fork()
    if child == 0:
        try:
            with sqlite3.connect(tmp_path / "database", timeout=1) as database:
                insert(database)
            os._exit(0)
        finally:
            os._exit(1)
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


@job
def fork(self):
    """Return the exit code of the copy, which comes back, too."""
    copy = os.fork()
    return copy and os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])


@job
def leave(self):
    raise SystemExit


@pytest.mark.django_db
def test_a_process_that_a_job_forks_never_leaves_its_function():
    """It would go on as a second worker. With prefork, celery-steady ends it."""
    Consumer.prepare(Mock(is_prefork=False), fork)
    process = os.getpid()
    try:
        assert fork() == 1
    finally:
        if os.getpid() != process:
            os._exit(0)


@pytest.mark.django_db
def test_a_job_raises_what_it_likes():
    """What that means is known to worker/runs.py. A plain task fails with another error."""
    Consumer.prepare(Mock(is_prefork=False), leave)
    with pytest.raises(SystemExit):
        leave()
