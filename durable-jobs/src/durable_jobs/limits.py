"""Limits: which key a job has, and what DURABLE_JOBS['LIMITS'] says about it. admission.py lets jobs with a key wait.

    @job(limit=lambda tenant_id, **_: f"tenant:{tenant_id}")
    DURABLE_JOBS["LIMITS"] = {"tenant": "2", "openai": "5, 60/min"}

The *key* of a job is a text such as "tenant:7". The part before the colon is the *name* of its limit.
"""

import re
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from inspect import signature
from math import inf

from durable_jobs import conf
from durable_jobs.validation import Results

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

    @property
    def ahead(self):
        """How many jobs may be admitted ahead of their start, so that workers need not wait: a tenth of the rate."""
        return max(1, self.starts // 10)

    @property
    def interval(self):
        """The time between two starts.

        All jobs that are ahead may start at once: with 60/min, 6. The interval is then 60/55 s, so that only 54 others
        start within a minute of the first. So no `period` has more than `starts`.
        """
        return self.period / (self.starts + 1 - self.ahead)


@cache
def parse(text):
    """Return the Limit of a text such as "5", "60/min" or "5, 60/min". Raises ValueError."""
    fields = {}
    for part in text.replace(" ", "").split(","):
        match = PART.fullmatch(part)
        number, times, unit = match.groups() if match else (0, None, "")
        name = "starts" if unit else "running"
        if not number or name in fields:
            raise ValueError(f'{text!r} is not a valid limit: write "5", "60/min" or "5, 60/min"')
        fields[name] = int(number)
        if unit:
            period = timedelta(seconds=int(times or 1) * SECONDS[unit[0]])
            fields |= {"period": period, "rate": part}
    return Limit(**fields)


def limit_of(key):
    """Return the Limit of a key. If it is gone from DURABLE_JOBS['LIMITS'], its jobs wait: see checks.py."""
    text = conf.LIMITS.get(name_of(key))
    return Limit(running=0) if text is None else parse(str(text))


def name_of(key):
    return key.partition(":")[0]


def check_key(key):
    """Raise ValueError unless this is the key of a limit in DURABLE_JOBS['LIMITS']."""
    is_text = isinstance(key, str) and key.isprintable() and len(key) <= 255
    if not is_text or re.search("[ ,]", key):
        raise ValueError(
            f"its key must be a text of at most 255 characters without spaces and commas, not {key!r:.50}"
        )
    if name_of(key) not in conf.LIMITS:
        raise ValueError(f"{name_of(key)!r} is not in DURABLE_JOBS['LIMITS']")


def key_of(task, args, kwargs):
    """Return the key of a job with these arguments, or None.

    A function gets those arguments by name that the caller has given, without the results of a batch. Raises
    ValueError if it fails or if the key is wrong.
    """
    key = getattr(task, "limit", None)
    try:
        if callable(key):
            # Not the function itself: its annotations may name what only type checkers import.
            header = task._limit_header or task.__header__
            arguments = signature(header).bind(*args, **kwargs).arguments.items()
            key = key(
                **{name: value for name, value in arguments if not isinstance(value, Results)}
            )
        if key is not None:
            check_key(key)
    except Exception as error:
        raise ValueError(f"the limit of {task.name}: {error}") from error
    return key
