

@pytest.mark.parametrize("query", ["", "?ssl_cert_reqs=none", "?ssl_cert_reqs=CERT_NONE"])
def test_the_checks_find_tls_that_trusts_everybody(monkeypatch, settings, query):
    settings.CELERY_BROKER_URL = "rediss://host?ssl_cert_reqs=required"
    assert check(monkeypatch) == set()
    settings.CELERY_BROKER_URL = f"rediss://host{query}"
    assert check(monkeypatch) == {"jobs.W001"}


def test_the_checks_find_a_database_with_two_uses(monkeypatch, settings):
    settings.CELERY_BROKER_URL = "redis://host:1/0"
    assert check(monkeypatch, CACHE_URL="redis://host:1/1") == set()
    assert check(monkeypatch, CACHE_URL="redis://user:password@host:1") == {"jobs.W002"}
    settings.CELERY_BROKER_URL = "redis://host:1/1"
    assert check(monkeypatch, CACHE_URL="redis://host:1/10") == set()
