"""What a worker has taken and not yet acknowledged, in Redis."""

import re
from logging import getLogger
from time import monotonic

from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis.exceptions import RedisError, ResponseError

from celery_steady.redis.scripts import FORGET, LAPSED, PUT
from celery_steady.waiting import log_waiting

logger = getLogger(__name__)

DEAD_LETTERS = "dead-letters"
MOST_DEAD_LETTERS = 10_000
DELIVERIES = 20  # to workers that died, as a quorum queue's delivery-limit in RabbitMQ 4
STOCK = 3600  # seconds until messages of a stock worker come again: kombu's visibility_timeout
ROUND = 0.2  # seconds in which lapsed messages are put back before the worker does something else
NOT_NOTED = "-"  # how the tag of a message begins that Redis has no copy of
# An entry of the hash `unacked`: message, exchange, routing key
ENTRY = re.compile(rb'\[(.*), ("(?:[^"\\]|\\.)*"), ("(?:[^"\\]|\\.)*") ?\]', re.DOTALL)


class QoS(redis.QoS):
    # TAKE has noted the message.
    append = virtual.QoS.append
    look_at = 0  # the next time to look for messages of dead workers, without a step of the worker

    def can_consume(self):
        # What was asked for will come.
        return bool(self.channel._in_poll) or super().can_consume()

    def forget(self, tag):
        if not tag.startswith(NOT_NOTED):
            self.channel.run(FORGET, self.channel.unacked_keys, tag)

    def ack(self, delivery_tag):
        self.forget(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def reject(self, delivery_tag, requeue=False):
        """Put the message back, or make it a dead letter as it is. kombu would delete it."""
        if requeue:
            return super().reject(delivery_tag, requeue)
        if entry := self.entry(delivery_tag):
            self.bury(delivery_tag, message_in(entry))
        virtual.QoS.ack(self, delivery_tag)

    def entry(self, tag):
        with self.channel.conn_or_acquire() as client:
            return client.hget(self.unacked_key, tag)

    def bury(self, tag, text):
        if self.put(tag, text, [DEAD_LETTERS], [DEAD_LETTERS], most=MOST_DEAD_LETTERS):
            logger.error("deleted the oldest dead letter: there are %d", MOST_DEAD_LETTERS)

    def put(self, tag, text, lists, queues, push="lpush", most=0):
        bells = map(self.channel.bell, queues)
        places = [key for pair in zip(lists, bells, strict=True) for key in pair]
        return self.channel.run(PUT, [*self.channel.unacked_keys, *places], tag, text, push, most)

    # Put back

    def restore_unacked(self, client=None):
        """Put back all that this worker has. What can't be put back comes again when its lease ends."""
        for tag in list(self._delivered):
            try:
                self.put_back(tag, has_died=self.channel.ends_by_error)
            except RedisError as error:
                logger.error("Could not put back a message yet: %s", error)
                if isinstance(error, self.channel.connection_errors):
                    break
        self._delivered.clear()

    def restore_by_tag(self, tag, client=None, leftmost=False):
        self.put_back(tag, "lpush" if leftmost else "rpush")

    def restore_visible(self, *args, **kwargs):
        """Put back messages of dead workers, if no step of a worker does: with kombu's consumers."""
        if not self.channel.renews and monotonic() > self.look_at:
            self.look_at = monotonic() + self.channel.pause
            self.restore_lapsed()

    def restore_lapsed(self):
        """Put back messages of dead workers for a short while. Return whether there may be more."""
        keys = *self.channel.unacked_keys, self.channel.renewed_key
        # Where stock workers have a longer timeout, ours has it, too.
        stock = max(STOCK, self.visibility_timeout)
        until = monotonic() + ROUND
        while tags := self.channel.run(LAPSED, keys, self.visibility_timeout, stock):
            for tag in map(bytes_to_str, tags):
                try:
                    self.put_back(tag, has_died=True)
                except ResponseError as error:
                    log_waiting(logger, "put back a message of a dead worker", error)
            if monotonic() > until:
                return True
        return False

    def put_back(self, tag, push="rpush", has_died=False):
        """Put a message into its queue. What can't be read or has killed too many becomes a dead letter."""
        if tag.startswith(NOT_NOTED):
            return self.send_back(tag, push)
        if not (entry := self.entry(tag)):
            return None
        try:
            payload, exchange, routing_key = loads(bytes_to_str(entry))
            count = mark(payload, has_died)
            if not (queues := self.channel._lookup(exchange, routing_key)):
                raise LookupError(f"no queue is bound to {exchange!r} for {routing_key!r}")
            lists = [self.channel.list_for(queue, payload) for queue in queues]
            text = dumps(payload)
        except RedisError:
            raise
        except Exception as error:
            logger.error("dead letter, because it can't be put back: %r %.200r", error, entry)
            return self.bury(tag, message_in(entry))
        if has_died and count >= DELIVERIES:
            logger.error("%d workers died with this message: %.200r", count, payload)
            return self.bury(tag, text)
        return self.put(tag, text, lists, queues, push)

    def send_back(self, tag, push):
        """Put back a message without a note: this process has the only copy."""
        payload = self._delivered[tag]._raw
        mark(payload)
        queue = payload["properties"]["delivery_info"]["routing_key"]
        with self.channel.conn_or_acquire() as client:
            getattr(client, push)(self.channel.list_for(queue, payload), self.channel.text(payload))


def mark(payload, has_died=False):
    """Mark a message as one that comes again. Return how many workers died with it."""
    properties = payload["properties"]
    for part in payload.get("headers"), properties.get("delivery_info"):
        if isinstance(part, dict):
            part["redelivered"] = True
    count = properties.get("deliveries")
    count = (count if isinstance(count, int) else 0) + has_died
    if has_died:
        properties["deliveries"] = count
    return count


def message_in(entry):
    """Return the message in an entry of `unacked`, as its sender has written it."""
    found = ENTRY.fullmatch(entry)
    return found[1] if found else entry
