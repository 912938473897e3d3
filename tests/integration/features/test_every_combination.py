"""Every combination of choices bakes to a clean project. test_bake.py bakes a few of them."""

import itertools

import pytest

from harness.bake import COMBINATIONS, name
from test_bake import check_project

LARGEST = ("broker", "result_backend", "durable_jobs", "worker_pool")


def largest(answers):
    return name({option: answers[option] for option in LARGEST})


GROUPS = {key: list(group) for key, group in itertools.groupby(COMBINATIONS, largest)}
assert sum(map(len, GROUPS.values())) == len(COMBINATIONS), "options that stand between these"


@pytest.mark.promise("Every combination works")
@pytest.mark.usefixtures("hooks_in_this_process")
@pytest.mark.parametrize("combinations", GROUPS.values(), ids=GROUPS)
def test_every_combination_is_clean(bake, is_new, combinations):
    for answers in combinations:
        print(name(answers))  # pytest shows the last one if the check fails
        check_project(bake(**answers), is_new)
