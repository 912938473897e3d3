# This pool asks one queue after the other, through boto, which must wait longer than SQS does.
CELERY_BROKER_TRANSPORT_OPTIONS["wait_time_seconds"] = 1
CELERY_BROKER_TRANSPORT_OPTIONS["client-config"]["read_timeout"] = 1.5
