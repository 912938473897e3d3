"""A version of Celery or kombu that the tests haven't seen runs as it is, and one line says so."""

import pytest

from celery_steady import versions

NEXT = f"{versions.NEWEST[0]}.{versions.NEWEST[1] + 1}.0"
FAKE = f"""
import importlib.metadata as metadata

version = metadata.version
metadata.version = lambda name: {NEXT!r} if name == "kombu" else version(name)
"""


def test_a_worker_with_an_unknown_kombu_is_celerys_own(start, steady, send, tmp_path, settled):
    """kombu only seems to be newer: sitecustomize runs before all imports of the worker."""
    (tmp_path / "sitecustomize.py").write_text(FAKE)
    worker = start(steady, paths=[tmp_path])
    assert worker.parts == {
        "consumer": "celery_steady.consumer:StockConsumer",
        "transport": "kombu.transport.redis:Transport",
        "backend": "celery.backends.redis:RedisBackend",
    }
    assert send("add", 2, 3).get() == 5
    settled()
    [line] = [line for line in worker.text().splitlines() if NEXT in line]
    assert all(part in line for part in versions.SINCE)


@pytest.mark.parametrize(
    ("celery", "kombu", "off"),
    [
        ("5.7.0", "5.7.0", set()),
        ("5.6.3", "5.6.2", {"batched events"}),
        ("5.5.3", "5.5.4", {"batched events", "Amazon SQS"}),
        ("5.8.0rc1", "5.7.0", versions.SINCE.keys()),
        ("5.10.0", "5.7.9", versions.SINCE.keys()),
    ],
)
def test_a_part_that_is_not_known_to_fit_is_off_and_one_line_says_so(
    monkeypatch, caplog, celery, kombu, off
):
    monkeypatch.setattr(versions, "version", {"celery": celery, "kombu": kombu}.get)
    assert {part for part in versions.SINCE if not versions.fits(part)} == off
    assert {
        part for part in versions.SINCE if versions.choose(part, "ours", "stock") == "stock"
    } == off
    versions.log_what_is_off()
    assert len(caplog.records) == bool(off)
    assert all(part in caplog.text for part in off)
