"""Every write to a job's row is a function of transitions.py, whose docstring says who calls it."""

import ast
import re

import pytest
from test_imports import MODULES

from durable_jobs import transitions
from durable_jobs.states import ACTIVE, FINAL

METHODS = (
    "update bulk_create bulk_update save create get_or_create update_or_create raw execute copy"
)
# Functions of other modules that call these methods, or are @prepared, by what they write.
OTHERS = {
    "nothing": "admission.oldest admission.oldest_since admission.any_blocked admission.look_at_keys"
    " batches.is_active batches.keep_open database.limit_locks diagnosis.blockers diagnosis.in_time"
    " eager.run_queued migrations.clean_up_sooner",
    "Batch": "batches.open_batch batches.end",
    "Key": "admission.unblock_many admission.claim",
    "Pause": "pauses.pause",
    "Sweep": "beat.sweeper.Sweeper.store_round",
    "Worker": "worker.heartbeat.Heartbeat.write",
    "a dictionary": "messages.message_of statistics.by_queue worker.heartbeat.Heartbeat.start",
    "what transitions.py says": "compiler.execute compiler.insert compiler.insert_many models.Row.save",
}
WRITES = {
    name: function.__doc__.strip().splitlines()[-1].strip()
    for name, function in vars(transitions).items()
    if "→" in (getattr(function, "__doc__", None) or "") and not name.startswith("_")
}


def used(path, module):
    """Return what this file uses of a module."""
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
    ]
    return {node.attr for node in nodes if ast.unparse(node.value) == module}


def writing(node, name):
    """Yield the functions in this module that may write a row."""
    for child in ast.iter_child_nodes(node):
        is_named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
        inner = f"{name}.{child.name}" if is_named else name
        if isinstance(child, ast.Attribute) and child.attr in METHODS.split():
            yield name
        if any("prepared" in ast.unparse(each) for each in getattr(child, "decorator_list", [])):
            yield inner
        yield from writing(child, inner)


def test_only_transitions_writes_to_a_job():
    found = {
        each
        for name, path in MODULES.items()
        for each in writing(ast.parse(path.read_text()), name)
    }
    ours = {each for each in found if each.startswith("transitions.")}
    assert found - ours == set(" ".join(OTHERS.values()).split())
    assert {each.removeprefix("transitions.") for each in ours} - {"_update"} <= WRITES.keys()
    assert [
        name for name, path in MODULES.items() if {"insert", "insert_many"} & used(path, "compiler")
    ] == ["transitions"]


@pytest.mark.parametrize("name", WRITES)
def test_a_write_says_who_calls_it(name):
    states, _, callers = WRITES[name].partition(": ")
    assert set(re.findall(r"\w+", states)) <= {
        *ACTIVE,
        *FINAL,
        *"new blocked or with a limit".split(),
    }
    found = {module for module, path in MODULES.items() if name in used(path, "transitions")}
    assert found == set(callers.split(", "))
