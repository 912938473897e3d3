{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/orders/migrations/0001_initial.py" %}
