{% include "durable_jobs/" ~ cookiecutter.durable_jobs ~ "/orders/serializers.py" %}
