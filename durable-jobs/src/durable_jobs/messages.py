"""Sends messages to the broker, and counts waiting messages. This module reads and writes no rows."""

from contextlib import nullcontext

from celery import current_app
from celery.exceptions import OperationalError
from kombu.utils.json import dumps, loads

from durable_jobs import tracing

# The fields of a job that its message needs
MESSAGE_FIELDS = ["task", "args", "kwargs", "queue", "batch", "retries", "crashes", "times_sent"]
MESSAGE_FIELDS += ["limit_key", "results_of", *tracing.FIELDS]


def send(jobs):
    """Send the messages of these jobs over one connection. Raises the transport's exceptions."""
    # In eager mode a job that enqueues another one would hold two connections.
    if current_app.conf.task_always_eager:
        for job in jobs:
            send_one(job, None)
        return
    with (
        current_app.producer_or_acquire() as producer,
        producer.batch() if jobs[1:] else nullcontext(),
    ):
        declared = set()
        for job in jobs:
            send_one(job, producer, declare=[] if job.queue in declared else None)
            declared.add(job.queue)


def send_one(job, producer, **options):
    """Send the message of a job as apply_async() does, in a third of the time.

    This process need not know the task: in a deploy, Beat may run older code than the workers. It
    does not send the event task-sent, which would be a second message.

    The header `job` marks the message of a job. `crashes` says how often the job's worker has died, and
    `times_sent` which message of the job this is, `batch` to which batch it belongs, `limit` the key of its
    limit, and `results_of` the batch whose results are its first argument.
    """
    task = current_app.tasks.get(job.task)
    amqp, pk = current_app.amqp, str(job.pk)
    headers = {"job": True, "crashes": job.crashes, "times_sent": job.times_sent}
    if job.batch_id:
        headers["batch"] = str(job.batch_id)
    if job.limit_key:
        headers["limit"] = job.limit_key
    if job.results_of:
        headers["results_of"] = str(job.results_of)
    if current_app.conf.task_always_eager:
        args, kwargs = loads(dumps([job.args, job.kwargs]))  # as a worker gets them
        task.apply(args, kwargs, task_id=pk, retries=job.retries, headers=headers)
        return
    # Flower shows these. Celery's own function to shorten them takes a second for each megabyte.
    shown = {"argsrepr": repr(job.args)[:1000], "kwargsrepr": repr(job.kwargs)[:1000]}
    shown |= {"retries": job.retries, "ignore_result": True}
    message = amqp.create_task_message(pk, job.task, job.args, job.kwargs, **shown)
    # Celery 5 uses the decorator's priority. Celery 6 will use only that of CELERY_TASK_ROUTES.
    options |= {"queue": job.queue, "priority": getattr(task, "priority", None)}
    options = amqp.router.route(options, job.task, job.args, job.kwargs)
    options["priority"] = options.get("priority") or 0
    options["headers"] = headers
    tracing.run_as(job, amqp.send_task_message, producer, job.task, message, **options)


def is_connection_error(error):
    """Return whether the broker was unavailable, as opposed to refusing this one message."""
    with current_app.connection_for_write() as connection:  # only its class is needed
        kinds = OperationalError, *connection.connection_errors
    return isinstance(error, kinds) or isinstance(error.__cause__, kinds)


def queue_of(task, args, kwargs):
    """Return the name of the queue that the decorator or CELERY_TASK_ROUTES gives this task."""
    if queue := getattr(task, "queue", None):
        return queue
    route = current_app.amqp.router.route({}, task.name, args, kwargs)
    return route["queue"].name if "queue" in route else current_app.conf.task_default_queue


def known_queues():
    """Return the names of the queues from which a worker without --queues takes tasks."""
    return list(current_app.amqp.Queues(current_app.conf.task_queues))


def messages_in(name, broker):
    """Return how many messages wait in this queue. Uses the connection `broker`, and raises its exceptions."""
    broker.ensure_connection(max_retries=1, interval_start=0)
    queue = current_app.amqp.queues[name](broker.default_channel)
    queue.declare()  # creates the queue and its binding, if they were deleted
    # Declare it again, for the count. With passive=True, kombu does not find a queue that has a prefix.
    return queue.queue_declare().message_count


def is_job(name):
    """Return whether this task is a job."""
    return getattr(current_app.tasks.get(name), "_is_job", False)


def known_names():
    """Return the names that can be paused: queues and tasks. A queue without settings needs a job."""
    return known_queues(), sorted(filter(is_job, current_app.tasks))
