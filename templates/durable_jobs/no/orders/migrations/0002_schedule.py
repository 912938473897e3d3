from django.db import migrations


def create(apps, schema_editor):
    CrontabSchedule = apps.get_model("django_celery_beat", "CrontabSchedule")
    PeriodicTask = apps.get_model("django_celery_beat", "PeriodicTask")
    every_hour, _ = CrontabSchedule.objects.get_or_create(minute="0", hour="*")
    PeriodicTask.objects.create(
        name="confirm-forgotten-orders",
        task="orders.tasks.confirm_forgotten_orders",
        crontab=every_hour,
        expire_seconds=3600,  # after an hour without workers, the next one is enough
    )


def delete(apps, schema_editor):
    PeriodicTask = apps.get_model("django_celery_beat", "PeriodicTask")
    PeriodicTask.objects.filter(name="confirm-forgotten-orders").delete()


class Migration(migrations.Migration):
    dependencies = [
        ("orders", "0001_initial"),
        ("django_celery_beat", "0019_alter_periodictasks_options"),
    ]
    operations = [migrations.RunPython(create, delete)]
