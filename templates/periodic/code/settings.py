{% if cookiecutter.include_example %}
CELERY_BEAT_SCHEDULE = {
    "daily-report": {
        "task": "orders.tasks.send_daily_report",
        "schedule": crontab(hour=6, minute=0),
    },
}
{% else %}
CELERY_BEAT_SCHEDULE = {}
{% endif %}
