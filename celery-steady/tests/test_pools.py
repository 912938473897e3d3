"""Real workers on Redis: what only one pool needs."""

import time

from servers import until
from test_worker import test_a_task_longer_than_the_visibility_timeout_starts_once as starts_once


def test_a_solo_worker_renews_while_its_task_runs(start, steady, send, calls, settled, redis):
    starts_once("solo", start, steady, send, calls, settled, redis)


def test_a_worker_without_a_child_that_has_started_shows_no_life(start, steady, tmp_path):
    file, gate = tmp_path / "alive", tmp_path / "gate"
    steady["worker_proc_alive_timeout"] = 1000
    options = ["--heartbeat-interval", "1"]
    start(steady, options=options, LIVENESS_FILE=str(file), GATE=str(gate))
    time.sleep(2.5)  # two heartbeats
    assert not file.exists()
    gate.touch()
    until(file.exists, "the file is touched")


def test_a_worker_without_an_event_loop_shows_life(start, steady, tmp_path):
    folders = dict.fromkeys(["data_folder_in", "data_folder_out", "control_folder"], str(tmp_path))
    own = {
        "broker_url": "filesystem://",
        "broker_transport_options": folders,
        "broker_transport": None,
    }
    options = ["--heartbeat-interval", "1"]
    file = tmp_path / "alive"
    start({**steady, **own}, options=options, LIVENESS_FILE=str(file))
    until(file.exists, "the file is touched")


def test_a_worker_says_once_that_its_imports_exceed_the_memory_limit(start, steady):
    name = "worker_max_memory_per_child"
    for kilobytes, lines in (1, 1), (10**9, 0):
        assert start({**steady, name: kilobytes}).text().count(name) == lines
