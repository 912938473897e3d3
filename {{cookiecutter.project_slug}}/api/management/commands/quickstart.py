{% from "chosen.jinja" import has_jobs, has_task_api, has_example, has_flower with context %}
import os

{% if has_flower %}
from django.conf import settings
{% endif %}
from django.contrib.auth import get_user_model
from django.core.management import BaseCommand, CommandError, call_command
from rest_framework.authtoken.models import Token


class Command(BaseCommand):
    help = "For development: create the user of DJANGO_SUPERUSER_…, and show where to log in."

    def handle(self, **options):
        users = get_user_model().objects
        field = get_user_model().USERNAME_FIELD
        names = [f"DJANGO_SUPERUSER_{field.upper()}", "DJANGO_SUPERUSER_PASSWORD"]
        if missing := [name for name in names if not os.environ.get(name)]:
            raise CommandError(f"Missing in .env: {', '.join(missing)}.")
        name, password = (os.environ[name] for name in names)
        if not users.filter(**{field: name}).exists():
            call_command("createsuperuser", interactive=False, verbosity=0)
        token, _ = Token.objects.get_or_create(user=users.get(**{field: name}))
        web = f"http://127.0.0.1:{os.environ.get('PORT') or 8000}"
        curl = f"curl -H 'Authorization: Token {token}' {web}/api"
        self.stdout.write(f"""
    {{ "Jobs" if has_jobs else "Page" }}     {web}/    {name} / {password}
    Admin    {web}/admin/
    API      {web}/api/docs/
{% if has_flower %}
    Flower   {settings.FLOWER_URL}    {settings.FLOWER_BASIC_AUTH.replace(":", " / ")}
{% endif %}

{% if has_example %}
    Place an order; {{ "then follow its job" if has_jobs else "a task confirms it by email" }}:
    {curl}/orders/ -H 'Content-Type: application/json' \\
        -d '{% raw %}{{"product": "Tea"}}{% endraw %}'
{% endif %}
{% if has_jobs %}
    {curl}/jobs/
{% elif has_example and has_task_api %}
    Start a report; its status is at the URL in the Location header:
    {curl}/orders/report/ -i -X POST
{% elif not has_example %}
    Your token opens the API, such as its schema:
    {curl}/schema/
{% endif %}
""")
