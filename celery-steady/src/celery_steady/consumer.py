"""The setting worker_consumer: "celery_steady.consumer:Consumer"."""

import threading
from functools import partial
from logging import getLogger

from billiard.compat import mem_rss
from celery import signals
from celery.exceptions import InvalidTaskError
from celery.worker import consumer

from celery_steady import (
    children,
    defaults,
    django,
    malformed,
    rabbitmq_steps,
    renewal,
    results,
    shutdown,
    tasks,
    unknown,
    versions,
)
from celery_steady.events import BatchedEvents
from celery_steady.liveness import touch_liveness_file

logger = getLogger(__name__)

DELAYED_DELIVERY = "celery.worker.consumer.delayed_delivery:DelayedDelivery"


class StockConsumer(consumer.Consumer):
    """Celery's own, for versions of Celery and kombu that the tests haven't seen."""

    def __init__(self, *args, **kwargs):
        versions.log_what_is_off()
        super().__init__(*args, **kwargs)


class Consumer(StockConsumer):
    """Celery's consumer, with the steps and the errors of tasks that the README lists."""

    class Blueprint(consumer.Consumer.Blueprint):
        default_steps = [
            *(
                rabbitmq_steps.DelayedDelivery if step == DELAYED_DELIVERY else step
                for step in consumer.Consumer.Blueprint.default_steps
            ),
            rabbitmq_steps.NoticeLostConnection,
            renewal.KeepMessages,
            shutdown.SoftStop,
            BatchedEvents,
        ]

    is_stopping = is_main = False
    ends_by_error = False  # not by a signal, a limit, or celery control

    def __init__(self, *args, pool=None, app=None, worker_options=None, **kwargs):
        defaults.for_worker(app, pool)
        results.prepare(app, pool)
        if django.is_used():
            django.prepare_worker()
        self.is_prefork = defaults.is_prefork(pool)
        if self.is_prefork:  # before it forks its children
            for task in app.tasks.values():
                tasks.let_end(task)
            warn_of_memory(pool)
        if defaults.is_green(pool) and worker_options is not None:
            worker_options["without_gossip"] = True  # gossip can stop redelivery there
        self.has_limit = pool is not None and self.is_limited(app)
        # Celery would wait for the last thread or greenlet.
        self.ends_late = self.has_limit and not pool.signal_safe
        signals.heartbeat_sent.connect(self.on_heartbeat)
        signals.worker_shutting_down.connect(self.on_shutting_down)
        super().__init__(*args, pool=pool, app=app, worker_options=worker_options, **kwargs)
        self.half_read = children.HalfRead(pool, self.hub) if self.is_prefork and self.hub else None

    def start(self):
        # Tests make a worker in one thread, and start it in another. That must neither handle
        # signals nor end the process.
        self.is_main = threading.current_thread() is threading.main_thread()
        try:
            super().start()
        except Exception:
            self.ends_by_error = True
            raise

    def on_heartbeat(self, **kwargs):
        if not self.is_prefork or children.has_child(self.pool):
            touch_liveness_file()

    # Errors of tasks and messages

    def update_strategies(self):
        for task in self.app.tasks.values():
            self.prepare(task)
        super().update_strategies()

    def prepare(self, task):
        """Prepare a task of the app for this worker. Its other apps have tasks of their own."""
        task.Request = tasks.failing(task.Request)
        if not self.is_prefork:
            tasks.let_fail(task)

    def create_task_handler(self, *args, **kwargs):
        handle = super().create_task_handler(*args, **kwargs)
        return partial(malformed.handle_or_drop, self, handle)

    def on_unknown_task(self, body, message, exc):
        if not unknown.keep(self, message):
            super().on_unknown_task(body, message, exc)

    def on_unknown_message(self, body, message):
        self.drop(message, InvalidTaskError("This is no task's message."))

    def on_invalid_task(self, body, message, exc):
        self.drop(message, exc)

    def on_decode_error(self, message, exc):
        self.drop(message, exc)

    def drop(self, message, error):
        malformed.drop(message, error)
        signals.task_rejected.send(sender=self, message=message, exc=error)

    # A lost connection

    def on_close(self):
        """Celery forgets the tasks that no child has accepted, but some children only hadn't said so."""
        jobs = children.sent_jobs(self.pool) if self.is_prefork else []
        for job in jobs:
            job._accepted = True
        super().on_close()
        for job in jobs:
            job._accepted = False

    def register_with_event_loop(self, hub):
        super().register_with_event_loop(hub)
        if self.half_read:
            self.half_read.go_on()

    # The end

    def is_limited(self, app):
        """Return whether this worker's shutdown is limited. Without the setting it waits for all tasks, as Celery does."""
        return app.conf.worker_soft_shutdown_timeout > 0

    def announce_shutdown(self, sig=""):
        """Send Celery's signal, unless it was sent: Celery does so only if a signal ends the worker."""
        if not self.is_stopping:
            exitcode = self.controller.exitcode or 0
            sent = {"sig": sig, "how": "Soft", "exitcode": exitcode}
            signals.worker_shutting_down.send(self.hostname, **sent)

    def on_shutting_down(self, sender, how="", exitcode=0, **kwargs):
        if sender != self.hostname:
            return
        is_first, self.is_stopping = not self.is_stopping, True
        seconds = self.app.conf.worker_soft_shutdown_timeout if is_first else 0
        if self.ends_late and self.is_main:
            self.limit_shutdown(seconds, exitcode)
        elif self.has_limit and self.is_prefork and self.is_main and how != "Warm":
            shutdown.limit_children(self, seconds, exitcode)

    def limit_shutdown(self, seconds, exitcode):
        """End this process in so many seconds. Only threads and greenlets don't end themselves."""
        shutdown.limit(self, seconds, exitcode)

    def stop(self):
        self.announce_shutdown()
        super().stop()

    def shutdown(self):
        """An error of one step, such as that of a closed channel, would keep others from giving back tasks."""
        self.perform_pending_operations()
        self.blueprint.send_all(self, "shutdown", propagate=False)


def warn_of_memory(pool):
    """If each child would end after one task, say so: billiard's own line of the log is hidden."""
    limit, used = pool.options.get("max_memory_per_child"), mem_rss()
    if limit and used > limit:
        logger.warning(
            "This worker uses %d KB before its first task, but worker_max_memory_per_child is %d:"
            " each child process may end after one task. Import less, or raise the limit.",
            used,
            limit,
        )


Consumer = versions.choose("worker", Consumer, StockConsumer)
