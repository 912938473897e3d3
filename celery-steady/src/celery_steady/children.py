"""The child processes of a prefork worker."""

from inspect import isgenerator

from celery_steady.defaults import is_prefork


def has_child(pool):
    """Return whether a child of this pool has started, and lives."""
    # Without an event loop, as with brokers that have none, the pool doesn't say.
    return bool(pool._pool and getattr(pool._pool, "_fileno_to_inq", True))


def sent_jobs(pool):
    """Return the jobs that were written to a child, which has not yet said that it accepts them."""
    from celery.concurrency import asynpool  # not in a web server on Windows, which can't import it

    if not pool._pool:  # the worker has stopped
        return []
    jobs = [job for job in tuple(pool._pool._cache.values()) if not job._accepted]
    return [job for job in jobs if job._write_to and not asynpool._get_job_writer(job)]


def forget_unsent(pool):
    """Forget jobs that couldn't be sent to a child, such as one whose arguments are nested too deeply to pickle.

    The pool would keep them.
    """
    if is_prefork(pool) and not pool._pool.threads:
        for job in tuple(pool._pool._cache.values()):
            if not hasattr(job, "_payload"):
                job.discard()


class HalfRead:
    """What the event loop has read of a result that a child is still sending.

    When the connection is lost, Celery would forget it, and take the rest for the next result: an
    UnpicklingError ends the worker. It concerns long results, such as the traceback of a retry.
    """

    def __init__(self, pool, hub):
        self.pool, self.hub = pool, hub
        self.reset, hub.reset = hub.reset, self.keep
        self.readers = {}  # {file descriptor: (child, what reads its result)}

    def keep(self):
        children = self.pool._pool._fileno_to_outq if self.pool._pool else {}
        for number, (reader, _) in self.hub.readers.items():
            if number in children and isgenerator(reader):
                self.readers[number] = children[number], reader
        self.reset()

    def go_on(self):
        """Read the rest, if the child still lives."""
        children = self.pool._pool._fileno_to_outq
        for number, (child, reader) in list(self.readers.items()):
            if children.get(number) is child and reader.gi_frame:
                self.hub.add_reader(number, reader)
            else:
                del self.readers[number]
