"""The setting broker_transport for Redis and Sentinel: "celery_steady.redis:Transport". And results there.

kombu hands over a message in two steps, and Celery's workers hold countdowns in memory. Here, to take a
message, to delay it, to renew it and to put it into a list is one script each, by Redis' clock. None reads
it: whatever it contains, it is noted. Before a dead worker's message is put back, Python reads it, and
what can't be read becomes a dead letter. The keys are kombu's, so stock workers and senders may run
alongside these. New keys:

- `QUEUE:delayed`, a sorted set: messages by the time when they are due (`:` is kombu's separator)
- `QUEUE:bell`, a list: a sender pushes an entry, so that a waiting worker looks for messages
- `unacked_leases`, a sorted set: delivery tags by the time until when their worker has the message. In
  kombu's `unacked_index`, they have the same time; a stock worker adds its own visibility timeout
- `unacked_renewed`, a hash: renew.lua says what it has
- `dead-letters`, a list of messages, which kombu reads as a queue
"""

from celery_steady.redis.removal import release_countdowns
from celery_steady.redis.results import RedisBackend, SentinelBackend
from celery_steady.redis.transport import Channel, Transport

__all__ = ["Channel", "RedisBackend", "SentinelBackend", "Transport", "release_countdowns"]
