"""Rows for the table in docs/reliability.md: what a fault does to plain tasks, and where."""

import pytest


@pytest.fixture
def record_fault(request, record_property):
    """A function that adds a row.

    `seconds` were measured, with short timings. `after` says what they are in production, if they
    depend on these timings.
    """

    def record(fault, what, seconds=None, after=""):
        place = "{broker}-{pool}".format(**request.node.callspec.params["running"])
        record_property("fault", [fault, what, after, place, seconds])

    return record


def pytest_terminal_summary(terminalreporter):
    """Print one row for all brokers and pools where the same happened."""
    rows = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in report.user_properties:
            if name == "fault":
                fault, what, after, place, seconds = value
                rows.setdefault((fault, what, after), []).append((place, seconds))
    if rows:
        terminalreporter.section("what can be lost")
    for (fault, what, after), found in sorted(rows.items()):
        places = ", ".join(sorted(place for place, _ in found))
        times = sorted(round(seconds) for _, seconds in found if seconds is not None)
        measured = f"{times[0]} to {times[-1]} s" if times else "–"
        terminalreporter.write_line(f"| {fault} | {places} | {what} | {after or measured} |")
