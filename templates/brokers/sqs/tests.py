

def test_the_checks_find_a_task_that_the_broker_would_double(monkeypatch, settings):
    settings.SQS_VISIBILITY_TIMEOUT = settings.TASK_TIME_LIMIT
    assert check(monkeypatch) == {"jobs.W004"}
