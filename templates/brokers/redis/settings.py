CELERY_BROKER_URL = env.str("CELERY_BROKER_URL")
CELERY_BROKER_TRANSPORT_OPTIONS = {
    # Redis gives a task out again after this time, also one that still runs: so, after its limit.
    "visibility_timeout": TASK_TIME_LIMIT + 60,
    # Look for such tasks at every poll, not at every hundredth.
    "unacked_restore_interval": 1,
    "unacked_restore_throttle": 1,
    # A Redis that hangs costs a request one second.
    "socket_timeout": 1,
    "socket_connect_timeout": 1,
    # Another project on the same Redis does not take this one's messages.
    "global_keyprefix": "{{ cookiecutter.project_slug }}:",
}
