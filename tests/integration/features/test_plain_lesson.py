"""The lessons of Celery's own documentation, typed into the default output, work as written.

They are "First Steps with Django", "Next Steps", "Canvas" and "Periodic Tasks". Nothing here comes
from a page of the template.
"""

import re
from contextlib import suppress
from pathlib import Path

import pytest

from harness.outputs import plain_output
from harness.project import Console, Site, connects, free_ports, started, wait_for
from harness.servers import servers_of, variables_of

# First Steps with Django: demoapp/tasks.py and demoapp/models.py
TASKS = """
# Create your tasks here

from demoapp.models import Widget

from celery import shared_task


@shared_task
def add(x, y):
    return x + y


@shared_task
def mul(x, y):
    return x * y


@shared_task
def xsum(numbers):
    return sum(numbers)


@shared_task
def count_widgets():
    return Widget.objects.count()


@shared_task
def rename_widget(widget_id, name):
    w = Widget.objects.get(id=widget_id)
    w.name = name
    w.save()
"""
MODELS = """
from django.db import models


class Widget(models.Model):
    name = models.CharField(max_length=140)
"""
# First Steps with Django and Periodic Tasks: the end of config/celery.py
CELERY = """

@app.task(bind=True, ignore_result=True)
def debug_task(self):
    print(f'Request: {self.request!r}')


@app.on_after_finalize.connect
def setup_periodic_tasks(sender: Celery, **kwargs):
    # Calls test('hello') every second.
    sender.add_periodic_task(1.0, test.s('hello'), name='add every second')


@app.task
def test(arg):
    print(arg)
    open("said", "w").write(arg)
"""
SETTINGS = """
INSTALLED_APPS += ["demoapp"]
CELERY_BEAT_SCHEDULE["add-every-second"] = {
    "task": "demoapp.tasks.rename_widget",
    "schedule": 1.0,
    "args": (1, "from beat"),
}
"""
IMPORTS = """
from celery import chain, chord, group
from demoapp.models import Widget
from demoapp.tasks import *
"""


@pytest.fixture(scope="module")
def lesson(project, tmp_path_factory):
    """The project with the lesson's app, and the processes that the lesson starts."""
    project.call(".venv/bin/python", "manage.py", "startapp", "demoapp")
    (project / "demoapp/tasks.py").write_text(TASKS)
    (project / "demoapp/models.py").write_text(MODELS)
    project.append("config/settings.py", SETTINGS)
    project.append("config/celery.py", CELERY)
    folder = tmp_path_factory.mktemp("lesson")
    servers = servers_of(project, folder)
    variables = variables_of(servers, project)
    [port] = free_ports(1)
    processes = [Console(project, folder / "console.log", **variables)]
    for words in "worker -l INFO", "beat -l INFO", f"flower --port={port}":
        log = folder / f"{words.split()[0]}.log"
        processes.append(project.process(f"celery -A config {words}", log, **variables))
    console, worker, *_ = processes
    worker.is_ready = lambda: " ready." in worker.printed
    with started(*servers):
        project.manage("makemigrations", "demoapp", **variables)
        project.manage("migrate", **variables)
        with started(*processes):
            wait_for(lambda: connects(port))
            lesson = Lesson(project, None, {**variables, "PORT": 0, "FLOWER_PORT": port})
            lesson.worker, lesson.console = worker, console
            try:
                yield lesson
            finally:
                for process in processes:
                    print(process.printed[-3000:])


class Lesson(Site):
    """Started by the commands of the lesson, not by `make run`. It has no web server."""

    def ask(self, code):
        """Type this into `python manage.py shell`. Return its `result`."""
        return super().ask(IMPORTS + code)

    def celery(self, *words):
        command = ".venv/bin/celery", "-A", "config", *words
        return self.project.call(*command, **self.environment)

    def shows(self, text, *words):
        """Whether this command shows the text. It fails if no worker answers within a second."""
        with suppress(AssertionError):
            return text in self.celery(*words)


@plain_output
def test_the_project_has_the_files_of_the_lesson(project):
    celery = project.read("config/celery.py")
    for line in [
        'os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")',
        'app = Celery("config")',
        'app.config_from_object("django.conf:settings", namespace="CELERY")',
        "app.autodiscover_tasks()",
    ]:
        assert f"\n{line}\n" in celery
    init = project.read("config/__init__.py")
    assert "from .celery import app as celery_app" in init
    assert re.search(r"""__all__ = [(\[]["']celery_app["']""", init)


