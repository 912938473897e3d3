"""`make chaos`: two random faults a second, while jobs run, and no job is lost."""

import pytest

from harness import chaos
from harness.bake import CHOICES
from harness.servers import broker_class

pytestmark = pytest.mark.xdist_group("chaos")  # one at a time: each needs the whole machine


@pytest.mark.promise("Accepted means stored")
@pytest.mark.promise("One final state")
@pytest.mark.promise("Follow-up jobs and batch callbacks are stored exactly once")
@pytest.mark.parametrize("name", CHOICES["broker"])
def test_chaos_loses_no_job(name, tmp_path, capsys):
    broker_class(name)
    nothing_lost = chaos.run(name, tmp_path, seed=1)
    assert nothing_lost, capsys.readouterr().out
