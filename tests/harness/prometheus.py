"""A real Prometheus, which scrapes a stack."""

import subprocess
from functools import partial

from . import need
from .project import Process, fetch, free_ports, responds


class Prometheus(Process):
    """Prometheus in a folder that has its prometheus.yml and the rules that this file names."""

    def __init__(self, folder):
        need("prometheus")
        [port] = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        options = "--config.file prometheus.yml --storage.tsdb.path data --log.level warn"
        command = f"prometheus {options} --web.listen-address 127.0.0.1:{port}"
        is_ready = partial(responds, f"{self.url}/api/v1/query?query=1")
        super().__init__(command.split(), folder / "prometheus.log", is_ready=is_ready, cwd=folder)

    def ask(self, path, **query):
        return fetch(f"{self.url}/api/v1/{path}", params=query)[2]["data"]

    def value(self, expression):
        """Return the values of an expression now, as [(labels, value)]."""
        found = self.ask("query", query=expression)["result"]
        return [(each["metric"], float(each["value"][1])) for each in found]


def promtool(*arguments, cwd=None, input=None):
    """Return what promtool prints. Fails if it does."""
    need("promtool", "prometheus")
    command = ["promtool", *arguments]
    result = subprocess.run(command, cwd=cwd, input=input, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
