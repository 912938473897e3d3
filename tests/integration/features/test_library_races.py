"""What `make test` leaves out of the library's own tests, because it takes minutes."""

import re

from harness.bake import LIBRARY
from harness.libraries import run_tests


def test_no_race_is_lost_in_many_rounds(database, tmp_path):
    """150 rounds, unless ROUNDS says another number."""
    url = database.create("races")
    printed = run_tests(LIBRARY, tmp_path, "-k", "races", DATABASE_URL=url)
    assert re.search(r"= \d+ passed, \d+ deselected in", printed), printed
