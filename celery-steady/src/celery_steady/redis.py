"""The setting broker_transport for Redis and Sentinel: "celery_steady.redis:Transport". And results there.

kombu hands over a message in two steps, and Celery's workers hold countdowns in memory. Here, each of four
things is one step in Redis, by Redis' clock: a worker takes a message, a countdown waits, workers renew
their messages, and they put back those of dead workers. The keys are kombu's, so stock workers and senders
may run beside these. New keys:

- `QUEUE:delayed`, a sorted set: messages by the time when they are due (`:` is kombu's separator)
- `QUEUE:bell`, a list: a sender pushes an entry, so that a waiting worker looks for messages
- `unacked_renewed`, a hash: when a worker last renewed messages, and since when there was no gap
- `dead-letters`, a list of messages, which kombu reads as a queue
"""

import socket
import sys
from json import JSONDecodeError
from logging import getLogger
from queue import Empty
from time import monotonic
from urllib.parse import quote

from celery.backends import asynchronous
from celery.backends import redis as redis_results
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from kombu.utils.url import as_url
from redis.exceptions import RedisError

from celery_steady import versions
from celery_steady.messages import KeepingChannel, due_time
from celery_steady.results import KeepsResults

logger = getLogger(__name__)

DEAD_LETTERS = "dead-letters"
DELIVERIES = 20  # to workers that died, as a quorum queue's delivery-limit in RabbitMQ 4
IDLE = 2  # seconds until a waiting worker looks for messages of stock senders, who ring no bell
BATCH_SIZE = 1000  # messages in one command
STOCK = 3600  # seconds until messages of a stock worker come again: kombu's visibility_timeout

NOW = "local now = redis.call('time'); now = now[1] + now[2] / 1000000\n"
# A full Redis refuses commands that need memory, but only until a script has written. So what a worker
# does begins with a write that needs none. SEND doesn't, and nothing of it happens.
# KEYS: delayed, list, bell, and what else expires. ARGV: message, time when it's due, milliseconds or 0.
SEND = f"""{NOW}
if tonumber(ARGV[2]) > now then
  redis.call('zadd', KEYS[1], ARGV[2], ARGV[1])
else
  redis.call('lpush', KEYS[2], ARGV[1])
end
redis.call('lpush', KEYS[3], '')
redis.call('ltrim', KEYS[3], 0, 99)
if tonumber(ARGV[3]) > 0 then
  for i = 2, #KEYS do redis.call('pexpire', KEYS[i], ARGV[3]) end
end
"""
# KEYS: unacked, unacked_index, delayed. ARGV: message, time when it's due, delivery tag.
DELAY = f"""{NOW}
if tonumber(ARGV[2]) > now and redis.call('hdel', KEYS[1], ARGV[3]) == 1 then
  redis.call('zrem', KEYS[2], ARGV[3])
  redis.call('zadd', KEYS[3], ARGV[2], ARGV[1])
  return 1
end
"""
# KEYS: unacked, unacked_index, n lists, n delayed, bells. ARGV: n, n names of queues as JSON, or
# nothing if messages are not acknowledged, and the header of messages that need no copy.
# Returns the seconds until a message is due, or 0 if there may be more now. And a list and its message.
#
# The hash unacked has what kombu writes: message, exchange, routing key. Without an exchange, the message
# can only go back to this queue. The space marks it as one that is renewed.
TAKE = f"""
local n, wait = tonumber(ARGV[1]), {IDLE}
if redis.call('exists', unpack(KEYS, 3)) == 0 then return {{tostring(wait)}} end
{NOW}
local delays = redis.call('exists', unpack(KEYS, n + 3, 2 * n + 2)) > 0
if delays then
  for i = 3, n + 2 do
    local due = redis.call('zrangebyscore', KEYS[n + i], '-inf', now, 'limit', 0, 100)
    for _, item in ipairs(due) do
      redis.call('zrem', KEYS[n + i], item)
      redis.call('lpush', KEYS[i], item)
    end
  end
end
local answer = {{'0'}}
for i = 3, n + 2 do
  local item = redis.call('rpop', KEYS[i])
  if item then
    local ok, tag = pcall(function()
      local message = cjson.decode(item)
      return not message.headers[ARGV[n + 2]] and message.properties.delivery_tag
    end)
    if ok and tag and ARGV[i - 1] ~= '' then
      redis.call('hset', KEYS[1], tag, '[' .. item .. ', "", ' .. ARGV[i - 1] .. ' ]')
      redis.call('zadd', KEYS[2], now, tag)
    end
    answer = {{'0', KEYS[i], item}}
    if redis.call('exists', unpack(KEYS, 3, n + 2)) > 0 then return answer end
    break
  end
end
if delays then
  for i = n + 3, 2 * n + 2 do
    local next = redis.call('zrange', KEYS[i], 0, 0, 'withscores')[2]
    if next then wait = math.min(wait, next - now) end
  end
end
redis.call('del', unpack(KEYS, 2 * n + 3))
answer[1] = tostring(wait)
return answer
"""
# KEYS: unacked_index, unacked_renewed. ARGV: visibility timeout, delivery tags.
RENEW = f"""{NOW}
redis.call('persist', KEYS[2])
if now - (redis.call('hget', KEYS[2], 'at') or 0) > ARGV[1] / 2 then
  redis.call('hset', KEYS[2], 'since', now)
end
redis.call('hset', KEYS[2], 'at', now)
for i = 2, #ARGV do redis.call('zadd', KEYS[1], 'xx', now, ARGV[i]) end
"""
# Returns tags and entries of `unacked` that nobody renews. For one visibility timeout, nobody else gets
# them. After a time when nobody could renew, because Redis was away, all get time to do so.
# KEYS: unacked, unacked_index, unacked_renewed. ARGV: visibility timeout.
LAPSED = f"""{NOW}
local times = redis.call('hmget', KEYS[3], 'at', 'since')
local gap, steady = now - (times[1] or 0), now - (times[2] or now)
local entries = {{}}
if gap > ARGV[1] / 2 or steady < ARGV[1] / 2 then return entries end
local old = redis.call(
  'zrangebyscore', KEYS[2], '-inf', now - ARGV[1], 'withscores', 'limit', 0, 10 * {BATCH_SIZE})
if #old > 0 then redis.call('persist', KEYS[1]) end
for i = 1, #old, 2 do
  local tag, entry = old[i], redis.call('hget', KEYS[1], old[i])
  if not entry then
    redis.call('zrem', KEYS[2], tag)
  elseif entry:sub(-2) == ' ]' or now - old[i + 1] > {STOCK} then
    redis.call('zadd', KEYS[2], now, tag)
    table.insert(entries, tag)
    table.insert(entries, entry)
    if #entries == 2 * {BATCH_SIZE} then break end
  end
end
return entries
"""
# KEYS: delayed, list.
RELEASE = """
local items = redis.call('zrange', KEYS[1], 0, -1)
redis.call('del', KEYS[1])
for _, item in ipairs(items) do redis.call('lpush', KEYS[2], item) end
return #items
"""
# KEYS: unacked, unacked_index, lists. ARGV: delivery tag, message, rpush to be the next or lpush.
PUT = """
if redis.call('hdel', KEYS[1], ARGV[1]) == 1 then
  redis.call('zrem', KEYS[2], ARGV[1])
  for i = 3, #KEYS do redis.call(ARGV[3], KEYS[i], ARGV[2]) end
end
"""


