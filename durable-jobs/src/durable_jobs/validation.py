"""What a row can store: JSON of a limited size, and texts without characters that PostgreSQL refuses."""

import json
import re
import uuid
from contextlib import suppress

from kombu.utils.json import dumps, loads

MAX_BYTES = 60_000  # of a job's arguments as JSON: each broker takes a message of this size
MAX_RESULT_BYTES = 1_000_000
MAX_COUNTDOWN = 10 * 365 * 86400  # seconds: a longer countdown is probably in milliseconds


class Results(list):
    """Stands for the results of a batch among the arguments of its callback, until they are known."""


# In JSON: NUL, and half of a surrogate pair. PostgreSQL stores neither.
UNSTORABLE = re.compile(r"\\u0000|\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]..")


def to_json(value):
    """Return the JSON of a value.

    As in Celery's messages, a datetime, a UUID or a Decimal becomes a dictionary that names its type,
    and the task function gets the original value. Raises TypeError, ValueError or RecursionError if a value
    cannot be JSON, or has a character that PostgreSQL cannot store.
    """
    text = dumps(value, allow_nan=False)
    # Remove escaped backslashes first: in a text, \\u0000 is no NUL.
    if r"\u" in text and (match := UNSTORABLE.search(text.replace(r"\\", " "))):
        raise ValueError(f"the database cannot store the character {match[0]}")
    return text


def as_json(args, kwargs):
    """Return `args` and `kwargs` as a row stores them. See to_json().

    Raises TypeError if they are not JSON, or have a dictionary that a worker could not read; ValueError if they are
    too large.
    """
    try:
        text = to_json([args, kwargs])
        if '"__type__"' in text:
            loads(text)
    except (RecursionError, ValueError) as error:
        raise TypeError(f"The arguments cannot be stored as JSON: {error}") from error
    check_size("The arguments have", text, MAX_BYTES, "pass an id")
    return json.loads(text)


def check_size(what, text, limit, hint):
    """Raise ValueError if this JSON is too large. It is ASCII, so each character is a byte."""
    if len(text) > limit:
        raise ValueError(f"{what} {len(text):,} bytes, more than {limit:,}: {hint}")


def uuids(ids):
    """Return {UUID: id} for those ids that are UUIDs: a plain task may have any other text as its id."""
    valid = {}
    for id in ids:
        with suppress(ValueError):
            valid[uuid.UUID(str(id))] = id
    return valid


def printable(text):
    """Return at most 10,000 characters that PostgreSQL accepts: without NUL, with ? for surrogates."""
    return str(text)[:10_000].replace("\0", "").encode(errors="replace").decode()
