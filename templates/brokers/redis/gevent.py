CELERY_BROKER_TRANSPORT_OPTIONS |= {
    # Longer than the worker's loop waits, else it never gets to give a lost task out again. For
    # the same reason workers run --without-gossip: what others say every two seconds resets it.
    "polling_interval": 3,
    # Each greenlet that acknowledges takes a connection; kombu's 10 would fail the others.
    "max_connections": CELERY_WORKER_CONCURRENCY + 100,
}
