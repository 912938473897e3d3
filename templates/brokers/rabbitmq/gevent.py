# With heartbeats this pool takes 10 messages a second, or with confirms none. TCP's keepalive,
# which is on, notices a dead connection too.
CELERY_BROKER_HEARTBEAT = 0
