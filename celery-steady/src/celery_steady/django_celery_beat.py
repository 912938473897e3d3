"""The setting beat_scheduler with django-celery-beat: "celery_steady.django_celery_beat:DatabaseScheduler"."""

from django_celery_beat import schedulers

from celery_steady import versions
from celery_steady.beat import Patient


class DatabaseScheduler(Patient, schedulers.DatabaseScheduler):
    pass


DatabaseScheduler = versions.choose("Beat", DatabaseScheduler, schedulers.DatabaseScheduler)
