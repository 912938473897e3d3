"""What an owner's app may have: a row without which its job cannot be deleted."""

from django.db import models


class Keep(models.Model):
    job = models.OneToOneField("jobs.Job", models.PROTECT, primary_key=True, db_column="job")

    class Meta:
        db_table = "keeps"
        managed = False  # tables.sql has it

    def __str__(self):
        return str(self.pk)
