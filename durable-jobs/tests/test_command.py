"""manage.py durable_jobs. tests/integration/faults/test_workers.py has a drill with real workers."""

import shutil
import sys
from io import StringIO

import pytest
from celery import shared_task
from django.core.management import CommandError, call_command
from django.utils import timezone

from durable_jobs import pauses
from durable_jobs.models import Job, Pause
from durable_jobs.tasks import JobTask

pytestmark = pytest.mark.django_db


@shared_task(base=JobTask)
def mail():
    pass


def jobs(*words):
    """Run `manage.py durable_jobs` with these words. Returns what it writes."""
    with StringIO() as written:
        call_command("durable_jobs", *words, stdout=written)
        return written.getvalue()


def test_it_pauses_resumes_and_lists(commit):
    assert jobs("paused") == "nothing is paused\n"
    text = jobs("pause", "celery", mail.name, "--reason", "SMTP is down")
    first, second = text.splitlines()
    since = timezone.localtime(Pause.objects.get(name="celery").since)
    assert first == f"celery: Paused since {since:%H:%M}: SMTP is down"
    assert second.startswith("test_command.mail: Paused since ")
    assert jobs("paused") == text
    assert {pause.name for pause in Pause.objects.all()} == {"celery", mail.name}
    with commit():
        job = mail.enqueue()
    assert Job.objects.get(pk=job.pk).state == "queued"
    with commit():
        assert jobs("resume", "celery") == f"{second}\n"
    with commit():
        assert jobs("resume", mail.name) == "nothing is paused\n"


def test_a_second_pause_keeps_its_time_and_may_change_the_reason():
    jobs("pause", "celery")
    since = Pause.objects.get().since
    jobs("pause", "celery", "--reason", "SMTP is down")
    jobs("pause", "celery")
    pause = Pause.objects.get()
    assert (pause.since, pause.reason) == (since, "SMTP is down")


def test_a_typo_is_answered_with_the_name_that_was_meant():
    with pytest.raises(CommandError, match=f"did you mean {mail.name}?"):
        jobs("pause", mail.name[:-1])


def test_it_says_what_is_wrong():
    assert (
        jobs("status")
        == "No heartbeat from Beat or any worker: they are down or can't reach the database\n"
    )


@pytest.mark.parametrize("command", ["pause", "resume"])
def test_one_wrong_name_changes_nothing(command):
    if command == "resume":
        pauses.pause("celery")
    before = list(Pause.objects.all())
    error = {"pause": "no queue or task is named 'mial'.*celery", "resume": "mial is not paused"}
    with pytest.raises(CommandError, match=error[command]):
        jobs(command, "celery", "mial")
    assert list(Pause.objects.all()) == before


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "required: COMMAND"),
        (["pause"], "required: NAME"),
        (["resume"], "required: NAME"),
        (["stop"], "invalid choice: 'stop'"),
        (["drill"], "add --yes"),  # as DEBUG is off
        (["drill", "--yes"], "CELERY_TASK_ALWAYS_EAGER = False"),
    ],
)
def test_it_says_what_is_missing(words, error):
    with pytest.raises(CommandError, match=error):
        jobs(*words)


def test_a_drill_whose_workers_do_not_start_ends_with_their_log(broker, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("echo"))
    with pytest.raises(CommandError, match="(?s)do not start.*-A nowhere worker"):
        jobs("drill", "--yes", "--app", "nowhere")
