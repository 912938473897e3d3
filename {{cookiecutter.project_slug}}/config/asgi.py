import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
# A request has a thread of its own, and would leave its database connection behind.
os.environ.setdefault("CONN_MAX_AGE", "0")

application = get_asgi_application()
