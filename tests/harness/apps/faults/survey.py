"""What chaos asks of the database, and does to the broker from inside."""

from django.db import connection
from django.db.models import Count, Sum

from jobs.models import ACTIVE, Job, publish


def survey(jobs, numbers, killers):
    """How the jobs ended, and which of these numbers have their row."""
    rows = Job.objects.filter(pk__in=jobs)
    with connection.cursor() as cursor:
        count = "SELECT count(*), count(DISTINCT job) FROM finals WHERE job = ANY(%s::uuid[])"
        cursor.execute(count, [jobs])
        finals, distinct = cursor.fetchone()
        cursor.execute("SELECT count(*) FROM written WHERE number = ANY(%s)", [numbers])
        [written] = cursor.fetchone()
    return {
        "states": states(rows),
        "killers": states(Job.objects.filter(pk__in=killers)),
        "crashes": rows.aggregate(n=Sum("crashes"))["n"],
        "errors": sorted(set(rows.filter(state="failed").values_list("error", flat=True))),
        "finals": finals,
        "distinct": distinct,
        "written": written,
    }


def states(rows):
    return dict(rows.values_list("state").annotate(Count("pk")))


def copy_messages():
    """Send some jobs' messages five times more."""
    for job in Job.objects.filter(state__in=ACTIVE).order_by("?")[:20]:
        for _ in range(5):
            publish([job])
