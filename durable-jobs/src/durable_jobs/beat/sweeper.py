"""The sweeper: threads of Beat's process that recover jobs, send their messages, and delete old jobs."""

import logging
import os
import threading
import time
from datetime import timedelta

from celery_steady.liveness import touch_liveness_file
from django.db import connection, transaction

from durable_jobs import batches, conf, transitions
from durable_jobs.beat.purge import clean_forever
from durable_jobs.beat.republish import Sender
from durable_jobs.compiler import CHUNK
from durable_jobs.database import Now, locking, may_succeed_later, try_in_halves
from durable_jobs.models import Job, Sweep
from durable_jobs.worker.lease import POLL_SECONDS, recover

logger = logging.getLogger(__name__)


class Sweeper:
    """One round after the other, forever. `tick_delay` returns how many seconds Beat's next tick is overdue."""

    def __init__(self, tick_delay):
        self.tick_delay = tick_delay
        self.sender = Sender()
        self.last_round = self.recover_at = 0

    def start(self):
        threading.Thread(target=self.run_or_exit, name="sweeper", daemon=True).start()
        threading.Thread(target=clean_forever, name="clean", daemon=True).start()

    def run_or_exit(self):
        try:
            self.run()
        except BaseException:
            # Without this thread nothing would be recovered: let a supervisor restart Beat.
            logger.exception("the sweeper has ended, and Beat with it")
            os._exit(1)

    def run(self):
        while True:
            time.sleep(self.do_round())

    def do_round(self):
        """Recover, end batches, send messages. Returns the seconds until the next round."""
        pause = conf.SWEEP_SECONDS
        # After a gap (Beat has just started, or the machine or the database was down), first wait for half
        # the length of a lease. In this time live workers renew their leases. Only then recover jobs, and
        # send messages again.
        max_gap = conf.LEASE_SECONDS / 2 + 2 * conf.SWEEP_SECONDS
        # Not monotonic(), which stands still while a machine sleeps.
        if time.time() - self.last_round > max_gap:
            self.recover_at = time.monotonic() + conf.LEASE_SECONDS / 2
        self.last_round = time.time()
        try:
            may_recover = time.monotonic() >= self.recover_at
            try:
                if may_recover:
                    recover_lapsed()
                batches.end_all()
            finally:
                pause = self.sender.send_due(resend=may_recover)
            self.store_round()
        except Exception as error:
            logger.warning("the sweeper failed; it will retry in its next round: %r", error)
            if may_succeed_later(error):
                connection.close()
                self.recover_at = time.monotonic() + conf.LEASE_SECONDS / 2
        if self.tick_delay() < conf.LEASE_SECONDS:  # if Beat hangs, let the file become old
            touch_liveness_file()
        return pause

    def store_round(self):
        """Store that the sweeper is running, even if the broker took no message."""
        tick_due_at = Now() - timedelta(seconds=self.tick_delay())
        fields = {"ended_at": Now(), "tick_due_at": tick_due_at, "refused": self.sender.refused}
        Sweep.objects.update_or_create(pk=1, defaults=fields)


def recover_lapsed():
    """Recover the running jobs whose lease was not renewed, and free the slots of cancelled ones."""
    lapsed = Job.objects.filter(lease_ends_at__lte=Now())
    with transaction.atomic():  # skip a row that the job's own function has locked
        ids = list(locking(lapsed).values_list("pk", flat=True)[:CHUNK])
    if ids:
        transitions.wait_until_writable()
        # A worker that was delayed, for example by a lock, renews its leases in this time.
        time.sleep(2 * POLL_SECONDS)
        try_in_halves(recover, lapsed, ids)
