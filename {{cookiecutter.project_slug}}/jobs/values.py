"""What a row can store: JSON of a limited size, and texts without characters that PostgreSQL refuses."""

import json
import re

from kombu.utils.json import dumps

from . import conf

# In JSON: NUL, and half of a surrogate pair. PostgreSQL stores neither.
UNSTORABLE = re.compile(r"\\u0000|\\ud[89ab]..(?!\\ud[c-f])|(?<!\\ud[89ab]..)\\ud[c-f]..")


def to_json(value):
    """Return the JSON of a value.

    As in Celery's messages, a datetime, a UUID or a Decimal becomes a dictionary that names its type,
    and the body gets the original value. Raises TypeError, ValueError or RecursionError if a value
    cannot be JSON, or has a character that PostgreSQL cannot store.
    """
    text = dumps(value, allow_nan=False)
    # Remove escaped backslashes first: in a text, \\u0000 is no NUL.
    if r"\u" in text and (found := UNSTORABLE.search(text.replace(r"\\", " "))):
        raise ValueError(f"the database cannot store the character {found[0]}")
    return text


def as_json(args, kwargs):
    """Return `args` and `kwargs` as a row stores them, and their size in bytes. See to_json()."""
    text = to_json([args, kwargs])
    return *json.loads(text), len(text)  # ASCII, so one byte for each character


def size_error(size):
    """Return the error text for arguments of this size in bytes, or None if they are not too large."""
    if size > conf.JOB_MAX_BYTES:
        limit = f"JOB_MAX_BYTES is {conf.JOB_MAX_BYTES:,}"
        return f"The arguments have {size:,} bytes, but {limit}: pass an id"


def printable(text):
    """Return at most 10,000 characters that PostgreSQL accepts: without NUL, with ? for surrogates."""
    return str(text)[:10_000].replace("\0", "").encode(errors="replace").decode()
