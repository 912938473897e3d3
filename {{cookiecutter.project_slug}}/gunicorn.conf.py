"""Options of gunicorn, which reads this file when it starts. Its command line overrides them.

It listens on 127.0.0.1:8000, or with the variable PORT, on that port of all addresses.
"""

import os

from dotenv import load_dotenv

load_dotenv(".env", interpolate=False)  # the settings do so later
workers = int(os.environ.get("WEB_CONCURRENCY") or 4)
control_socket_disable = True  # it would be in the home folder, which is read-only
