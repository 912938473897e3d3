"""The operator's pages in the admin: the list of jobs with its filters and actions, and Queues."""

import re
import uuid
from datetime import timedelta

import pytest
from celery import shared_task
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.db.models import F
from django.db.models.functions import Now
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from jobs import publish, updates
from jobs.models import Batch, Job, Pause
from jobs.tasks import JobTask

pytestmark = pytest.mark.django_db
URL = "/admin/jobs/job/"


@shared_task(base=JobTask)
def greet(name="you"):
    return f"Hello {name}"


@shared_task(base=JobTask)
def count():
    """Another task."""


@shared_task(base=JobTask, limit="tenant:{tenant}")
def limited(tenant):
    """A task with a limit."""


@shared_task
def plain():
    """No job."""


def listed(client, query="", url=URL):
    """Return the jobs of a list."""
    response = client.get(f"{url}?{query}")
    assert response.status_code == 200
    return list(response.context["cl"].result_list)


def act(client, action, query="", jobs=(), **data):
    """Do something with these jobs, or with all that match. Returns the messages."""
    data |= {"action": action, "_selected_action": [job.pk for job in jobs]}
    if not jobs:
        data |= {"select_across": "1", "_selected_action": [uuid.uuid4()]}
    page = client.post(f"{URL}?{query}", data, follow=True)
    return [str(message) for message in page.context["messages"]]


def logged():
    """Return who did what."""
    entries = LogEntry.objects.order_by("pk")
    return [(entry.user.username, entry.get_change_message()) for entry in entries]


# Filters


@pytest.fixture
def states(commit):
    """A job in each state."""
    with commit():
        jobs = {"succeeded": Job.objects.enqueue(greet)}
    jobs |= {name: Job.objects.enqueue(greet) for name in ("waiting", "running", "failed")}
    jobs["held"] = Job.objects.enqueue(limited, ["a"])
    jobs["cancelled"] = Job.objects.enqueue(greet)
    jobs["waiting later"] = Job.objects.enqueue(greet, countdown=60)
    jobs["cancelled"].cancel()
    updates.finish(Job.objects.filter(pk=jobs["failed"].pk), "failed")
    running = {"state": "running", "run_token": uuid.uuid4()}
    Job.objects.filter(pk=jobs["running"].pk).update(**running)
    return jobs


def test_each_filter_by_state_finds_the_jobs_in_this_state(admin_client, states):
    for name, job in states.items():
        assert listed(admin_client, f"state={name}") == [job], name
    active = {states[name] for name in ("waiting", "waiting later", "held", "running")}
    assert set(listed(admin_client, "state=active")) == active
    assert admin_client.get(f"{URL}?state=nonsense").headers["Location"] == f"{URL}?e=1"


def test_jobs_are_filtered_by_task_queue_and_date(admin_client):
    old, other, new = (Job.objects.enqueue(task) for task in (greet, count, greet))
    Job.objects.filter(pk=old.pk).update(created_at=Now() - timedelta(days=3), queue="io")
    assert listed(admin_client, f"task={greet.name}") == [new, old]
    assert listed(admin_client, "queue=io") == [old]
    assert listed(admin_client, f"queue=celery&task={count.name}") == [other]
    page = admin_client.get(URL).content.decode()
    [today] = re.findall(r'href="\?(created_at[^"]*)">Today', page)
    assert set(listed(admin_client, today.replace("&amp;", "&"))) == {new, other}


def test_the_filters_names_come_from_the_code_and_not_from_the_table(admin_client):
    Job.objects.enqueue(greet, queue="special")
    Job.objects.update(task="deleted.task")
    with CaptureQueriesContext(connection) as captured:
        page = admin_client.get(URL).content.decode()
    assert not [query for query in captured if "DISTINCT" in query["sql"]]
    for name in greet.name, count.name:
        assert f'href="?task={name}"' in page
    assert f"?task={plain.name}" not in page and "?task=deleted" not in page
    assert re.findall(r'href="\?queue=(\w+)"', page) == ["celery", "cpu", "io"]
    # A link to the list may name others.
    page = admin_client.get(f"{URL}?queue=special&task=deleted.task").content.decode()
    assert "1 job\n" in page and ">special</a>" in page and ">deleted.task</a>" in page