@plain_output
def test_first_steps(lesson):
    code = """
r = add.delay(4, 4)
result = [r.get(timeout=60), r.ready(), r.successful(), r.failed(), r.state]
"""
    assert lesson.ask(code) == [8, True, True, False, "SUCCESS"]
    assert "demoapp.tasks.add" in lesson.worker.printed  # the worker's list of tasks
    assert lesson.ask("result = count_widgets.delay().get(timeout=60)") == 0


@plain_output
def test_an_exception_is_the_callers(lesson):
    code = """
r = add.delay(2, "2")
error = r.get(propagate=False, timeout=60)
result = [type(error).__name__, r.failed(), r.successful(), r.state, bool(r.traceback)]
"""
    assert lesson.ask(code) == ["TypeError", True, False, "FAILURE", True]


@plain_output
def test_a_task_is_sent_after_the_commit(lesson):
    code = """
from django.db import transaction
with transaction.atomic():
    widget = Widget.objects.create(name="new")
    rename_widget.delay_on_commit(widget.pk, "renamed")
result = widget.pk
"""
    pk = lesson.ask(code)
    name = f"result = Widget.objects.get(pk={pk}).name"
    wait_for(lambda: lesson.ask(name) in ("renamed", "from beat"))


@plain_output
def test_canvas(lesson):
    code = """
partial = add.s(2)
g = group(add.s(i) for i in range(10))
result = [
    add.apply_async((2, 2), countdown=1).get(timeout=60),
    add.signature((2, 2), countdown=1).delay().get(timeout=60),
    partial.delay(4).get(timeout=60),
    group(add.s(i, i) for i in range(10))().get(timeout=60),
    g(10).get(timeout=60),
    chain(add.s(4, 4) | mul.s(8))().get(timeout=60),
    (add.s(4, 4) | mul.s(8))().get(timeout=60),
    chord((add.s(i, i) for i in range(10)), xsum.s())().get(timeout=60),
    (group(add.s(i, i) for i in range(10)) | xsum.s())().get(timeout=60),
    add.starmap(zip(range(3), range(3))).delay().get(timeout=60),
    add.chunks(zip(range(10), range(10)), 5)().get(timeout=60),
]
"""
    doubled = [2 * number for number in range(10)]
    assert lesson.ask(code) == [
        *[4, 4, 6, doubled, list(range(10, 20)), 64, 64, 90, 90],
        [0, 2, 4],
        [doubled[:5], doubled[5:]],
    ]


@plain_output
def test_beat_starts_periodic_tasks(lesson):
    """From the settings, and from a function in config/celery.py."""
    lesson.ask("Widget.objects.get_or_create(pk=1)\nresult = None")
    wait_for(lambda: lesson.ask("result = Widget.objects.get(pk=1).name") == "from beat")
    wait_for(Path(lesson.project / "said").exists)
    assert "hello" in lesson.worker.printed


@plain_output
def test_the_commands_of_the_lesson(lesson):
    wait_for(lambda: lesson.shows("OK", "status"))
    wait_for(lambda: lesson.shows("pong", "inspect", "ping"))
    wait_for(lambda: lesson.shows("empty", "inspect", "active"))  # Beat starts a task each second
    wait_for(lambda: lesson.shows("rename_widget", "inspect", "registered"))
    task = lesson.celery("call", "demoapp.tasks.add", "--args", "[3, 4]").strip()
    code = f"from celery.result import AsyncResult\nresult = AsyncResult({task!r}).result"
    wait_for(lambda: lesson.ask(code) == 7)
    assert "7" in lesson.celery("result", task)
    lesson.celery("call", "config.celery.debug_task")
    wait_for(lambda: "Request: <Context" in lesson.worker.printed)


@plain_output
def test_flower_shows_the_task(lesson):
    task = lesson.ask("r = add.delay(5, 5)\nr.get(timeout=60)\nresult = r.id")
    assert wait_for(lambda: lesson.find_in_flower(task))["result"] == "10"
