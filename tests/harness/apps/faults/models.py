"""As in an owner's app: a row that protects its job from deletion."""

from django.db import models


class Keep(models.Model):
    job = models.OneToOneField(
        "durable_jobs.Job", models.PROTECT, primary_key=True, db_column="job"
    )

    class Meta:
        db_table = "keeps"
        managed = False  # tables.sql creates it

    def __str__(self):
        return str(self.pk)
