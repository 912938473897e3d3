"""Options of gunicorn, which reads this file when it starts. Its command line overrides them.

It listens on 127.0.0.1:8000, or with the variable PORT, on that port of all addresses.
"""

import logging
import os

from dotenv import load_dotenv
from environs import Env

from config import logs

load_dotenv(".env", interpolate=False)  # the settings do so later
env = Env()
logconfig_dict = logs.configure(env.bool("DEBUG", False), env.log_level("LOG_LEVEL", logging.INFO))
forwarder_headers = ""  # a client's header SCRIPT_NAME would change the paths of views
workers = int(os.environ.get("WEB_CONCURRENCY") or 4)
# A slow download occupies a thread; without threads, it would be cut after 30 seconds. A process
# without a free thread leaves connections to the others.
threads = worker_connections = 4
keepalive = 0  # otherwise gunicorn warns that it can't keep connections
control_socket_disable = True  # it would be in the home folder
