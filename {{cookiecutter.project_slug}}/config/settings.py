{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/config/settings.py" %}
