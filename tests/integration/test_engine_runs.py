"""The runs of the engine's own tests that `make test` leaves out, because they take minutes."""

import re

from test_engine import run_tests


def test_the_engine_passes_its_own_tests_with_greenlets_on_sqlite(tmp_path):
    printed = run_tests("gevent", tmp_path, ROUNDS="30")
    assert re.search(r"= \d+ passed, \d+ skipped in", printed), printed


def test_no_race_is_lost_in_many_rounds(database, tmp_path):
    """150 rounds, unless ROUNDS says another number."""
    url = database.create("races")
    printed = run_tests("threads", tmp_path, "-k", "races", DATABASE_URL=url)
    assert re.search(r"= \d+ passed, \d+ deselected in", printed), printed
