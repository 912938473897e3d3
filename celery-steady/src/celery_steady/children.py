"""The child processes of a prefork worker."""

from inspect import isgenerator

from celery.concurrency import asynpool


def has_child(pool):
    """Return whether a child of this pool has started, and lives."""
    return bool(pool._pool and pool._pool._fileno_to_inq)


def sent_jobs(pool):
    """Return the jobs that were written to a child, which has not yet said that it accepts them."""
    if not pool._pool:  # the worker has stopped
        return []
    jobs = [job for job in tuple(pool._pool._cache.values()) if not job._accepted]
    return [job for job in jobs if job._write_to and not asynpool._get_job_writer(job)]


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
