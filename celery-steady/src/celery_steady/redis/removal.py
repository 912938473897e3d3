"""What a project runs once when it no longer uses this transport."""

import re

from celery_steady.redis.scripts import RELEASE


def release_countdowns(app):
    """Move all countdowns to their queues, where stock workers take them and wait. Return how many.

    It also deletes what only this package's workers use. Stop them first.
    """
    count = 0
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        prefix = re.sub(r"([\\*?\[\]^])", r"\\\1", channel.key(""))
        with channel.conn_or_acquire() as client:

            def keys(name):
                return client.scan_iter(match=f"{prefix}*{channel.sep}{name}", count=1000)

            for key in keys("delayed"):
                name = key.removesuffix(f"{channel.sep}delayed".encode())
                while moved := client.execute_command("EVAL", RELEASE, 2, key, name):
                    count += moved
            for key in keys("bell"):
                client.execute_command("UNLINK", key)
            own = channel.leases_key, channel.renewed_key
            client.execute_command("UNLINK", *map(channel.key, own))
    return count
