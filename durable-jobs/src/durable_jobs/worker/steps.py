"""Steps: functions that run once for a job. Job.steps has what they returned, by name."""

import json

from django.db import transaction

from durable_jobs.database import transaction_status
from durable_jobs.exceptions import JobLost
from durable_jobs.validation import MAX_RESULT_BYTES, check_size, to_json


def run_step(run, name, function, args, kwargs):
    """Return the stored result of this step. If there is none, return and store that of function(*args, **kwargs).

    Raises the errors of JobTask.step().
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of a step must be a text, not {name!r:.50}")
    to_json(name)  # raises if it cannot be stored
    if name in run.step_names:
        raise ValueError(f"this run has already had a step {name!r:.50}: give each its own name")
    if run.lost:
        raise JobLost
    before, run.step_names = run.step_names, run.step_names | {name}
    steps = read(run)
    if name in steps:
        return steps[name]
    try:
        with transaction.atomic():
            # As the next run will get it: a tuple becomes a list.
            result = json.loads(json.dumps(function(*args, **kwargs), allow_nan=False))
            # libpq's PQTRANS_IDLE: the function has made no query, so no transaction has begun.
            has_queried = transaction_status() != 0
            if has_queried:
                store(run, name, result)
        if not has_queried:  # here, it can wait while the database is unavailable
            store(run, name, result)
    except BaseException:
        run.step_names = before  # the function may catch the error, and try the step again
        raise
    return result


def read(run):
    [steps] = run.query_or_lose(list, run.row.values_list("steps", flat=True))
    return steps


def store(run, name, result):
    steps = {**read(run), name: result}  # read again: the step may have had steps of its own
    hint = "let steps return ids, or use a cursor"
    check_size("The results of its steps have", to_json(steps), MAX_RESULT_BYTES, hint)
    run.store(steps=steps)