class QoS(redis.QoS):
    # TAKE has noted the message.
    append = virtual.QoS.append

    def can_consume(self):
        # What was asked for will come.
        return bool(self.channel._in_poll) or super().can_consume()

    def reject(self, delivery_tag, requeue=False):
        """Put the message back, or make it a dead letter. kombu would delete it."""
        if requeue:
            return super().reject(delivery_tag, requeue)
        with self.channel.conn_or_acquire() as client:
            if entry := client.hget(self.unacked_key, delivery_tag):
                payload = loads(bytes_to_str(entry))[0]
                self.put(client, delivery_tag, payload, [DEAD_LETTERS])
        virtual.QoS.ack(self, delivery_tag)

    def restore_by_tag(self, tag, client=None, leftmost=False):
        with self.channel.conn_or_acquire(client) as client:
            if entry := client.hget(self.unacked_key, tag):
                self.put_back(client, tag, entry, "lpush" if leftmost else "rpush")

    def restore_visible(self, *args, **kwargs):
        self.channel.renew()

    def restore_lapsed(self, client):
        """Put back messages of dead workers. What has killed too many becomes a dead letter."""
        keys = self.unacked_key, self.unacked_index_key, self.channel.renewed_key
        command = self.channel.script(LAPSED, keys, self.visibility_timeout)
        entries = client.execute_command(*command)
        for tag, entry in zip(entries[::2], entries[1::2], strict=True):
            self.put_back(client, tag, entry, has_died=True)

    def put_back(self, client, tag, entry, push="rpush", has_died=False):
        payload, exchange, routing_key = loads(bytes_to_str(entry))
        queues = self.channel._lookup(exchange, routing_key)
        properties = payload["properties"]
        for part in payload.get("headers"), properties.get("delivery_info"):
            if isinstance(part, dict):
                part["redelivered"] = True
        if has_died:
            properties["deliveries"] = properties.get("deliveries", 0) + 1
            if properties["deliveries"] == DELIVERIES:
                logger.error("%d workers died with this message: %.200r", DELIVERIES, payload)
                return self.put(client, tag, payload, [DEAD_LETTERS])
        lists = [self.channel.list_for(queue, payload) for queue in queues]
        self.put(client, tag, payload, lists, push)

    def put(self, client, tag, payload, lists, push="lpush"):
        keys = self.unacked_key, self.unacked_index_key, *lists
        client.execute_command(*self.channel.script(PUT, keys, tag, dumps(payload), push))


