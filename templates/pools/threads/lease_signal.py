

@signals.worker_shutting_down.connect
def stop_in_time(**kwargs):
    """Have keep() end the process and its jobs go on elsewhere: Celery waits for the last body."""
    global stop_at
    stop_at = time.monotonic() + settings.CELERY_WORKER_SOFT_SHUTDOWN_TIMEOUT
