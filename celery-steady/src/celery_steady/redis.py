"""The setting broker_transport for Redis and Sentinel: "celery_steady.redis:Transport". And results there."""

import socket
import sys
import time
from json import JSONDecodeError
from logging import getLogger
from urllib.parse import quote

from celery.backends import asynchronous
from celery.backends import redis as redis_results
from kombu.transport import redis
from kombu.utils.url import as_url
from redis.exceptions import RedisError, ResponseError

from celery_steady import versions
from celery_steady.messages import KeepingChannel
from celery_steady.results import KeepsResults

logger = getLogger(__name__)


class QoS(redis.QoS):
    """Lets all workers reconnect before it looks for messages of dead ones.

    Waits while Redis refuses to write, for example because it is full or a replica: the message is
    already off its queue, and would be lost if no copy of it were stored (kombu 5.7).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.connected_at = time.monotonic()

    def restore_visible(self, start=0, num=10, interval=10):
        # Workers try to reconnect at least every 30 seconds, and renew their messages then.
        if time.monotonic() > self.connected_at + self.visibility_timeout / 3:
            # Each time: kombu would skip nine of ten.
            super().restore_visible(start, num, self.channel.unacked_restore_throttle)

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
    unacked_restore_throttle = 1
    unacked_mutex_expire = 10  # a worker that is killed meanwhile delays others by 10 s, not 300
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
    recoverable_connection_errors = (
        redis.Transport.connection_errors + redis.Transport.channel_errors
    )

    def __init__(self, client, **options):
        super().__init__(client, **options)
        self.scheme = "rediss" if client.ssl else "redis"
        if "master_name" in client.transport_options:
            self.scheme = "sentinel"
            self.Channel = SentinelChannel
            self.default_port = redis.SentinelTransport.default_port
        self.can_parse_url = True  # so kombu asks as_uri()
        keep_transport(client)

    def as_uri(self, uri, include_password=False, mask="**"):
        """Return the URL as it was set. kombu would write this class in place of `redis`."""
        client = self.client
        password = client.password if include_password else mask
        path = quote(str(client.virtual_host or "/"))
        place = client.hostname, client.port or self.default_port, client.userid, password, path
        return as_url(self.scheme, *place, sanitize=not include_password, mask=mask)


def keep_transport(client):
    """Let this connection keep its transport when it takes the next URL of several. kombu's doesn't."""
    if "switch" not in vars(client):
        switch, transport = client.switch, client.transport_cls

        def switch_and_keep(url):
            switch(url)
            client.transport_cls = transport

        client.switch = switch_and_keep


Transport = versions.choose("Redis", Transport, redis.Transport)


# Results


class Drainer(asynchronous.geventDrainer):
    """Reads results for all greenlets, also after an error. Celery's ends (celery issue 4857)."""

    def _ensure_not_shut_down(self):
        try:
            super()._ensure_not_shut_down()
        finally:
            if self._shutdown.is_set():
                self.__init__(self.result_consumer)


class ResultConsumer(redis_results.ResultConsumer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if type(self.drainer) is asynchronous.geventDrainer:
            self.drainer = Drainer(self)


class RedisBackend(KeepsResults, redis_results.RedisBackend):
    ResultConsumer = ResultConsumer


class SentinelBackend(KeepsResults, redis_results.SentinelBackend):
    ResultConsumer = ResultConsumer
