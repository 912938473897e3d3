"""Which versions of Celery and kombu a fault or a test is about. Others are skipped, with the reason."""

import pytest

from celery_steady.versions import minor

# {fault or test: (package, its first minor version, its last or None, why not others)}
ONLY = {}


def skip_on_other_versions(items):
    for item in items:
        names = {item.name, item.originalname}
        if hasattr(item, "callspec"):
            names.add(item.callspec.id)
        for name in names & ONLY.keys():
            package, first, last, reason = ONLY[name]
            if not first <= minor(package) <= (last or minor(package)):
                item.add_marker(pytest.mark.skip(reason=f"{package} {minor(package)}: {reason}"))
