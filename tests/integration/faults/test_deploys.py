"""The code of waiting jobs changes.

The heading is one of those of "Deploys" in durable-jobs/docs/reliability.md.
"""

from harness.faults import without_resends

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
