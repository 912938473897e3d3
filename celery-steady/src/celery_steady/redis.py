"""The setting broker_transport for Redis and Sentinel: "celery_steady.redis:Transport"."""

import socket
import sys
import time
from json import JSONDecodeError
from logging import getLogger

from kombu.transport import redis
from redis.exceptions import RedisError, ResponseError

from celery_steady import versions
from celery_steady.messages import KeepingChannel

logger = getLogger(__name__)


class QoS(redis.QoS):
    """Lets all workers reconnect before it looks for messages of dead ones.

    Waits while Redis refuses to write, for example because it is full or a replica: the message is
    already off its queue, and would be lost if no copy of it were stored (kombu 5.7).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.connected_at = time.monotonic()

    def restore_visible(self, *args, **kwargs):
        # Workers try to reconnect at least every 30 seconds, and renew their messages then.
        if time.monotonic() > self.connected_at + self.visibility_timeout / 3:
            super().restore_visible(*args, **kwargs)

    def append(self, message, delivery_tag):
        while True:
            try:
                return super().append(message, delivery_tag)
            except ResponseError as error:
                logger.warning("Redis refuses to write: %r", error)
                time.sleep(1)


class Channel(KeepingChannel, redis.Channel):
    QoS = QoS
    errors = (RedisError,)
    is_clock_checked = False
    # Ask whether an idle connection still exists. kombu does so only in a worker, and Flower, which
    # only listens, would never notice (kombu pull 2590).
    socket_keepalive = True
    if sys.platform == "linux":
        socket_keepalive_options = {
            socket.TCP_KEEPIDLE: 30,  # seconds
            socket.TCP_KEEPINTVL: 10,
            socket.TCP_KEEPCNT: 3,
        }

    def _brpop_read(self, **options):
        try:
            return super()._brpop_read(**options)
        except JSONDecodeError as error:
            logger.error("dropped a message that is no JSON: %r", error)

    def renew(self):
        tags = list(self.qos._delivered)
        with self.conn_or_acquire() as client:
            for first in range(0, len(tags), 1000):
                # xx: only those that Redis still has, as others have just been acknowledged
                times = dict.fromkeys(tags[first : first + 1000], time.time())
                client.zadd(self.unacked_index_key, times, xx=True)
            if not self.is_clock_checked:
                self.is_clock_checked = True
                check_clock(client)


class SentinelChannel(Channel, redis.SentinelChannel):
    pass


def check_clock(client):
    """Warn of a wrong clock: others compare the times that it writes, and may start tasks again."""
    seconds = round(time.time() - client.time()[0])
    if abs(seconds) > 5:
        logger.warning("This clock is %+d s from that of Redis: tasks may run twice", seconds)


class Transport(redis.Transport):
    """Tries to send a task as often as the retry policy says. kombu 5.7 tries twice if Redis refuses."""

    Channel = Channel
    recoverable_connection_errors = redis.Transport.connection_errors + redis.Transport.channel_errors

    def __init__(self, client, **options):
        super().__init__(client, **options)
        if str(client.hostname).startswith("sentinel://"):
            self.Channel = SentinelChannel
            self.default_port = redis.SentinelTransport.default_port


Transport = versions.choose("Redis", Transport, redis.Transport)
