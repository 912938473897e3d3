"""Editors and type checkers know the engine's public names."""

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from harness.bake import OUTPUT, TEMPLATE

USES = (TEMPLATE / "tests/harness/typed.py").read_text()


@pytest.fixture
def folder(tmp_path):
    """A folder in which basedpyright finds the engine and the packages of this environment."""
    python = Path(sys.prefix)
    options = {"extraPaths": [str(OUTPUT)], "venvPath": str(python.parent), "venv": python.name}
    (tmp_path / "pyrightconfig.json").write_text(
        json.dumps({**options, "typeCheckingMode": "standard"})
    )
    return tmp_path


def test_a_type_checker_reports_wrong_uses_and_no_right_ones(folder):
    (folder / "typed.py").write_text(USES)
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "typed.py"]
    checked = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = json.loads(checked.stdout)["generalDiagnostics"]
    errors = [error for error in found if error["severity"] == "error"]
    lines = USES.splitlines()
    wrong = {number for number, line in enumerate(lines) if line.endswith("# wrong")}
    assert {error["range"]["start"]["line"] for error in errors} == wrong, errors


class Server:
    """A language server: asks it what an editor would show at the end of a text."""

    def __init__(self, folder):
        command = [Path(sys.executable).with_name("basedpyright-langserver"), "--stdio"]
        self.process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.folder, self.asked = folder, 0
        root = {"rootUri": folder.as_uri(), "capabilities": {}, "processId": None}
        self.ask("initialize", workspaceFolders=[{"uri": folder.as_uri(), "name": "app"}], **root)
        self.send("initialized")

    def close(self):
        self.ask("shutdown")
        self.send("exit")
        self.process.communicate(timeout=60)

    def send(self, method, **params):
        self.write({"method": method, "params": params})

    def write(self, message):
        text = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(text), text))
        self.process.stdin.flush()

    def read(self):
        size = None
        while line := self.process.stdout.readline().strip():  # an empty line ends the headers
            name, value = line.split(b": ")
            size = int(value) if name == b"Content-Length" else size
        return json.loads(self.process.stdout.read(size))

    def ask(self, method, **params):
        self.asked += 1
        self.write({"id": self.asked, "method": method, "params": params})
        while True:
            answer = self.read()
            if "method" not in answer and answer["id"] == self.asked:
                return answer["result"]
            if answer.get("method") == "workspace/configuration":  # the server asks the editor
                settings = [{} for _ in answer["params"]["items"]]
                self.write({"id": answer["id"], "result": settings})
            elif "method" in answer and "id" in answer:
                self.write({"id": answer["id"], "result": None})

    def ask_at_end(self, method, text):
        uri = (self.folder / f"at{self.asked}.py").as_uri()
        document = {"uri": uri, "languageId": "python", "version": 1, "text": text}
        self.send("textDocument/didOpen", textDocument=document)
        lines = text.splitlines()
        position = {"line": len(lines) - 1, "character": len(lines[-1])}
        return self.ask(f"textDocument/{method}", textDocument={"uri": uri}, position=position)

    def completions(self, text):
        return {item["label"] for item in self.ask_at_end("completion", text)["items"]}

    def signature(self, text):
        return self.ask_at_end("signatureHelp", text)["signatures"][0]["label"]


@pytest.fixture
def server(folder):
    with closing(Server(folder)) as server:
        yield server


IMPORTS = """
from celery import shared_task
from jobs.models import Batch, Job, Pause
from jobs.tasks import JobTask

@shared_task(base=JobTask, bind=True)
def build_report(self: JobTask, pages: int):
    """


def test_an_editor_completes_and_shows_the_public_names(server):
    shown = server.completions(f"{IMPORTS}Job.objects.")
    assert {"enqueue", "aenqueue", "enqueue_many", "filter", "get"} <= shown
    assert not {"cancel", "run_again", "claim"} & shown
    assert {"cancel", "run_again"} <= server.completions(f"{IMPORTS}Job.objects.filter(pk=1).")
    assert {"enqueue", "aenqueue", "open"} <= server.completions(f"{IMPORTS}Batch.objects.")
    assert {"pause", "resume", "filter"} <= server.completions(f"{IMPORTS}Pause.objects.")
    pause = f"{IMPORTS}pause = Pause.objects.pause('io')\n    pause."
    assert {"name", "reason", "since"} <= server.completions(pause)
    batch = f"{IMPORTS}batch = Batch.objects.enqueue(build_report, [[1]])\n    batch."
    assert {"state", "jobs", "enqueue", "enqueue_many", "cancel"} <= server.completions(batch)
    of_self = server.completions(f"{IMPORTS}self.")
    assert {"report", "cursor", "retry", "request", "then", "batch"} <= of_self
    job = f"{IMPORTS}job = Job.objects.enqueue(build_report, [1])\n    job."
    shown = server.completions(job)
    assert {"state", "public_error", "failures", "cancel", "run_again"} <= shown
    assert {"held_by", "limit_key"} <= shown
    assert {"using", "enqueue", "delay"} <= server.completions(f"{IMPORTS}build_report.")

    options = ["owner: Any", "label: str", "queue: str", "countdown: float", "eta: datetime"]
    options += ["unique: str", "idempotency_key: str"]
    for call in "Job.objects.enqueue(", "Job.objects.aenqueue(", "build_report.using(":
        shown = server.signature(f"{IMPORTS}{call}")
        assert [option for option in options if option not in shown] == [], shown
    assert "cursor: Any" in server.signature(f"{IMPORTS}self.report(")
