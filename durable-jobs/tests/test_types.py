"""mypy and pyright accept the right calls of a project, and name each wrong one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from settings import SOURCE
from test_manual import PAGE, SECTION

TYPED = Path(__file__).parent / "typed"
RIGHT, WRONG = TYPED / "right.py", TYPED / "wrong.py"


def mypy(folder):
    command = ["mypy", "--strict", "--follow-imports=silent", "--cache-dir", folder / "cache"]
    printed = run(*command, RIGHT, WRONG)
    errors = re.findall(r"^(.+\.py):(\d+): error: (.*)$", printed, re.MULTILINE)
    return [(Path(file).name, int(line), text) for file, line, text in errors]


def pyright(folder):
    """Its wheel has no program, but downloads one. basedpyright's has pyright's and its rules."""
    config = {"include": [str(TYPED)], "extraPaths": [str(SOURCE)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    printed = run("basedpyright", "--outputjson", "-p", folder, "--pythonpath", sys.executable)
    return [
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["message"])
        for each in json.loads(printed)["generalDiagnostics"]
    ]


def run(program, *arguments):
    command = [sys.executable, "-m", program, *arguments]
    env = {"MYPYPATH": str(SOURCE), "PATH": ""}
    return subprocess.run(command, env=env, cwd=TYPED, capture_output=True, text=True).stdout


@pytest.mark.parametrize("checker", [mypy, pyright])
def test_type_checkers_accept_right_calls_and_name_each_wrong_one(checker, tmp_path):
    errors = checker(tmp_path)
    assert [each for each in errors if each[0] == RIGHT.name] == []
    lines = enumerate(WRONG.read_text("utf-8").splitlines(), start=1)
    marks = "# wrong", f"# wrong to {checker.__name__}"
    wrong = {number for number, line in lines if line.endswith(marks)}
    assert {line for _, line, _ in errors} == wrong and len(wrong) > 10, errors


def test_each_function_of_the_reference_is_called():
    listed = re.findall(r"`(?:\w+\.)?(\w+)\(", "".join(text for _, text in SECTION.findall(PAGE)))
    called = set(re.findall(r"\b(\w+)\(", RIGHT.read_text("utf-8")))
    assert called >= set(listed) >= {"enqueue", "enqueue_many"}
