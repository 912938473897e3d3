"""Which versions of Celery and kombu a test is about. On older ones it is skipped."""

import pytest
from celery_steady.versions import minor

# Since which version, and why not on older ones
SINCE = """
test_a_coroutine_can_be_retried_with_other_arguments | celery 5.7 | retry(args=…) keeps the keyword arguments of the first call
test_no_run_is_lost_when_the_clock_goes_back | celery 5.7 | Beat itself skips the runs of the hour that comes twice
test_only_connections_of_the_app_are_extended[amqp://] | kombu 5.7 | the extension is off
test_only_connections_of_the_app_are_extended[sqs://] | kombu 5.6 | the extension is off
test_rabbitmq_confirms_a_batch_of_messages_together | kombu 5.7 | the extension is off
test_the_reference_lists_each_public_member_of_a_class_and_no_other[durable_jobs.tasks] | celery 5.7 | retry_on_worker_lost is not yet an attribute of Celery's tasks
"""


def skip_on_older_versions(items):
    for line in SINCE.strip().splitlines():
        name, since, reason = line.split(" | ")
        package, oldest = since.split()
        if minor(package) < tuple(map(int, oldest.split("."))):
            for item in items:
                if name in {item.name, item.originalname}:
                    item.add_marker(pytest.mark.skip(reason=f"{package} before {oldest}: {reason}"))
