{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/orders/admin.py" %}
