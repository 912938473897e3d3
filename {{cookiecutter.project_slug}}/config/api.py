{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/config/api.py" %}
