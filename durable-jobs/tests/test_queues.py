"""The admin's pages Queues and Workers: what waits, runs and is paused, and who may change it."""

import re
import uuid
from datetime import timedelta

import pytest
from django.contrib.admin.models import LogEntry
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone
from helpers import JOBS, call, greet, listed, logged, multiply, runs_on

from durable_jobs import publish
from durable_jobs.database import Now
from durable_jobs.enqueue import enqueue, enqueue_many
from durable_jobs.models import Job, Pause, Worker

pytestmark = pytest.mark.django_db


# Queues


QUEUES = "/admin/durable_jobs/pause/"


def tables(client, url=QUEUES):
    """Return {id of a table: its lines of cells as text}."""
    page = client.get(url)
    assert page.status_code == 200
    found = {}
    html = page.content.decode()
    for name, body in re.findall('<table id="(.*?)".*?<tbody>(.*?)</tbody>', html, re.DOTALL):
        found[name] = []
        for row in body.split("</tr>")[:-1]:
            cells = re.findall("<t[dh].*?>(.*?)</t[dh]>", row, re.DOTALL)
            found[name].append([" ".join(re.sub("<.*?>", " ", cell).split()) for cell in cells])
    return found


@pytest.fixture
def workers(db):
    """Two workers that live, and a dead one."""
    fields = {"pool": "prefork", "slots": 4, "version": "1.0", "started_at": timezone.now()}
    rows = [
        Worker(name="one@host", busy=3, queues=["celery", "io"], **fields),
        Worker(name="two@host", busy=0, queues=["io"], **fields),
        Worker(name="dead@host", busy=4, queues=["cpu"], **fields),
    ]
    Worker.objects.bulk_create(rows)
    dead = Worker.objects.filter(name="dead@host")
    dead.update(seen_at=Now() - timedelta(seconds=31), started_at=Now() - timedelta(hours=2))
    return Worker.objects


@pytest.fixture
def work(workers, monkeypatch, commit):
    """Jobs in two queues and with two keys. Two of key "tenant:a" are let go, one of them runs."""
    monkeypatch.setattr(publish, "send", lambda jobs: None)
    with commit():
        jobs = [enqueue(call, ["a"], queue="io") for _ in range(5)]
        enqueue(call, ["b"])
        enqueue(call, ["b"], countdown=60)
        enqueue(greet, queue="special", countdown=60)
        enqueue(greet)
    first = Job.objects.filter(limit_key="tenant:a", blocked_by=None).first()
    Job.objects.filter(pk=first.pk).update(**runs_on())
    old = [job.pk for job in jobs]
    Job.objects.filter(pk__in=old).update(due_at=Now() - timedelta(minutes=3, seconds=9))
    waiting = Job.objects.filter(queue="celery", due_at__lte=Now())
    waiting.update(due_at=Now() - timedelta(minutes=5, seconds=9))
    return jobs


def test_the_page_shows_queues_and_workers(admin_client, work):
    found = tables(admin_client)
    minutes, form = "3 min", "Pause"
    assert found["queues"] == [
        ["celery", "2", "1", "0", "0", "0", "5 min", "1 , 3 of 4 slots busy", form],
        ["cpu", "0", "0", "0", "0", "0", "", "none", form],
        ["io", "1", "0", "3", "1", "0", minutes, "2 , 3 of 8 slots busy", form],
        ["special", "0", "1", "0", "0", "0", "", "none", form],
    ]
    assert "Queues" in admin_client.get("/admin/").content.decode()


def links(client):
    """Return the jobs of each link to the list of jobs."""
    page = client.get(QUEUES).content.decode()
    found = re.findall(rf'<a href="{JOBS}\?(.*?)">(\d+)</a>', page)
    return [(listed(client, query.replace("&amp;", "&")), int(count)) for query, count in found]


def test_each_number_of_the_page_links_to_its_jobs(admin_client, work):
    found = links(admin_client)
    assert len(found) == 4 * 5
    assert [len(jobs) for jobs, _ in found] == [count for _, count in found]
    assert {job.pk for jobs, _ in found for job in jobs} == set(
        Job.objects.values_list("pk", flat=True)
    )