class Channel(KeepingChannel, redis.Channel):
    QoS = QoS
    errors = (RedisError,)
    renewed_key = "unacked_renewed"
    without_copy = ""  # a header: the messages that have it may be lost with their worker
    asked = None  # the command whose answer comes next
    commands_client = None
    look_at = 0  # until this time by monotonic(), wait for a bell
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
        self.commands = {}
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

    def bell(self, queue):
        return f"{queue}{self.sep}bell"

    def delayed(self, name):
        return f"{name}{self.sep}delayed"

    def lists(self, queues):
        return [self._q_for_pri(queue, step) for step in self.priority_steps for queue in queues]

    def list_for(self, queue, payload):
        return self._q_for_pri(queue, self._get_message_priority(payload, reverse=False))

    # Send

    def _put(self, queue, message, _publish_batch=None, **kwargs):
        name = self.list_for(queue, message)
        keys = [self.delayed(name), name, self.bell(queue)]
        if expires := getattr(self, "_expires", {}).get(queue, 0):  # since kombu 5.6
            keys += self.lists([queue])
        command = self.script(SEND, keys, dumps(message), due_time(message), expires)
        if _publish_batch is not None:
            _publish_batch.add("execute_command", *command)
        else:
            with self.conn_or_acquire() as client:
                client.execute_command(*command)

    # Receive

    def basic_consume(self, queue, no_ack, *args, **kwargs):
        change = self.unacknowledging.add if no_ack else self.unacknowledging.discard
        change(queue)
        self.commands.clear()
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def basic_get(self, queue, no_ack=False, **kwargs):
        message = super().basic_get(queue, no_ack, **kwargs)
        if message and no_ack:
            self.qos._remove_from_indices(message.delivery_tag).execute()
        return message

    def take(self, queues):
        """Return the command that takes a message from one of these queues, the first ones first."""
        lists = self.lists(queues)
        bells = map(self.bell, queues)
        keys = [self.unacked_key, self.unacked_index_key, *lists, *map(self.delayed, lists), *bells]
        names = ["" if queue in self.unacknowledging else dumps(queue) for queue in queues]
        names *= len(self.priority_steps)
        return self.script(TAKE, keys, len(lists), *names, self.without_copy)

    def _get(self, queue):
        with self.conn_or_acquire() as client:
            answer = client.execute_command(*self.take([queue]))
        if not answer[1:]:
            raise Empty
        return loads(bytes_to_str(answer[2]))

    def _brpop_start(self, timeout=None):
        """Ask for a message, or for a bell if there was none."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        connection = self._in_poll = self.client.connection
        self._brpop_sent_at = now = monotonic()
        if (wait := self.look_at - now) < 0.001:  # seconds: Redis 6 takes less for 0, forever
            self.asked = "EVAL"
            packed = self.commands.get(tuple(queues))
            if packed is None:
                packed = list(connection.pack_command(*self.take(queues)))
                self.commands[tuple(queues)] = packed
            connection.send_packed_command(packed)
        else:
            self.asked = "BRPOP"
            bells = [self.key(self.bell(queue)) for queue in queues]
            connection.send_command("BRPOP", *bells, wait)

    def _brpop_read(self, **options):
        self.look_at = 0
        connection = self.client.connection
        try:
            answer = self.client.parse_response(connection, self.asked, **options)
        except self.connection_errors:
            connection.disconnect()  # so that the poller connects again
            raise
        finally:
            self._in_poll = None
            getattr(self, "_flush_brpop_reauth", bool)()  # since kombu 5.7
        if self.asked == "BRPOP":
            raise Empty
        wait, *message = map(bytes_to_str, answer)
        self.look_at = monotonic() + float(wait)
        if not message:
            raise Empty
        name, item = message
        name = name[len(self.global_keyprefix) :]
        queue = name.rsplit(self.sep, 1)[0]
        self._queue_cycle.rotate(queue)
        try:
            payload = loads(item)
        except JSONDecodeError as error:
            logger.error("dropped a message that is no JSON: %r", error)
        else:
            self.connection._deliver(payload, queue)
        return True

    def delay(self, queue, payload, due):
        delayed = self.delayed(self.list_for(queue, payload))
        keys = self.unacked_key, self.unacked_index_key, delayed
        tag = payload["properties"]["delivery_tag"]
        with self.conn_or_acquire() as client:
            return client.execute_command(*self.script(DELAY, keys, dumps(payload), due, tag))

    # Keep

    def renew(self):
        """Renew this channel's messages. Then put back those that nobody renews."""
        tags = list(self.qos._delivered)
        keys = self.unacked_index_key, self.renewed_key
        with self.conn_or_acquire() as client:
            for first in range(0, len(tags) or 1, BATCH_SIZE):
                some = tags[first : first + BATCH_SIZE]
                client.execute_command(*self.script(RENEW, keys, self.visibility_timeout, *some))
            self.qos.restore_lapsed(client)

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


def release_countdowns(app):
    """Move all countdowns to their queues, where stock workers take them and wait. Return how many."""
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        with channel.conn_or_acquire() as client:
            return sum(
                client.execute_command(*channel.script(RELEASE, [channel.delayed(name), name]))
                for name in channel.lists(app.amqp.queues)
            )


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
