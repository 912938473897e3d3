"""What Celery's workers lack. `from celery_steady import Celery` turns it on; README.md says what it brings."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from celery import Celery as Celery  # so that it has the types of celery-types

__version__ = "1.0.0.dev"


def __getattr__(name):
    if name == "Celery":  # imported when it's used: settings name classes of other modules here
        from celery_steady.app import Celery

        return Celery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