def test_the_key_of_a_limit_is_searched(admin_client, work):
    keys = {job.limit_key for job in listed(admin_client, "q=tenant:a")}
    assert keys == {"tenant:a"}
    assert listed(admin_client, "q=tenant:c") == listed(admin_client, "q=nothing:a") == []


def test_a_blocked_job_says_for_what_it_waits(admin_client, work):
    job = Job.objects.filter(blocked_by="tenant:a").first()
    page = admin_client.get(f"{JOBS}{job.pk}/change/").content.decode()
    assert "Waiting: limit tenant:a is full (2 of 2 slots taken)" in page
    assert listed(admin_client, "state=blocked&queue=io&task=" + call.name) == list(
        Job.objects.filter(blocked_by="tenant:a").order_by("-created_at", "-pk")
    )


def test_a_queue_and_a_task_are_paused_and_resumed(admin_client):
    reason = "SMTP <b>is down"
    for name in "io", greet.name:
        page = admin_client.post(QUEUES, {"pause": name, "reason": reason}, follow=True)
        [message] = page.context["messages"]
        assert str(message) == f"Paused {name}."
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
    texts = [f"{done} {name}" for done in ("Paused", "Resumed") for name in ("io", greet.name)]
    assert logged() == [("admin", text) for text in texts]


def test_the_page_resumes_a_queue_that_nobody_knows_any_more(admin_client):
    Pause.objects.create(name="gone")
    assert [row[0] for row in tables(admin_client)["queues"]] == ["celery", "cpu", "gone", "io"]
    admin_client.post(QUEUES, {"resume": "gone"})
    assert not Pause.objects.exists()


def test_the_page_pauses_and_resumes_a_queue(admin_client, run_jobs):
    admin_client.post(QUEUES, {"pause": "celery"})
    job = enqueue(greet)
    run_jobs()
    job.refresh_from_db()
    assert job.state == "queued"
    page = admin_client.get(f"{JOBS}{job.pk}/change/").content.decode()
    assert re.search(r"Paused for \d+ s", page)
    found = tables(admin_client)
    assert found["queues"][0][1:6] == ["0", "0", "1", "0", "0"]
    assert listed(admin_client, "state=blocked") == [job] and not listed(
        admin_client, "state=waiting"
    )
    admin_client.post(QUEUES, {"resume": "celery"})
    run_jobs()
    job.refresh_from_db()
    assert job.state == "succeeded"


@pytest.mark.parametrize("data", [{"pause": "nothing"}, {"reason": "x"}, {}])
def test_an_invalid_pause_changes_nothing(admin_client, data):
    assert admin_client.post(QUEUES, data).status_code == 302
    assert not Pause.objects.exists() and not LogEntry.objects.exists()


def test_the_page_needs_view_job_and_a_pause_needs_delete_job(staff):
    viewer, operator = staff("view"), staff("view", "delete")
    for client in staff(), staff("delete"):
        assert client.get(QUEUES).status_code == 403
    assert viewer.post(QUEUES, {"pause": "io"}).status_code == 403
    assert tables(viewer)["queues"][2][-1] == "" and not tables(viewer)["tasks"]
    assert operator.post(QUEUES, {"pause": "io"}).status_code == 302
    assert viewer.post(QUEUES, {"resume": "io"}).status_code == 403
    assert Pause.objects.get().name == "io"
    assert operator.get(f"{QUEUES}add/").status_code == 403
    assert 'value="cancel"' not in operator.get(f"{QUEUES}io/change/").content.decode()


def test_the_page_costs_the_same_queries_however_many_keys_there_are(admin_client):
    def asked():
        with CaptureQueriesContext(connection) as captured:
            tables(admin_client)
        return [query["sql"] for query in captured if '"durable_jobs_' in query["sql"]]

    before = asked()
    enqueue_many([call.s(number) for number in range(300)])
    assert len(asked()) == len(before) <= 15


