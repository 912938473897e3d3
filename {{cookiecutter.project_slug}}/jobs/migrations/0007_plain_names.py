from django.db import migrations, models
from django.db.models import Q
from django.db.models.deletion import CASCADE

ACTIVE = ["queued", "running"]
FINAL = ["succeeded", "failed", "cancelled"]


class Migration(migrations.Migration):
    """Renames fields. The database renames them in indexes and constraints itself: it builds nothing anew."""

    dependencies = [("jobs", "0006_primary_and_owner")]

    operations = [
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.RemoveIndex("job", "job_active"),
                migrations.RemoveConstraint("job", "job_running"),
                migrations.RemoveConstraint("job", "job_active_or_finished"),
            ]
        ),
        migrations.RenameField("job", "run", "run_token"),
        migrations.RenameField("job", "sent", "times_sent"),
        migrations.RenameField("job", "wake_at", "sweep_at"),
        migrations.RenameField("job", "reason", "public_error"),
        migrations.SeparateDatabaseAndState(
            state_operations=[
                migrations.AddIndex(
                    "job",
                    models.Index(
                        fields=["state", "queue", "times_sent", "sweep_at", "due_at"],
                        name="job_active",
                        condition=Q(state__in=ACTIVE),
                    ),
                ),
                migrations.AddConstraint(
                    "job",
                    models.CheckConstraint(
                        condition=Q(state="running") ^ Q(run_token=None), name="job_running"
                    ),
                ),
                migrations.AddConstraint(
                    "job",
                    models.CheckConstraint(
                        condition=Q(state__in=ACTIVE, sweep_at__isnull=False, finished_at=None)
                        | Q(state__in=FINAL, sweep_at=None, finished_at__isnull=False),
                        name="job_active_or_finished",
                    ),
                ),
            ]
        ),
        migrations.RenameModel("Attempt", "Failure"),
        migrations.AlterField(
            "failure", "job", models.ForeignKey("jobs.Job", CASCADE, related_name="failures")
        ),
    ]
