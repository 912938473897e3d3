"""Results in Redis."""

from celery import states
from celery.backends import asynchronous, redis

from celery_steady.results import KeepsResults


class Drainer(asynchronous.geventDrainer):
    """Reads results for all greenlets, also after an error. Celery's ends (celery issue 4857)."""

    def _ensure_not_shut_down(self):
        try:
            super()._ensure_not_shut_down()
        finally:
            if self._shutdown.is_set():
                self.__init__(self.result_consumer)


class ResultConsumer(redis.ResultConsumer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if type(self.drainer) is asynchronous.geventDrainer:
            self.drainer = Drainer(self)


class KeepsRedisResults(KeepsResults):
    def _set_with_state(self, key, value, state):
        if state != states.RETRY:
            return super()._set_with_state(key, value, state)

        def store(pipe):
            if not self.is_result(pipe.get(key)):
                pipe.multi()
                pipe.set(key, value, ex=self.expires or None)
                pipe.publish(key, value)

        self.ensure(self.client.transaction, (store, key))


class RedisBackend(KeepsRedisResults, redis.RedisBackend):
    ResultConsumer = ResultConsumer


class SentinelBackend(KeepsRedisResults, redis.SentinelBackend):
    ResultConsumer = ResultConsumer
