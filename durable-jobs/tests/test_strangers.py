"""The library starts in projects that were written without it."""

import os
import subprocess
import sys

from settings import SOURCE

FILES = {
    "site_/__init__.py": "from site_.celery import app\n",
    "site_/celery.py": """
from durable_jobs.celery import Celery
app = Celery("site_")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
""",
    "site_/settings.py": """
USE_TZ = True
ROOT_URLCONF = "site_.urls"
INSTALLED_APPS = ["django.contrib.auth", "django.contrib.contenttypes", "durable_jobs", "shop.apps.Config"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3"}}
CELERY_BROKER_URL = "memory://"
CELERY_TASK_TIME_LIMIT = 60
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
""",
    "site_/urls.py": "from shop import api\nurlpatterns = []\n",
    "shop/apps.py": """
from django.apps import AppConfig
class Config(AppConfig):
    name = "shop"
    def ready(self):
        from shop import registry
        registry.parsers.append("text")
""",
    "shop/registry.py": "parsers = []\n",
    # A circle of imports, which works if api comes first, as it does from the URLs.
    "shop/api.py": "def helper(): pass\nfrom shop.filters import Filter\n",
    "shop/filters.py": "from shop.api import helper\nclass Filter: pass\n",
    "shop/tasks.py": """
from durable_jobs.tasks import job
from shop import registry
from shop.filters import Filter
KNOWN = tuple(registry.parsers)
@job
def parse(self): return KNOWN
""",
    "shop/models.py": """
from django.conf import settings
from django.db import models
class Job(models.Model):
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
class Batch(models.Model):
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
""",
    "start.py": """
import sys
import django; django.setup()
from django.core.management import call_command
from site_.celery import app
assert "shop.tasks" not in sys.modules
call_command("migrate", "durable_jobs", verbosity=0, skip_checks=True)
app.send_task("shop.tasks.parse")
call_command("check")
from durable_jobs.models import Job
from shop.tasks import KNOWN
print(Job.objects.get().task, KNOWN)
""",
}


def test_a_project_with_models_and_imports_of_its_own_starts(tmp_path):
    """Its tasks are imported when they are needed, after all apps and URLs, as a worker does."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "shop/__init__.py").touch()
    path = os.pathsep.join([str(SOURCE), str(tmp_path)])
    env = {**os.environ, "PYTHONPATH": path, "DJANGO_SETTINGS_MODULE": "site_.settings"}
    run = [sys.executable, "start.py"]
    ended = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "shop.tasks.parse ('text',)"
