"""Redis: the message of a job needs no copy. If its worker is killed, it is sent again."""

from durable_jobs.messages import HEADER


def extend(transport):
    class Transport(transport):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)  # chooses the channel: Redis's or Sentinel's
            self.Channel = type("Channel", (self.Channel,), {"without_copy": HEADER})

    return Transport