def test_the_search_finds_an_id_and_an_owner(admin_client, user):
    own, other = Job.objects.enqueue(greet, owner=user), Job.objects.enqueue(greet)
    assert listed(admin_client, f"q={other.pk}") == [other]
    assert listed(admin_client, "q=user") == [own]
    assert listed(admin_client, "q=use") == listed(admin_client, f"q={uuid.uuid4()}") == []


def test_the_list_shows_label_queue_and_a_short_error(admin_client):
    job = Job.objects.enqueue(greet, label="For Ada", queue="special")
    updates.finish(Job.objects.filter(pk=job.pk), "failed", error="<b>" + "x" * 5000)
    page = admin_client.get(URL).content.decode()
    assert '"field-label">For Ada<' in page and '"field-queue">special<' in page
    assert f'"field-short_error">&lt;b&gt;{"x" * 76}…<' in page


def test_the_list_loads_no_large_values(admin_client):
    Job.objects.enqueue(greet)
    with CaptureQueriesContext(connection) as captured:
        admin_client.get(URL)
    sql = " ".join(query["sql"] for query in captured)
    assert '"jobs_job"."label"' in sql and '"jobs_job"."args"' not in sql


# Many rows

ROWS = 5000


@pytest.fixture
def many(user):
    """Succeeded jobs of one task, with statistics."""
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    ended = {"state": "succeeded", "finished_at": Now(), "task": greet.name, "queue": "celery"}
    Job.objects.bulk_create(Job(**ended, owner=user) for _ in range(ROWS))
    with connection.cursor() as cursor:
        cursor.execute("UPDATE jobs_job SET created_at = now() - random() * interval '30 days'")
        cursor.execute("ANALYZE jobs_job")


def rows_read(sql):
    """Return how many rows of the table of jobs PostgreSQL reads for a query."""
    with connection.cursor() as cursor:
        cursor.execute(f"EXPLAIN (ANALYZE, TIMING OFF, SUMMARY OFF, FORMAT JSON) {sql}")
        [[[plan]]] = cursor.fetchall()

    def read(node):
        rows = node["Actual Rows"] + node.get("Rows Removed by Filter", 0)
        own = node["Actual Loops"] * rows if node.get("Relation Name") == "jobs_job" else 0
        return own + sum(map(read, node.get("Plans", [])))

    return read(plan["Plan"])


FILTERS = [f"task={count.name}", "queue=io", f"task={greet.name}&queue=io", "q=admin"]
FILTERS += [f"state={state}" for state in ("active", "waiting", "waiting later", "running")]
FILTERS += [f"state={state}" for state in ("failed", "cancelled")]
FILTERS += [f"state=failed&task={greet.name}", f"state=running&task={greet.name}"]


@pytest.mark.parametrize("query", ["", *FILTERS, f"task={greet.name}", "state=succeeded"])
def test_a_page_of_a_filtered_list_reads_only_its_own_rows(many, admin_client, query, monkeypatch):
    """Also if no row matches, when a scan would read all rows before it knows."""
    monkeypatch.setattr("jobs.admin.LatestPages.most", 300)
    with CaptureQueriesContext(connection) as captured:
        found = listed(admin_client, query)
    assert len(found) == (0 if query in FILTERS else 100)
    asked = [query["sql"] for query in captured if 'FROM "jobs_job"' in query["sql"]]
    assert len(asked) == 2  # a count and a page
    assert max(map(rows_read, asked)) <= 310


# Actions


