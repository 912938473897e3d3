"""Cancelling with revoke(terminate=True): Celery warns that it may hit another task."""

import os
from functools import partial

from harness import faults
from harness.project import wait_for

on_one = partial(faults.stacks, ["redis"], ["prefork"], plain="plain-cancel-")
CANCELS = int(os.environ.get("CANCELS", "200"))
SEND = """
import random
cancelled, others = [], []
for _ in range(count):
    cancelled.append(nap.delay(random.uniform(0, 0.01), cancel=True).id)
    others += [nap.delay(random.uniform(0, 0.01)).id for _ in range(3)]
result = cancelled, others
"""


@on_one()
def test_cancelling_a_task_hits_no_other_task(stack):
    """Tasks are cancelled at about the moment they end, while others wait for their process."""
    cancelled, others = stack.ask(SEND, count=CANCELS)

    def noted(kind):
        return {task: words for each, task, _, _, *words in stack.lines() if each == kind}

    wait_for(lambda: {*others} <= noted("end").keys() and {*cancelled} <= noted("start").keys())
    retries = noted("start")
    assert [task for task in others if retries[task] != ["0"]] == []
    assert 0 < len(noted("end").keys() & {*cancelled}) < CANCELS  # some were quicker
