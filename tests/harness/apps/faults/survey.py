"""Code of `make chaos` that runs in the project: queries, old jobs, copies of messages."""

from collections import Counter
from datetime import timedelta

from django.db import connection
from django.db.models import Count, Sum
from django.utils import timezone

from durable_jobs.actions import cancel
from durable_jobs.enqueue import enqueue_many
from durable_jobs.models import Batch, Job
from durable_jobs.publish import publish
from durable_jobs.states import ACTIVE, HAS_SLOT

from .tasks import quick, write

MEMBERS, STEPS = 4, 6  # jobs of a batch, and jobs of a batch with what starts afterwards


def numbers_of(work):
    """Return what each job of a batch, or each next job, writes. Lone jobs write others."""
    return [-(work * STEPS + step) - 1 for step in range(STEPS)]


def survey(jobs, odd, works):
    """Return how jobs and odd jobs ended, and how many numbers of jobs have their row.

    Also return the chunks that each newsletter has written, in order; the states of all batches and
    of the jobs of that many works, and how many of those are missing, or are there twice.
    """
    rows = Job.objects.filter(pk__in=jobs)
    with connection.cursor() as cursor:
        count = "SELECT count(*), count(DISTINCT job) FROM finals WHERE job = ANY(%s::uuid[])"
        cursor.execute(count, [jobs])
        finals, distinct = cursor.fetchone()
        cursor.execute("SELECT count(*) FROM written WHERE number >= 0")
        [written] = cursor.fetchone()
        cursor.execute("SELECT job, array_agg(chunk ORDER BY chunk) FROM chunks GROUP BY job")
        chunks = {str(job): chunks for job, chunks in cursor.fetchall()}
    expected = [number for work in range(works) for number in numbers_of(work)]
    of_works = Job.objects.filter(task=write.name, args__0__in=expected)
    found = Counter(of_works.values_list("args__0", flat=True))
    return {
        "states": states(rows),
        "odd": {str(job.pk): f"{job.state} {job.error}" for job in Job.objects.filter(pk__in=odd)},
        "crashes": rows.aggregate(n=Sum("crashes"))["n"],
        "errors": sorted(set(rows.filter(state="failed").values_list("error", flat=True))),
        "finals": finals,
        "distinct": distinct,
        "written": written,
        "chunks": chunks,
        "slots": Job.objects.filter(HAS_SLOT).count(),
        "batches": states(Batch.objects.all()),
        "jobs of works": states(of_works),
        "missing": sum(not found[number] for number in expected),
        "twice": sum(found[number] > 1 for number in expected),
    }


def states(rows):
    return dict(rows.values_list("state").annotate(Count("pk")))


def age_jobs():
    """Make 20 jobs that ended 99 days ago. The first one cannot be deleted. Return their ids."""
    jobs = [job.pk for job in enqueue_many([quick.using(countdown=99).s()] * 20)]
    with connection.cursor() as cursor:
        cursor.execute("INSERT INTO keeps VALUES (%s)", [jobs[0]])
    rows = Job.objects.filter(pk__in=jobs)
    cancel(rows)
    rows.update(finished_at=timezone.now() - timedelta(days=99))
    return [str(job) for job in jobs]


def copy_messages():
    """Send the messages of up to 20 active jobs five times again."""
    for job in Job.objects.filter(state__in=ACTIVE).order_by("?")[:20]:
        for _ in range(5):
            publish([job])