def test_start_now_ends_countdowns_and_pauses_before_a_retry(admin_client, monkeypatch, commit):
    sent = []
    later, retried = (Job.objects.enqueue(greet, countdown=600) for _ in range(2))
    Job.objects.filter(pk=retried.pk).update(retries=2, crashes=1)
    due, ended = Job.objects.enqueue(greet), Job.objects.enqueue(greet)
    ended.cancel()
    before = Job.objects.in_bulk([due.pk, ended.pk])
    with commit():
        monkeypatch.setattr(publish, "send", sent.extend)
        assert Job.objects.all().start_now() == 2
        assert sent == []  # not before the commit
    assert {(job.pk, job.retries, job.crashes, job.times_sent) for job in sent} == {
        (later.pk, 0, 0, 1),
        (retried.pk, 2, 1, 1),
    }
    for job in Job.objects.filter(pk__in=[later.pk, retried.pk]):
        assert job.due_at < job.sweep_at < job.due_at + timedelta(minutes=1)
        assert (job.state, job.times_sent) == ("queued", 1)
    assert not Job.objects.filter(due_at__gt=Now())
    for job in before.values():
        row = Job.objects.get(pk=job.pk)
        assert (row.due_at, row.sweep_at, row.state) == (job.due_at, job.sweep_at, job.state)
    assert Job.objects.all().start_now() == 0


def test_the_sweep_sends_the_message_if_the_broker_refuses_it(commit, broker_down):
    job = Job.objects.enqueue(greet, countdown=600)
    with commit():
        Job.objects.all().start_now()
    assert broker_down == [str(job.pk)]
    job.refresh_from_db()
    assert job.times_sent == 0
    assert max(job.due_at, job.sweep_at) < job.created_at + timedelta(seconds=60)


def test_start_now_takes_the_jobs_of_a_batch_and_of_an_owner_and_many(user):
    batch = Batch.objects.enqueue(greet, [[]] * 1001, countdown=60, owner=user)
    with CaptureQueriesContext(connection) as captured:
        assert batch.jobs.all().start_now() == 1001
    assert len(captured) < 14
    Job.objects.enqueue(greet, countdown=60, owner=user)
    assert Job.objects.filter(owner__username="user").start_now() == 1  # with a join


def test_start_now_makes_a_held_job_due_and_it_waits_for_its_turn(commit, monkeypatch):
    sent = []
    monkeypatch.setattr(publish, "send", sent.extend)
    with commit():
        for countdown in None, None, 60:  # the limit is 2
            Job.objects.enqueue(limited, ["a"], countdown=countdown)
        free = Job.objects.enqueue(limited, ["b"], countdown=60)
    assert len(sent) == 2
    with commit():
        assert Job.objects.all().start_now() == 2
    assert [job.pk for job in sent[2:]] == [free.pk]
    held = Job.objects.get(held_by="tenant:a")
    assert (held.times_sent, held.sweep_at) == (0, None)
    assert held.due_at < held.created_at + timedelta(seconds=50)


def test_actions_take_the_filtered_set(admin_client, states):
    kept = Job.objects.enqueue(count, countdown=60)
    text = act(admin_client, "start_now", f"task={greet.name}")
    assert text == ["1 job due now. 0 skipped, because they were not waiting for their time."]
    kept.refresh_from_db()
    assert kept.due_at > kept.created_at + timedelta(seconds=50)
    text = act(admin_client, "cancel", "state=running")
    assert text == ["1 job cancelled. 0 had already ended."]
    [text] = act(admin_client, "run_again", "state=failed")
    assert "1 job queued again</a>." in text
    assert len(listed(admin_client, "state=waiting")) == 3
    assert logged() == [
        ("admin", f"1 job started now. Filter: task={greet.name}"),
        ("admin", "1 job cancelled. Filter: state=running"),
        ("admin", "1 job queued again. Filter: state=failed"),
    ]


@pytest.mark.parametrize(
    ("action", "state"), [("cancel", "queued"), ("run_again", "failed"), ("start_now", "queued")]
)
def test_a_second_click_takes_the_jobs_that_were_left(admin_client, monkeypatch, action, state):
    """Also without a filter by state: then the newest jobs may be those of the first click."""
    monkeypatch.setattr("jobs.admin.LatestPages.most", 2)
    jobs = [Job.objects.enqueue(greet, countdown=60) for _ in range(5)]
    if action == "run_again":
        updates.finish(Job.objects.all(), "failed")
    more = "These were the first 2. More are left: choose the action again."
    left = [more in act(admin_client, action, f"task={greet.name}") for _ in range(3)]
    assert left == [True, True, False]
    entries = [re.search("[0-9]+", text)[0] for _, text in logged()]
    assert entries == ["2", "2", "1"]
    done = {"cancel": {"state": "cancelled"}, "run_again": {"state": "queued"}}
    done["start_now"] = {"due_at__lte": Now()}
    assert Job.objects.filter(**done[action]).count() == len(jobs)


