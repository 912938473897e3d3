"""The transport: it sends, and takes messages for workers."""

import socket
import sys
from logging import getLogger
from queue import Empty
from time import monotonic
from urllib.parse import quote
from uuid import uuid4

from celery.exceptions import ImproperlyConfigured
from kombu import Connection
from kombu.transport import redis
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from kombu.utils.url import as_url, parse_url
from redis.exceptions import RedisError

from celery_steady import versions
from celery_steady.messages import KeepingChannel, due_time
from celery_steady.redis.scripts import DELAY, RENEW, SEND, TAKE
from celery_steady.redis.unacknowledged import DEAD_LETTERS, NOT_NOTED, QoS
from celery_steady.transports import as_redis, kind
from celery_steady.waiting import log_waiting

logger = getLogger(__name__)

BATCH_SIZE = 1000  # messages in one command
# Seconds until a waiting worker looks for messages of stock senders, who ring no bell. Some providers bill
# each command: so it does often only after its start, and after it has found such a message.
IDLE, QUICK = 2, 0.15
LEARNS, REMEMBERS = 30, 3600
LISTEN = 1  # seconds of one wait for messages that need no note, as in kombu
FULL = 0.05  # seconds until a worker without a free slot looks for one
REFUSED = 1  # seconds until a worker asks again that Redis has refused
EMPTY = b"$0\r\n\r\n"  # an empty argument in Redis' protocol


