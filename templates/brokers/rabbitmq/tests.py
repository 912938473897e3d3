

def test_the_checks_find_a_task_that_the_broker_would_cut_off(monkeypatch, settings):
    settings.RABBITMQ_CONSUMER_TIMEOUT = 2 * settings.TASK_TIME_LIMIT
    assert check(monkeypatch) == {"jobs.W004"}