def test_the_action_of_one_job_is_in_its_history(admin_client):
    job, other = (Job.objects.enqueue(greet, countdown=60) for _ in range(2))
    act(admin_client, "start_now", jobs=[job])
    for shown, texts in (job, 1), (other, 0):
        page = admin_client.get(f"{URL}{shown.pk}/history/").content.decode()
        assert page.count("1 job started now. Filter: none") == texts
    act(admin_client, "cancel", "q=nobody&p=1", jobs=[])
    assert logged()[-1] == ("admin", "0 jobs cancelled. Filter: q=nobody")


def test_the_actions_of_batches_are_logged(admin_client):
    batch = Batch.objects.enqueue(greet, [[], []])
    for action in "cancel", "run_failed_again":
        data = {"action": action, "_selected_action": [batch.pk]}
        admin_client.post("/admin/jobs/batch/?q=", data)
    texts = ["2 jobs cancelled. Filter: q=", "2 jobs enqueued again. Filter: q="]
    assert logged() == [("admin", text) for text in texts]
    page = admin_client.get(f"/admin/jobs/batch/{batch.pk}/history/").content.decode()
    assert page.count("Filter: q=") == 2


def test_staff_needs_view_job_to_see_and_delete_job_to_act(staff):
    job = Job.objects.enqueue(greet, countdown=60)
    assert staff().get(URL).status_code == 403
    viewer, operator = staff("view"), staff("view", "delete")
    assert listed(viewer) == [job]
    for client in viewer, operator:
        page = client.get(f"{URL}{job.pk}/change/").content.decode()
        assert ("Start now" in page) == (client is operator)
        act(client, "start_now", jobs=[job])
        assert Job.objects.filter(due_at__lte=F("created_at") + timedelta(seconds=30)).exists() == (
            client is operator
        )
    assert len(logged()) == 1


# Queues

QUEUES = "/admin/jobs/pause/"


@pytest.fixture
def answers(monkeypatch):
    """What workers answer to `inspect active_queues`."""
    found = {"one@host": [{"name": "celery"}, {"name": "io"}], "two@host": [{"name": "io"}]}

    class Inspect:
        def __init__(self, **options):
            pass

        def active_queues(self):
            return found

    monkeypatch.setattr("celery.current_app.control.inspect", Inspect)
    return found


def tables(client):
    """Return {id of a table: its lines of cells as text}."""
    page = client.get(QUEUES)
    assert page.status_code == 200
    found = {}
    html = page.content.decode()
    for name, body in re.findall('<table id="(.*?)".*?<tbody>(.*?)</tbody>', html, re.DOTALL):
        found[name] = []
        for row in body.split("</tr>")[:-1]:
            cells = re.findall("<t[dh].*?>(.*?)</t[dh]>", row, re.DOTALL)
            found[name].append([" ".join(re.sub("<.*?>", " ", cell).split()) for cell in cells])
    return found


def links(client):
    """Return the jobs of each link to the list of jobs."""
    page = client.get(QUEUES).content.decode()
    found = re.findall(rf'<a href="{URL}\?(.*?)">(\d+)</a>', page)
    return [(listed(client, query.replace("&amp;", "&")), int(count)) for query, count in found]


@pytest.fixture
def work(answers, monkeypatch, commit):
    """Jobs in two queues and with two keys. Two of key "tenant:a" are let go, one of them runs."""
    monkeypatch.setattr(publish, "send", lambda jobs: None)
    with commit():
        jobs = [Job.objects.enqueue(limited, ["a"], queue="io") for _ in range(5)]
        Job.objects.enqueue(limited, ["b"])
        Job.objects.enqueue(limited, ["b"], countdown=60)
        Job.objects.enqueue(greet, queue="special", countdown=60)
        Job.objects.enqueue(greet)
    first = Job.objects.filter(limit_key="tenant:a", held_by=None).first()
    running = {"state": "running", "run_token": uuid.uuid4()}
    Job.objects.filter(pk=first.pk).update(**running)
    old = [job.pk for job in jobs]
    Job.objects.filter(pk__in=old).update(due_at=Now() - timedelta(minutes=3, seconds=9))
    return jobs


