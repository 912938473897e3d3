"""How long workers and Beat wait for servers. Requests should fail fast: their limits are the settings."""

import time

FOREVER = {"max_retries": None, "connect_retries_timeout": None}
# Options in broker_transport_options, {type of the driver: {option: seconds}}. Celery's are shorter,
# or wait forever for a server that hangs.
TRANSPORTS = {
    "redis": {"socket_timeout": 20, "socket_connect_timeout": 5},
    "amqp": {"connect_timeout": 5, "read_timeout": 20, "write_timeout": 20},
}
AWS_CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"total_max_attempts": 6, "mode": "standard"},  # for about 15 seconds
}
REDIS_RESULTS = {"redis_socket_timeout": 20, "redis_socket_connect_timeout": 5}


def be_patient(app):
    """Let this process wait for the broker and the result backend if they are down or hang.

    For workers and Beat. It changes only the configuration of `app`.
    """
    conf = app.conf
    kind = app.connection_for_write().transport.driver_type
    conf.broker_connection_max_retries = None  # forever; by default, for 47 minutes
    # Also the first task that a process sends; by default, for 4 seconds.
    options = conf.broker_transport_options | FOREVER
    for name, seconds in TRANSPORTS.get(kind, {}).items():
        options[name] = max(seconds, options.get(name) or 0)
    policy = {"max_retries": None, "interval_max": 5}
    if kind == "sqs":
        options["client-config"] = AWS_CLIENT
        conf.task_publish_retry = True
    elif kind == "redis":
        conf.broker_channel_error_retry = True  # outlive a Redis that refuses to write
        # kombu repeats immediately if Redis refuses to write, for example because it is full.
        policy["errback"] = lambda error, interval: time.sleep(1)
    conf.broker_transport_options = options
    conf.task_publish_retry_policy = policy

    for name, seconds in REDIS_RESULTS.items():
        conf[name] = max(seconds, conf[name] or 0)
    # A Redis that refuses to write, such as a replica or a full one, may do so later.
    refused = {"additional_connection_errors": ["redis.exceptions.ResponseError"]}
    conf.result_backend_transport_options = conf.result_backend_transport_options | refused
    if str(conf.result_backend).startswith("dynamodb:"):
        wait_for_aws()


def wait_for_aws():
    """If boto3's default session has timeouts of its own, as requests need, lengthen them."""
    import boto3
    from botocore.config import Config

    session = boto3.DEFAULT_SESSION and boto3.DEFAULT_SESSION._session
    if session and (config := session.get_default_client_config()):
        session.set_default_client_config(config.merge(Config(**AWS_CLIENT)))