class Channel(KeepingChannel, redis.Channel):
    QoS = QoS
    errors = (RedisError,)
    leases_key = "unacked_leases"
    renewed_key = "unacked_renewed"
    without_copy = None  # a header: the messages that have it may be lost with their worker
    mark = "\t \t"  # their first characters: valid before JSON, but no other sender writes them
    asked = None  # the command whose answer comes next, and the tag of the message in it
    commands_client = packed = None
    look_at = 0  # until this time by monotonic(), wait for a bell
    quick_until = None  # until this time, look often
    rang = True  # whether the last wait ended with a bell
    ask_at = 0  # until this time, ask for nothing
    # Ask whether an idle connection still exists. kombu does so only in a worker, and Flower, which
    # only listens, would never notice (kombu pull 2590).
    socket_keepalive = True
    if sys.platform == "linux":
        socket_keepalive_options = {
            socket.TCP_KEEPIDLE: 30,  # seconds
            socket.TCP_KEEPINTVL: 10,
            socket.TCP_KEEPCNT: 3,
        }

    def __init__(self, *args, **kwargs):
        self.unacknowledging = set()  # queues whose messages are never acknowledged
        super().__init__(*args, **kwargs)

    def _create_client(self, asynchronous=False):
        """Return one client for all commands: kombu's new one for each costs a tenth of sending a task."""
        if asynchronous:
            return super()._create_client(asynchronous)
        if getattr(self.commands_client, "connection_pool", None) is not self.pool:
            self.commands_client = super()._create_client()
        return self.commands_client

    def key(self, name):
        return f"{self.global_keyprefix}{name}"

    def script(self, text, keys, *arguments):
        """Return the command that runs this script. `keys` are without the prefix."""
        return "EVAL", text, len(keys), *map(self.key, keys), *arguments

    def run(self, text, keys, *arguments):
        with self.conn_or_acquire() as client:
            return client.execute_command(*self.script(text, keys, *arguments))

    @property
    def unacked_keys(self):
        return self.unacked_key, self.unacked_index_key, self.leases_key

    def bell(self, queue):
        return f"{queue}{self.sep}bell"

    def delayed(self, name):
        return f"{name}{self.sep}delayed"

    def lists(self, queues):
        return [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]

    def list_for(self, queue, payload):
        return self._q_for_pri(queue, self._get_message_priority(payload, reverse=False))

    # Send

    def text(self, payload):
        """Return what is stored for a message."""
        needs_copy = self.without_copy not in (payload.get("headers") or ())
        return dumps(payload) if needs_copy else self.mark + dumps(payload)

    def _put(self, queue, message, _publish_batch=None, **kwargs):
        name = self.list_for(queue, message)
        keys = [self.delayed(name), name, self.bell(queue)]
        if expires := getattr(self, "_expires", {}).get(queue, 0):  # since kombu 5.6
            keys += self.lists([queue])
        command = self.script(SEND, keys, self.text(message), due_time(message), expires)
        if _publish_batch is not None:
            _publish_batch.add("execute_command", *command)
        else:
            with self.conn_or_acquire() as client:
                client.execute_command(*command)

    # Receive

    def basic_consume(self, queue, no_ack, *args, **kwargs):
        change = self.unacknowledging.add if no_ack else self.unacknowledging.discard
        change(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_get(self, queue, no_ack=False, **kwargs):
        message = super().basic_get(queue, no_ack, **kwargs)
        if message and no_ack and self.ack_emulation:
            self.qos.forget(message.delivery_tag)
        return message

    def take(self, queues, order="0", tag=""):
        """Return the command that takes a message from one of these queues, and notes it under this tag.

        `order` has the numbers of the queues, the first one first.
        """
        lists = self.lists(queues)
        bells = map(self.bell, queues)
        keys = [*self.unacked_keys, *lists, *map(self.delayed, lists), *bells]
        names = [dumps(queue) if self.is_noted(queue) else "" for queue in queues]
        idle = IDLE if any(names) else LISTEN
        lease = self.visibility_timeout if self.renews else 0
        mark = self.mark if self.without_copy else ""
        numbers = len(queues), len(self.priority_steps), idle, lease
        return self.script(TAKE, keys, *numbers, mark, *names, order, tag)

    def is_noted(self, queue):
        return self.ack_emulation and queue not in self.unacknowledging

    def _get(self, queue):
        while True:
            tag = str(uuid4())
            with self.conn_or_acquire() as client:
                answer = client.execute_command(*self.take([queue], tag=tag))
            if not answer[1:]:
                raise Empty
            if payload := self.read(tag, *answer[2:]):
                return payload
            if queue == DEAD_LETTERS:
                raise Empty  # it is there again

    def read(self, tag, item, noted=None):
        """Return the message with this tag. If it can't be read, make it a dead letter, and return None.

        The tag that its sender has written counts for nothing: another message might have the same.
        """
        try:
            payload = loads(bytes_to_str(item))
            payload["properties"]["delivery_tag"] = tag if noted else NOT_NOTED + tag
        except Exception as error:
            logger.error("dead letter, because it can't be read: %r %.200r", error, item)
            if noted:
                self.qos.bury(tag, item)
            return None
        return payload

    def _update_queue_cycle(self):
        self.packed = None
        super()._update_queue_cycle()

    def pack_take(self, connection, queues, tag):
        """Return the packed command that takes a message from one of these queues.

        Only its end depends on their order: a worker with ten queues has millions of orders.
        """
        if self.packed is None:
            packed = b"".join(connection.pack_command(*self.take(queues, "", "")))
            start = packed.removesuffix(EMPTY + EMPTY)
            self.packed = {queue: str(number) for number, queue in enumerate(queues)}, start
        numbers, start = self.packed
        end = " ".join(numbers[queue] for queue in queues), tag
        return start + b"".join(b"$%d\r\n%b\r\n" % (len(text), text.encode()) for text in end)

    def _brpop_start(self, timeout=None):
        """Ask for a message, or for a bell if there was none."""
        now = monotonic()
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or now < self.ask_at:
            return
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at, tag = now, str(uuid4())
        if (wait := self.look_at - now) < 0.001:  # seconds: Redis 6 takes less for 0, forever
            self.asked = "EVAL", tag
            self.quick_until = self.quick_until or now + LEARNS
            connection.send_packed_command([self.pack_take(connection, queues, tag)])
        else:
            self.asked = "BRPOP", tag
            # What isn't acknowledged, such as the replies to `celery inspect`, needs no note.
            lists = self.lists([queue for queue in queues if not self.is_noted(queue)])
            keys = map(self.key, [*lists, *map(self.bell, queues)])
            connection.send_command("BRPOP", *keys, wait)

    def _brpop_read(self, **options):
        self.look_at = 0
        command, tag = self.asked
        connection = self.client.connection
        try:
            answer = self.client.parse_response(connection, command, **options)
        except self.connection_errors:
            connection.disconnect()  # so that the poller connects again
            raise
        except self.ResponseError as error:
            log_waiting(logger, f"take a message from {', '.join(self.active_queues)}", error)
            self.ask_at = monotonic() + REFUSED
            connection.disconnect()  # it may be to a server that has become a replica
            raise Empty from error
        finally:
            self._in_poll = None
            getattr(self, "_flush_brpop_reauth", bool)()  # since kombu 5.7
        if command == "BRPOP":
            self.rang = bool(answer)
        else:
            wait, *answer = answer
            self.wait(float(wait), found=answer)
        if not answer:
            raise Empty
        name, *taken = answer
        name = bytes_to_str(name)
        if command == "EVAL":  # from BRPOP's answer, kombu has removed it
            name = name.removeprefix(self.global_keyprefix)
        queue, _, kind = name.rpartition(self.sep)
        if queue and kind == "bell":
            raise Empty
        queue = queue or kind
        self._queue_cycle.rotate(queue)
        if payload := self.read(tag, *taken):
            self.connection._deliver(payload, queue)
        elif queue == DEAD_LETTERS:
            self.ask_at = monotonic() + REFUSED  # it is there again
        return True

    def wait(self, seconds, found):
        """Wait for a bell until a message is due in so many seconds, or for a short while."""
        now = monotonic()
        if found and not self.rang:
            self.quick_until = now + REMEMBERS
        self.rang = True
        if now < self.quick_until and seconds == IDLE and len(self.active_queues) < 100:
            seconds = QUICK
        self.look_at = now + seconds

    def _receive_one(self, client):
        """Read what is sent to all workers, such as a command. kombu would end the worker by an odd one.

        Or it would leave in the buffer what came together with one, until the next message.
        """
        try:
            return super()._receive_one(client)
        except (*self.connection_errors, *self.connection.channel_errors):
            raise
        except Exception as error:
            logger.error("dropped a message to all workers that can't be read: %r", error)
            return None

    # Keep

    def delay(self, queue, payload, due):
        keys = *self.unacked_keys, self.delayed(self.list_for(queue, payload))
        tag = payload["properties"]["delivery_tag"]
        return bool(self.run(DELAY, keys, tag, self.text(payload), due))

    def renew(self, messages):
        keys = self.unacked_index_key, self.leases_key, self.renewed_key
        tags = [message.delivery_tag for message in messages]
        for first in range(0, len(tags) or 1, BATCH_SIZE):
            some = tags[first : first + BATCH_SIZE]
            self.run(RENEW, keys, self.visibility_timeout, *some)

    def restore_lapsed(self):
        return self.ack_emulation and self.qos.restore_lapsed()

    # The rest of a queue

    def _purge(self, queue):
        lists = self.lists([queue])
        with self.conn_or_acquire() as client, client.pipeline() as pipe:
            for delayed in map(self.delayed, lists):
                pipe.execute_command("ZCARD", self.key(delayed))
                pipe.delete(delayed)
            waiting = sum(pipe.execute()[::2])
        return super()._purge(queue) + waiting

    def _delete(self, queue, *args, **kwargs):
        names = [self.bell(queue), *map(self.delayed, self.lists([queue]))]
        with self.conn_or_acquire(client=kwargs.get("client")) as client:
            client.delete(*names)
        super()._delete(queue, *args, **kwargs)


class SentinelChannel(Channel, redis.SentinelChannel):
    pass


class Poller(redis.MultiChannelPoller):
    def get(self, callback, timeout=None):
        """Wait for an answer, but not longer than until a channel asks again.

        Without an event loop, as with gevent, kombu would not notice that a slot is free: it waits two seconds.
        """
        if any(channel.ask_at > monotonic() for channel in self._channels):
            timeout = min(timeout or REFUSED, REFUSED)
        if any(each.active_queues and not each.qos.can_consume() for each in self._channels):
            timeout = min(timeout or FULL, FULL)
        return super().get(callback, timeout)


class Transport(redis.Transport):
    """Tries to send a task as often as the retry policy says. kombu 5.7 tries twice if Redis refuses."""

    Channel = Channel
    recoverable_connection_errors = (
        redis.Transport.connection_errors + redis.Transport.channel_errors
    )
    can_parse_url = True  # so kombu leaves the URL to read_url(), and asks as_uri()

    def __init__(self, client, **options):
        if "://" in (client.hostname or "") and not client.uri_prefix:
            read_url(client)
        super().__init__(client, **options)
        self.cycle = Poller()
        self.scheme = "rediss" if client.ssl else "redis"
        if "master_name" in client.transport_options or client.transport_cls == "sentinel":
            self.scheme = "sentinel"
            self.Channel = SentinelChannel
            self.default_port = redis.SentinelTransport.default_port
        keep_transport(client)

    def as_uri(self, uri, include_password=False, mask="**"):
        """Return the URL as it was set. kombu would write this class in place of `redis`."""
        client = self.client
        if client.uri_prefix:  # a socket's file
            raise NotImplementedError
        password = client.password if include_password else mask
        path = quote(str(client.virtual_host or "/"))
        place = client.hostname, client.port or self.default_port, client.userid, password, path
        return as_url(self.scheme, *place, sanitize=not include_password, mask=mask)


def read_url(client):
    """Let the URL say whether the connection is encrypted. kombu goes by broker_transport, if it is set."""
    transport, url = client.transport_cls, as_redis(client.hostname)
    if kind(url) != "redis":
        raise ImproperlyConfigured(f"broker_transport is for Redis, not for {kind(url)}://")
    found = parse_url(url)
    found = {name: value for name, value in found.items() if value or name == "hostname"}
    client._init_params(**client._initial_params | found)
    if found["transport"] != "sentinel":
        client.transport_cls = transport


def keep_transport(client):
    """Let this connection keep its transport when it takes the next URL of several. kombu's doesn't."""
    if type(client).switch is Connection.switch and "switch" not in vars(client):
        switch, transport = client.switch, client.transport_cls

        def switch_and_keep(url):
            switch(url)
            client.transport_cls = transport

        client.switch = switch_and_keep


Transport = versions.choose("Redis", Transport, redis.Transport)