def test_the_page_shows_queues_keys_and_workers(admin_client, work):
    found = tables(admin_client)
    minutes, form = "3 minutes", "Pause"
    assert found["queues"] == [
        ["celery", "2", "1", "0", "0", "0 minutes", "one@host", form],
        ["cpu", "0", "0", "0", "0", "", "none", form],
        ["io", "1", "0", "3", "1", minutes, "one@host, two@host", form],
        ["special", "0", "1", "0", "0", "", "none", form],
    ]
    assert found["keys"] == [
        ["tenant:a", "2", "1", "3", "1", minutes],
        ["tenant:b", "2", "1", "0", "0", ""],
    ]
    assert "Queues" in admin_client.get("/admin/").content.decode()


def test_each_number_of_the_page_links_to_its_jobs(admin_client, work):
    found = links(admin_client)
    assert len(found) == 4 * 4 + 2 * 3
    assert [len(jobs) for jobs, _ in found] == [count for _, count in found]
    assert {job.pk for jobs, _ in found for job in jobs} == set(
        Job.objects.values_list("pk", flat=True)
    )


def test_the_key_of_a_limit_is_searched(admin_client, work, settings):
    keys = {job.limit_key for job in listed(admin_client, "q=tenant:a")}
    assert keys == {"tenant:a"}
    assert listed(admin_client, "q=tenant:c") == listed(admin_client, "q=nothing:a") == []
    settings.JOB_LIMITS = {}  # the jobs keep their keys
    assert ["none", "none"] == [row[1] for row in tables(admin_client)["keys"]]
    assert [len(jobs) for jobs, _ in links(admin_client)[-6:]] == [1, 3, 1, 1, 0, 0]


def test_a_held_job_says_for_what_it_waits(admin_client, work):
    job = Job.objects.filter(held_by="tenant:a").first()
    page = admin_client.get(f"{URL}{job.pk}/change/").content.decode()
    assert "Waits for its turn: 2 of 2 of tenant a are running" in page
    assert listed(admin_client, "state=held&queue=io&task=" + limited.name) == list(
        Job.objects.filter(held_by="tenant:a").order_by("-created_at", "-pk")
    )


def test_a_queue_and_a_task_are_paused_and_resumed(admin_client, answers):
    reason = "SMTP <b>is down"
    for name in "io", greet.name:
        page = admin_client.post(QUEUES, {"pause": name, "reason": reason}, follow=True)
        [message] = page.context["messages"]
        assert str(message) == f"Paused {name}: {reason}."
    assert {(pause.name, pause.reason) for pause in Pause.objects.all()} == {
        ("io", reason),
        (greet.name, reason),
    }
    found = tables(admin_client)
    [row] = [row for row in found["queues"] if row[0] == "io"]
    assert re.fullmatch(r"Paused since \d\d:\d\d: SMTP &lt;b&gt;is down Resume", row[-1])
    assert found["tasks"][0][0] == greet.name and found["tasks"][0][1] == row[-1][: -len(" Resume")]
    assert f"<option>{greet.name}" not in admin_client.get(QUEUES).content.decode()
    for name in "io", greet.name, "cpu":  # which is not paused
        admin_client.post(QUEUES, {"resume": name})
    assert not Pause.objects.exists()
    texts = [f"Paused {name}: {reason}" for name in ("io", greet.name)]
    texts += [f"Resumed {name}" for name in ("io", greet.name)]
    assert logged() == [("admin", text) for text in texts]
    shown = tables(admin_client)["log"]
    assert [row[1:] for row in shown][0] == ["admin", f"Resumed {greet.name}"]


def test_the_page_resumes_a_queue_that_nobody_knows_any_more(admin_client, answers):
    Pause.objects.create(name="gone")
    assert [row[0] for row in tables(admin_client)["queues"]] == ["celery", "cpu", "gone", "io"]
    admin_client.post(QUEUES, {"resume": "gone"})
    assert not Pause.objects.exists()


