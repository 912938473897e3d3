"""Limits: which key a job has, and what DURABLE_JOBS['LIMITS'] says about it. admission.py lets jobs with a key wait.

    @shared_task(base=JobTask, limit="tenant:{tenant_id}")
    DURABLE_JOBS["LIMITS"] = {"tenant": "2", "openai": "5, 60/min"}

The *key* of a job is a text such as "tenant:7". The part before the colon is the *name* of its limit.
"""

import inspect
import re
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from math import inf
from string import Formatter

from django.core.exceptions import ImproperlyConfigured

from durable_jobs import conf
from durable_jobs.validation import Results, to_json

PAUSE = (
    "pause:"  # begins Job.blocked_by of a job that a pause holds, so no limit can have this name
)
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
# With few digits, so that no database refuses the number or the time.
PART = re.compile(
    r"([1-9]\d{0,8})(?:/([1-9]\d{0,4})?([smhd]|(?:sec(?:ond)?|min(?:ute)?|hour|day)s?))?"
)


@dataclass(frozen=True)
class Limit:
    running: float = inf  # concurrently
    starts: float = inf  # in `period`
    period: timedelta = timedelta()
    rate: str = ""  # as it is shown, such as "60/min"


@cache
def parse(text):
    """Return the Limit of a text such as "5", "60/min" or "5, 60/min". Raises ValueError."""
    fields = {}
    for part in text.replace(" ", "").split(","):
        found = PART.fullmatch(part)
        number, times, unit = found.groups() if found else (0, None, "")
        name = "starts" if unit else "running"
        if not number or name in fields:
            raise ValueError(f'{text!r} is no limit: write "5", "60/min" or "5, 60/min"')
        fields[name] = int(number)
        if unit:
            period = timedelta(seconds=int(times or 1) * SECONDS[unit[0]])
            fields |= {"period": period, "rate": part}
    return Limit(**fields)


def limit_of(key):
    """Return the Limit of a key. A name that is not in DURABLE_JOBS['LIMITS'] allows nothing: see admission.admit_due()."""
    text = conf.LIMITS.get(name_of(key))
    return Limit(running=0) if text is None else parse(str(text))


def name_of(key):
    return key.partition(":")[0]


def check_settings(tasks):
    """Raise ImproperlyConfigured if DURABLE_JOBS['LIMITS'] is invalid, or lacks the limit of one of these tasks."""
    if not isinstance(conf.LIMITS, dict):
        example = '{"name": "5, 60/min"}'
        raise ImproperlyConfigured(f"DURABLE_JOBS['LIMITS'] is {conf.LIMITS}: write {example}.")
    for name, text in conf.LIMITS.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name + ":" == PAUSE:
            raise ImproperlyConfigured(
                f"DURABLE_JOBS['LIMITS']: {name!r} cannot be the name of a limit."
            )
        try:
            parse(str(text))
        except ValueError as error:
            raise ImproperlyConfigured(f"DURABLE_JOBS['LIMITS'][{name!r}]: {error}.") from None
    for task in tasks:
        limit = getattr(task, "limit", None)
        if getattr(task, "_is_job", False):
            check_name(task)
        elif isinstance(limit, str) and name_of(limit) in conf.LIMITS:
            error = (
                f"{task.name} has limit={limit!r}, but only a job has a limit: add base=JobTask."
            )
            raise ImproperlyConfigured(error)


def check_name(task):
    if task.limit is not None and (name := name_of(task.limit)) not in conf.LIMITS:
        error = f"{task.name} has the limit {name!r}, which is not in DURABLE_JOBS['LIMITS']."
        raise ImproperlyConfigured(error)


def check_template(task):
    """Raise TypeError if the `limit` of this task is no text, or names an argument that it does not have."""
    if (limit := task.limit) is None:
        return
    if not isinstance(limit, str) or not limit:
        error = 'it must be a text, such as "tenant:{tenant_id}"'
    elif "{" in name_of(limit):
        error = "it must begin with a name of DURABLE_JOBS['LIMITS']"
    elif unknown := arguments_in(limit) - parameters(task).keys():
        error = f"the task has no argument {min(unknown)!r}"
    else:
        return
    raise TypeError(f"{task.name}: limit={limit!r}: {error}")


def arguments_in(template):
    """Return the names of the arguments in a text such as "tenant:{tenant_id}" or "tenant:{row[tenant]}"."""
    fields = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return {re.split(r"[.[]", name)[0] for name in fields}


def parameters(task):
    """Return {name: default} of the arguments of a task."""
    function = getattr(task, "__wrapped__", task.run)
    found = inspect.signature(inspect.unwrap(function)).parameters.items()
    return {name: each.default for name, each in found}


def key_of(task, args, kwargs):
    """Return the key of a job with these arguments, or None.

    Raises TypeError if the arguments give no key, or if it depends on a result that is not known yet;
    ValueError if it is too long.
    """
    if (key := getattr(task, "limit", None)) is None:
        return None
    check_name(task)
    if "{" in key:
        given = inspect.signature(task.__header__).bind(*args, **kwargs).arguments
        values = parameters(task) | given
        if any(isinstance(values[name], Results) for name in arguments_in(key)):
            error = f"the limit of {task.name} cannot depend on the results of its batch"
            raise TypeError(error)
        try:
            key = key.format_map(values)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise TypeError(f"the limit {key!r} of {task.name} has no value: {error!r}") from None
    if len(key) > 255:
        raise ValueError(f"the key of a limit has at most 255 characters: {key:.50}…")
    to_json(key)  # may raise ValueError
    return key
