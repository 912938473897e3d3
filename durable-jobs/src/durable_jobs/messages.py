"""Sends messages to the broker, and counts waiting messages. This module reads and writes no rows."""

import json
import logging
from contextlib import nullcontext
from threading import RLock

from celery import current_app, signals
from celery.app.routes import MapRoute
from celery.exceptions import OperationalError
from django.apps import apps
from kombu.utils.json import dumps, loads

from durable_jobs.validation import to_json

logger = logging.getLogger(__name__)

# The fields of a job that its message needs
MESSAGE_FIELDS = ["task", "args", "kwargs", "queue", "batch_id", "retries", "crashes", "limit_key"]
MESSAGE_FIELDS += ["results_of", "headers"]
HEADER = "durable_job"  # marks the message of a job
importing = RLock()


def is_eager():
    """Return whether jobs run in the process that enqueues them, once its transaction has committed."""
    return current_app.conf.task_always_eager


def fields_in(headers):
    """Return what the worker must know of a job, from the headers of its message. None: it is a plain message."""
    fields = (headers or {}).get(HEADER)
    return fields if isinstance(fields, dict) else None


def send(jobs):
    """Send the messages of these jobs of one queue over one connection. Raises the transport's exceptions."""
    conf, options = current_app.conf, {}
    if conf.task_publish_retry:
        # Once, for a connection that was lost. Then the sweeper sends it: without end, as projects retry plain tasks in
        # workers and Beat, one full queue would delay all others.
        policy = conf.task_publish_retry_policy | {"max_retries": 1}
        options = {"retry": True, "retry_policy": policy}
    with current_app.producer_or_acquire() as producer:
        batch = getattr(producer, "batch", nullcontext)  # before kombu 5.7, a producer has none
        with batch() if jobs[1:] else nullcontext():
            for index, job in enumerate(jobs):
                send_one(job, producer, is_declared=index > 0, **options)


def send_one(job, producer, is_declared=False, **more):
    """Send the message of a job as apply_async() does, but without Celery's signals: see new_headers().

    This process need not know the task: in a deploy, Beat may run older code than the workers. It
    does not send the event task-sent, which would be a second message.
    """
    headers, properties, body, _ = message_of(job)
    task = find_task(job.task)
    # Celery 5 uses the decorator's priority. Celery 6 will use only that of CELERY_TASK_ROUTES.
    options = {"queue": job.queue, "priority": getattr(task, "priority", None)}
    # Only with the task's module does a process know types that the project has registered.
    arguments = arguments_of(job) if task else (job.args, job.kwargs)
    options = current_app.amqp.router.route(options, job.task, *arguments)
    properties |= {**more, "priority": options.get("priority") or 0}
    queue = options["queue"]
    declare = [] if is_declared else [queue]
    # To the default exchange, which knows each queue by its name
    producer.publish(body, routing_key=queue.name, declare=declare, headers=headers, **properties)


def arguments_of(job):
    """Return the arguments as the task function gets them: with datetimes and UUIDs."""
    return loads(dumps([job.args, job.kwargs]))


def message_of(job):
    """Return the message of a job: headers, properties, and the body.

    Its own header says how often the job's worker has died (`crashes`), to which batch the job belongs (`batch`),
    the key of its limit (`limit_key`), and the batch whose results are its first argument (`results_of`).
    """
    # Flower shows these. Celery's own function to shorten them takes a second for each megabyte.
    shown = {"argsrepr": repr(job.args)[:1000], "kwargsrepr": repr(job.kwargs)[:1000]}
    shown |= {"retries": job.retries, "ignore_result": True}
    create = current_app.amqp.create_task_message
    message = create(str(job.pk), job.task, job.args, job.kwargs, **shown)
    fields = {"crashes": job.crashes, "limit_key": job.limit_key}
    pks = {"batch": job.batch_id, "results_of": job.results_of}
    fields |= {name: str(pk) for name, pk in pks.items() if pk}
    message.headers.update(job.headers, **{HEADER: fields})
    return message


def new_headers(job):
    """Before a job is stored, return the headers that all its messages will have.

    Celery sends its signals with each message. Here they are sent once, in the context of who enqueues the job:
    what receivers add, such as a trace, is stored. So it is the same for messages that Beat sends.
    """
    if not (signals.before_task_publish.receivers or signals.after_task_publish.receivers):
        return job.headers
    headers, properties, (*_, embedded), _ = message_of(job)
    body = (*arguments_of(job), embedded)
    before, more = dict(headers), {"properties": properties, "declare": [], "retry_policy": {}}
    sent = {"sender": job.task, "body": body, "headers": headers, "exchange": ""}
    signals.before_task_publish.send(**sent, routing_key=job.queue, **more)
    signals.after_task_publish.send(**sent, routing_key=job.queue)
    added = {name: value for name, value in headers.items() if value != before.get(name)}
    return job.headers | storable(added)


def storable(headers):
    """Return those of these headers that a row can store."""
    stored = {}
    for name, value in (headers or {}).items():
        try:
            stored[name] = json.loads(to_json(value))
        except (TypeError, ValueError) as error:
            logger.warning("the header %s is not stored: %r", name, error)
    return stored


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


class Queues:
    """Tells the queues of many calls. Routes that are a dictionary are asked once for each task."""

    def __init__(self):
        self.is_fixed = all(isinstance(route, MapRoute) for route in current_app.amqp.router.routes)
        self.known = {}

    def of(self, call):
        if queue := call.options.get("queue"):
            return queue
        name = call.task.name
        if name not in self.known:
            queue = queue_of(call.task, call.args, call.kwargs)
            if not self.is_fixed:
                return queue
            self.known[name] = queue
        return self.known[name]


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


def import_tasks(app=current_app):
    """Import the tasks that a worker imports, as it does, unless this process has done so. Raises their errors."""
    loader = app.loader
    with importing:
        # Not in an AppConfig.ready(): tasks may need the other apps.
        if apps.ready and not loader.worker_initialized:
            try:
                loader.init_worker()
            except BaseException:
                loader.worker_initialized = False
                raise


def find_task(name, app=current_app):
    """Return the task of this name, or None if a worker does not know it either."""
    if name not in app.tasks:
        import_tasks(app)
    return app.tasks.get(name)


def is_job(task):
    """Return whether this is a task that is a job."""
    return getattr(task, "_is_job", False)


def job_names():
    """Return the names of the tasks that are jobs."""
    import_tasks()
    return sorted(name for name, task in current_app.tasks.items() if is_job(task))
