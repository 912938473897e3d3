"""The fixtures and plugins of an output, and a fixture for gevent."""

import runpy

import pytest
from settings import OUTPUT

from jobs.pools import pool

fixtures = runpy.run_path(str(OUTPUT / "conftest.py"))
globals().update({name: fixtures[name] for name in fixtures if not name.startswith("__")})


@pytest.fixture(autouse=True)
def one_connection(monkeypatch):
    """Query in the test's own thread: gevent's native threads do not see its transaction."""
    monkeypatch.setattr(pool, "query", lambda function, *args, **kw: function(*args, **kw))
