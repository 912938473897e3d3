{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/conftest.py" %}
