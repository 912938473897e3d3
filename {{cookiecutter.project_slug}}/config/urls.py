{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/config/urls.py" %}