@pytest.mark.django_db(transaction=True)  # VACUUM cannot run in a transaction
def test_the_page_counts_blocked_jobs_in_their_index(admin_client):
    if connection.vendor != "postgresql":
        pytest.skip("only PostgreSQL plans with statistics: set DATABASE_URL=postgres://…")
    fields = {"task": call.name, "queue": "io", "due_at": timezone.now()}
    final = {"state": "succeeded", "finished_at": timezone.now()}
    multiply(Job.objects.create(**fields, **final), 5000)
    blocked, key = (
        Job.objects.create(limit_key="tenant:0", blocked_by="tenant:0", **fields),
        "'tenant:' || n %% 50",
    )
    multiply(blocked, 500, limit_key=key, blocked_by=key)
    with connection.cursor() as cursor:
        cursor.execute("VACUUM ANALYZE durable_jobs_job")
        with CaptureQueriesContext(connection) as captured:
            tables(admin_client)
        asked = [query["sql"] for query in captured if '."blocked_by" IS NOT NULL' in query["sql"]]
        [sql] = asked
        cursor.execute(f"EXPLAIN {sql}")
        plan = "\n".join(line for (line,) in cursor.fetchall())
        assert "Index Only Scan using durable_jobs_job_blocked" in plan, plan


# Workers


WORKERS = "/admin/durable_jobs/worker/"


def run_on(worker, count, **fields):
    """Store running jobs of this worker."""
    lease_end = Now() + timedelta(seconds=30)
    times = {"due_at": Now(), "started_at": timezone.now(), "lease_ends_at": lease_end}
    fields = {"task": greet.name, "queue": "io", "state": "running", **times} | fields
    return Job.objects.bulk_create(
        Job(worker=worker, run_token=uuid.uuid4(), **fields) for _ in range(count)
    )


def test_the_page_shows_each_worker_and_links_to_its_jobs(admin_client, workers):
    running = run_on("one@host", 2)
    run_on("two@host", 1)
    page = admin_client.get(WORKERS).content.decode()
    rows = re.findall("<tr>(.*?)</tr>", page.partition("<tbody>")[2], re.DOTALL)
    cells = [re.sub("<.*?>", " ", row).split() for row in rows]
    dead, *living = ([word for word in row if word != "&quot;"] for row in cells)
    assert " ".join(dead).startswith("dead@host no heartbeat for 31 s 4 of 4")
    texts = [" ".join(row) for row in living]
    assert sorted(text[:21] for text in texts) == ["one@host 0 s ago 3 of", "two@host 0 s ago 0 of"]
    assert all("prefork 1.0" in text for text in texts)
    [query] = re.findall(rf'<a href="{JOBS}\?(worker=one.*?)">3 of 4</a>', page)
    assert {*listed(admin_client, query.replace("&amp;", "&"))} == {*running}
    assert "Workers" in admin_client.get("/admin/").content.decode()


def test_the_page_of_workers_needs_view_job_and_changes_nothing(staff, workers):
    for client in staff(), staff("delete"):
        assert client.get(WORKERS).status_code == 403
    viewer = staff("view")
    assert viewer.get(WORKERS).status_code == 200
    operator = staff("view", "delete")
    for path in "add/", "one@host/delete/":
        assert viewer.get(WORKERS + path).status_code == 403
        assert operator.get(WORKERS + path).status_code == 403


def test_the_page_of_workers_costs_the_same_however_many_there_are(admin_client, workers):
    def count():
        with CaptureQueriesContext(connection) as captured:
            assert admin_client.get(WORKERS).status_code == 200
        return len(captured)

    before = count()
    fields = {"pool": "threads", "slots": 20, "busy": 20, "queues": ["io"]}
    fields["started_at"] = timezone.now()
    rows = [Worker(name=f"worker{number}@host", **fields) for number in range(30)]
    workers.bulk_create(rows)
    for row in rows:
        run_on(row.name, 20)
    assert count() == before


def test_both_pages_show_what_is_wrong(admin_client, workers, commit):
    enqueue(greet, queue="cpu")
    for url in QUEUES, WORKERS:
        page = admin_client.get(url).content.decode()
        [shown] = re.findall('<ul class="messagelist" id="problems">(.*?)</ul>', page, re.DOTALL)
        assert "No worker consumes the queue cpu" in shown
    [row] = [row for row in tables(admin_client)["queues"] if row[0] == "cpu"]
    assert row[7] == "none"
    assert ">none</strong>" in admin_client.get(QUEUES).content.decode()