def test_a_pause_in_the_page_holds_and_a_resume_lets_go(admin_client, answers, commit, run_jobs):
    admin_client.post(QUEUES, {"pause": "celery"})
    job = Job.objects.enqueue(greet)
    run_jobs()
    job.refresh_from_db()
    assert (job.state, job.held_by) == ("queued", "pause:celery")
    page = admin_client.get(f"{URL}{job.pk}/change/").content.decode()
    assert re.search(r"Paused since \d\d:\d\d", page)
    found = tables(admin_client)
    assert found["queues"][0][1:5] == ["0", "0", "1", "0"] and "keys" not in found
    with commit():
        admin_client.post(QUEUES, {"resume": "celery"})
    job.refresh_from_db()
    assert job.state == "succeeded"


@pytest.mark.parametrize("data", [{"pause": "nothing"}, {"pause": "i\0o"}, {"reason": "x"}, {}])
def test_an_invalid_pause_changes_nothing(admin_client, answers, data):
    assert admin_client.post(QUEUES, data).status_code == 302
    assert admin_client.post(QUEUES, {"pause": "io", "reason": "x" * 256}).status_code == 302
    assert not Pause.objects.exists() and not LogEntry.objects.exists()


def test_the_page_needs_view_job_and_a_pause_needs_delete_job(staff, answers):
    viewer, operator = staff("view"), staff("view", "delete")
    for client in staff(), staff("delete"):
        assert client.get(QUEUES).status_code == 403
    assert viewer.post(QUEUES, {"pause": "io"}).status_code == 403
    assert tables(viewer)["queues"][2][-1] == "" and "tasks" not in tables(viewer)
    assert operator.post(QUEUES, {"pause": "io"}).status_code == 302
    assert viewer.post(QUEUES, {"resume": "io"}).status_code == 403
    assert Pause.objects.get().name == "io"
    assert operator.get(f"{QUEUES}io/delete/").status_code == 404
    assert operator.get(f"{QUEUES}add/").status_code == 404


def broken(**options):
    raise OSError("no route to host")


def test_the_page_says_why_it_knows_no_workers(admin_client, answers, monkeypatch):
    answers.clear()
    assert "No worker has answered." in admin_client.get(QUEUES).content.decode()
    monkeypatch.setattr("celery.current_app.control.inspect", broken)
    assert "The broker does not answer" in admin_client.get(QUEUES).content.decode()
    assert tables(admin_client)["queues"][0][-2] == "unknown"
    monkeypatch.setattr("kombu.Connection.supports_exchange_type", lambda self, kind: False)
    assert "This broker cannot ask" in admin_client.get(QUEUES).content.decode()


def test_the_page_costs_the_same_queries_however_many_keys_there_are(admin_client, answers):
    def asked():
        with CaptureQueriesContext(connection) as captured:
            tables(admin_client)
        return [query["sql"] for query in captured if '"jobs_' in query["sql"]]

    before = asked()
    Job.objects.enqueue_many(limited, [[number] for number in range(300)])
    # Some of the keys have no held job, but a place.
    let_go = Job.objects.filter(limit_key__lt="tenant:3")
    assert let_go.update(held_by=None, sweep_at=Now()) > 200
    assert len(asked()) == len(before) <= 7
    assert len(tables(admin_client)["keys"]) == 200


@pytest.mark.django_db(transaction=True)  # VACUUM cannot run in a transaction
def test_the_page_counts_held_jobs_in_their_index(admin_client, answers):
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    fields = {"task": limited.name, "queue": "io", "due_at": timezone.now()}
    final = {"state": "succeeded", "finished_at": timezone.now()}
    Job.objects.bulk_create(Job(**fields, **final) for _ in range(5000))
    held = [f"tenant:{number % 50}" for number in range(500)]
    Job.objects.bulk_create(Job(limit_key=key, held_by=key, **fields) for key in held)
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE jobs_job")
        with CaptureQueriesContext(connection) as captured:
            tables(admin_client)
        asked = [query["sql"] for query in captured if '."held_by" IS NOT NULL' in query["sql"]]
        assert len(asked) == 2
        for sql in asked:
            cursor.execute(f"EXPLAIN {sql}")
            plan = "\n".join(line for (line,) in cursor.fetchall())
            assert "Index Only Scan using job_held" in plan, plan
