"""With Celery and kombu of other versions, jobs run without the extensions that may not fit."""

import celery_steady.versions
import pytest

from durable_jobs import versions


@pytest.mark.parametrize(
    ("celery", "kombu", "off"),
    [
        ("5.7.0", "5.7.0", set()),
        ("5.6.3", "5.6.2", {"batched confirms from RabbitMQ"}),
        ("5.8.0rc1", "5.8.0", versions.SINCE.keys()),
        ("5.10.0", "5.7.9", versions.SINCE.keys()),
    ],
)
def test_an_extension_that_is_not_known_to_fit_is_off_and_one_line_says_so(
    monkeypatch, caplog, celery, kombu, off
):
    monkeypatch.setattr(celery_steady.versions, "version", {"celery": celery, "kombu": kombu}.get)
    assert {name for name in versions.SINCE if not versions.fits(name)} == off
    versions.log_what_is_off()
    assert len(caplog.records) == bool(off)
    assert all(name in caplog.text for name in off)
