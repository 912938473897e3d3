"""The versions of Django, Celery and Python that the library supports."""

import re
import runpy

from .bake import ABOUT_LIBRARY, LIBRARY, PINNED

ABOUT = ABOUT_LIBRARY["project"]


def minors(oldest, newest):
    """Return the versions from "5.5" to "5.7"."""
    (major, first), (_, last) = oldest.split("."), newest.split(".")
    return [f"{major}.{minor}" for minor in range(int(first), int(last) + 1)]


OLDEST_CELERY = re.search(r"celery>=([\d.]+)", " ".join(ABOUT["dependencies"]))[1]
NEWEST_CELERY = runpy.run_path(LIBRARY / "src/durable_jobs/versions.py")["NEWEST"]
SUPPORTED = {
    "django": [each.split()[-1] for each in ABOUT["classifiers"] if re.search(r":: \d", each)],
    "celery": minors(OLDEST_CELERY, ".".join(map(str, NEWEST_CELERY))),
    "python": minors(PINNED.oldest_python, PINNED.python),
}
