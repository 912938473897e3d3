"""The schedule, in settings.py and in the admin: each task starts, once, as its entry says."""

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest

from harness.bake import CHOICES, DEFAULTS, WITH_JOBS, baked
from harness.outputs import outputs
from harness.project import started, wait_for
from harness.servers import broker_class
from harness.stack import TIMINGS, prepare

INTERVALS = ["job-interval", "plain-interval", "function-interval"]  # names of entries
CRONTABS = ["job-crontab", "plain-crontab", "function-crontab"]
ONCE = [name for name in INTERVALS + CRONTABS if "plain" not in name]
SETTINGS = """
LOGGING["loggers"]["celery.beat"]["level"] = "INFO"  # which entries it starts
"""
CODE = """
from datetime import datetime
CELERY_BEAT_SCHEDULE = {{
    f"{{task}}-{{due}}": {{
        "task": f"faults.tasks.scheduled_{{task}}",
        "schedule": schedule,
        "args": [f"{{task}}-{{due}}"],
        "kwargs": {{"pages": 3}},
        "options": {{"queue": "io"}} | ({{"expires": 3600}} if task == "plain" else {{}}),
        "last_run_at": datetime.fromisoformat(last),
    }}
    for task in ("job", "plain", "function")
    for due, schedule, last in (
        ("interval", 3600, "{hour_ago}"),
        ("crontab", crontab(minute={minute}), "{just_now}"),
    )
}}
"""
ADMIN = """
import json
from datetime import datetime
from django.test import Client
from django_celery_beat.models import CrontabSchedule, IntervalSchedule, PeriodicTask
from users.models import User

client = Client(HTTP_HOST="localhost", headers={"x-forwarded-proto": "https"})
client.force_login(User.objects.create_superuser("staff"))

def save(name, task, **fields):
    \"\"\"Fill in the form of the admin. Return the page if it shows errors.\"\"\"
    data = {"name": name, "task": task, "args": json.dumps([name]), "kwargs": '{"pages": 3}',
            "headers": "{}", "queue": "io", "enabled": "on", **fields}
    page = client.post("/admin/django_celery_beat/periodictask/add/", data)
    return page.content.decode() if page.status_code == 200 else ""

interval = IntervalSchedule.objects.create(every=1, period="hours").pk
crontab = CrontabSchedule.objects.create(minute=minute, hour="*").pk
for task in ("job", "plain", "function"):
    for field, pk, last in [("interval", interval, hour_ago), ("crontab", crontab, just_now)]:
        more = {"expire_seconds": 3600} if task == "plain" else {}
        name = f"{task}-{field}"
        assert save(name, f"faults.tasks.scheduled_{task}", **{field: pk}, **more) == ""
        last = datetime.fromisoformat(last)
        assert PeriodicTask.objects.filter(name=name).update(last_run_at=last) == 1

# A job cannot expire: Beat counts an error.
save("broken", "faults.tasks.scheduled_job", interval=interval, expire_seconds=60)
last = datetime.fromisoformat(hour_ago)
result = PeriodicTask.objects.filter(name="broken").update(last_run_at=last)
"""


def times():
    """An interval of an hour is due at once, and the crontab once, after one to three minutes."""
    now = datetime.now(UTC)
    return {
        "hour_ago": (now - timedelta(hours=1)).isoformat(),
        "just_now": (now - timedelta(minutes=2)).isoformat(),
        "minute": (now + timedelta(seconds=135)).minute,
    }


@pytest.fixture
def stack(request, cookies_session, tmp_path_factory, database):
    """A project with this choice, a worker and no Beat."""
    broker, folder = broker_class("redis"), tmp_path_factory.mktemp("stack")
    project = baked(
        cookies_session, {**WITH_JOBS, **broker.answers, "periodic_tasks": request.param}
    )
    stack = prepare(project, broker, folder, database, **TIMINGS)
    project.append("config/settings.py", SETTINGS)
    project.manage("collectstatic", "-v0", "--noinput", DEBUG="False")  # the admin needs its files
    stack.processes = [stack.other]
    with started(stack):
        yield stack


def calls(stack):
    """Return what the tasks were called with."""
    return [tuple(call) for kind, _, _, _, *call in stack.lines() if kind == "call"]


def has_sent(beat, names):
    return all(f"Sending due task {name} " in beat.printed for name in names)


@pytest.mark.parametrize("stack", CHOICES["periodic_tasks"], indirect=True)
def test_each_task_of_the_schedule_starts_once(stack):
    """A job, a plain task and a Django task, each at an interval and at a time, with two Beats."""
    at = times()
    in_admin = "django_celery_beat" in stack.project.read("config/settings.py")
    if in_admin:
        stack.ask(ADMIN, **at)
    else:
        stack.project.append("config/settings.py", CODE.format(**at))
    first = stack.make_beat("first").start()
    wait_for(lambda: set(INTERVALS) <= {name for name, *_ in calls(stack)})
    second = stack.make_beat("second").start()
    wait_for(lambda: has_sent(first, CRONTABS) and has_sent(second, CRONTABS))
    wait_for(lambda: [name for name, *_ in calls(stack)].count("plain-crontab") == 2)
    wait_for(lambda: stack.ask("result = not Job.objects.filter(state__in=ACTIVE).exists()"))

    found = Counter(calls(stack))
    assert set(found) == {(name, "3", "io", str("plain" in name)) for name in INTERVALS + CRONTABS}
    # Two Beats start a plain task twice.
    assert [found[name, "3", "io", "False"] for name in ONCE] == [1, 1, 1, 1]
    rows = stack.ask("result = list(Job.objects.values_list('args', 'state', 'queue', 'retries'))")
    assert sorted(rows) == sorted([[name], "succeeded", "io", 0] for name in ONCE)


EXPIRES = """
from config.celery import app
beat = app.Beat().Service(app, scheduler_cls=app.conf.beat_scheduler).get_scheduler()
entries = beat.schedule.values()
print(*(entry.options.get("expires") for entry in entries if "forgotten" in entry.task))
"""


@outputs(*({**DEFAULTS, "periodic_tasks": each} for each in CHOICES["periodic_tasks"]))
def test_an_hourly_task_that_waited_for_an_hour_does_not_run(copied):
    """After a night without workers, all of them would."""
    copied.manage("migrate", "-v0")
    assert copied.shell(EXPIRES) == "3600"
