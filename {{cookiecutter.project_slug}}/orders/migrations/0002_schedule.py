{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/orders/migrations/0002_schedule.py" %}
