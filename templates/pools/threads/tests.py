

def test_the_checks_say_that_threads_have_no_time_limit():
    found = run_checks(include_deployment_checks=True)
    assert "jobs.I001" in {message.id for message in found}
