{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/tests/test_project.py" %}
