{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/tests/test_orders.py" %}
