"""The setting worker_consumer of a project with jobs: celery-steady's consumer, for jobs too."""

import threading

from celery import signals
from celery_steady import consumer, tasks

from durable_jobs.messages import fields_in, is_job
from durable_jobs.worker import shutdown, startup
from durable_jobs.worker.children import JobRequest
from durable_jobs.worker.execution import trace_jobs


class Consumer(consumer.Consumer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        startup.keep_connections(self.app)

    def start(self):
        if threading.current_thread() is threading.main_thread():  # otherwise it is a test's
            signals.worker_shutting_down.connect(self.begin_shutdown)
        super().start()

    def update_strategies(self):
        super().update_strategies()
        trace_jobs(self.app)

    def prepare(self, task):
        """In threads and greenlets, let a job raise what it likes: worker/runs.py writes what that means."""
        if is_job(task):
            task.Request = tasks.failing(JobRequest)
            tasks.end_copies(task)
        else:
            super().prepare(task)

    def on_unknown_task(self, body, message, exc):
        """Drop the message of a job: Beat sends it again."""
        steady = super() if fields_in(message.headers) is None else super(consumer.Consumer, self)
        steady.on_unknown_task(body, message, exc)

    def is_limited(self, app):
        """Release jobs even if worker_soft_shutdown_timeout is 0."""
        return True

    def begin_shutdown(self, sender, exitcode=0, **kwargs):
        if sender == self.hostname:
            shutdown.begin(self, exitcode)

    def limit_shutdown(self, seconds, exitcode):
        """Nothing: begin() does it, with a native thread that releases jobs first."""
