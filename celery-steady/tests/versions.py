"""Which versions of Celery and kombu a fault or a test is about. On older ones it is skipped."""

import pytest

from celery_steady.versions import minor

# Since which version, and why not on older ones
SINCE = """
a_poll_of_sqs_waits_forever | kombu 5.6 | another HTTP client
sqs_gets_a_message_back_after_a_poll | kombu 5.6 | it gets it back immediately
sqs_refuses_a_task_after_two_tries | kombu 5.6 | the part is off
greenlets_get_no_result_after_an_error | celery 5.6 | they wait without an error
a_task_that_a_child_has_just_got_is_forgotten | celery 5.7 | it forgets more: see the promises below
test_a_message_that_is_sent_during_an_outage_arrives[sqs] | kombu 5.7 | a queue that is gone, as only moto's are, is not declared again
test_each_poison_ends_and_other_tasks_run[prefork] | celery 5.7 | a child that exits has no result, with billiard 4.3
test_a_worker_that_fails_ends_although_its_tasks_do_not | celery 5.6 | their messages come back after the visibility timeout
test_a_worker_that_waits_after_sigterm_renews_its_messages[prefork] | celery 5.6 | it runs no timer then
test_a_task_that_runs_through_a_restart_of_redis_starts_once[prefork] | celery 5.7 | children that had a task get no other after a restart of Redis
test_a_task_that_ends_while_redis_is_down_is_not_run_again[prefork] | celery 5.6 | the end of a task is not noticed after a restart of Redis
test_an_error_that_is_half_read_when_the_connection_is_lost_arrives | celery 5.6 | the end of a task is not noticed after a restart of Redis
test_a_request_waits_a_second_for_a_free_connection | celery 5.7 | it waits without an end: Celery has no setting
test_greenlets_get_results_again_after_an_error | celery 5.6 | they wait without an error
"""


def skip_on_older_versions(items):
    for line in SINCE.strip().splitlines():
        name, since, reason = line.split(" | ")
        package, oldest = since.split()
        if minor(package) < tuple(map(int, oldest.split("."))):
            for item in items:
                if name in {item.name, item.originalname, case(item)}:
                    item.add_marker(pytest.mark.skip(reason=f"{package} before {oldest}: {reason}"))


def case(item):
    return item.callspec.id if hasattr(item, "callspec") else None
