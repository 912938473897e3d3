"""Old code and new code run side by side, and the code of waiting jobs changes.

The headings are those of "Deploys" in durable-jobs/docs/reliability.md.
"""

from harness.faults import on_one, without_resends
from harness.project import wait_for

# A worker of old code takes a job whose task it does not know


@on_one
def test_a_worker_of_old_code_loses_no_new_task(stack):
    """In a rolling deploy it drops messages of tasks that it does not know: they are sent again."""
    stack.other.stop()
    old = stack.make_worker("old", "--queues io", OLD_CODE=1).start()
    jobs = [stack.enqueue("new", queue="io") for _ in range(5)]
    wait_for(lambda: old.printed.count("unregistered task") >= 5)
    old.stop()
    stack.other.start()
    stack.wait_until_succeeded(*jobs, crashes=0)


# Beat still runs old code


@without_resends
def test_a_beat_of_old_code_sends_the_jobs_of_new_tasks(stack):
    """In a rolling deploy, Beat may be the last process that gets the new code."""
    stack.replace_beat(OLD_CODE=1)
    jobs = [stack.enqueue("new", queue="io", countdown=1) for _ in range(5)]
    stack.wait_until_succeeded(*jobs, crashes=0)


# A task's arguments changed while its jobs waited


@without_resends
def test_jobs_with_outdated_arguments_fail_and_delay_no_other(stack):
    """They were stored before their task's signature changed."""
    code = """
jobs = [job.pk for job in enqueue_many([quick.using(countdown=2).s()] * 40)]
for position, args in enumerate(jobs[:30]):
    args, kwargs = ([], {"gone": 1}) if position % 2 else (["one too many"], {})
    Job.objects.filter(pk=jobs[position]).update(args=args, kwargs=kwargs)
result = jobs
"""
    jobs = stack.ask(code)
    stack.wait_until_succeeded(*jobs[30:], crashes=0)
    rows = stack.wait_until_final(*jobs[:30])
    assert {(row["state"], row["crashes"]) for row in rows} == {("failed", 0)}, rows
    assert all("argument" in row["error"] for row in rows), rows
    assert all("gone" in row["error"] for row in rows[1::2]), rows
