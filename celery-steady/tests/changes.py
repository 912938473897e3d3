"""Prints what celery-steady changes in Celery, kombu, billiard and the clients of brokers: python changes.py redis://…

test_isolation.py runs it.
"""

import pkgutil
import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from unittest import SkipTest

import celery
from workers import in_thread

PACKAGES = "celery", "kombu", "billiard", "boto3", "botocore", "redis"
POOLS = "solo", "threads"
# What a worker of Celery's changes: caches, and the state of the process.
OWN = {
    "__warningregistry__",
    "_abc_impl",
    "celery._state:_apps",
    "celery._state:_on_app_finalizers",
    "celery._state:_task_join_will_block",
    "celery._state:default_app",
    "celery.apps.worker:active_thread_count",
    "all_total_count",
    "celery.worker.state:total_count",
    "kombu.transport.redis:Channel:_fanout_queues",
    "kombu.transport:_transport_cache",
}


def import_all():
    """Import each module that has what it needs here, so that none is new later."""
    for package in map(import_module, PACKAGES):
        for module in pkgutil.walk_packages(
            package.__path__, f"{package.__name__}.", lambda _: None
        ):
            with suppress(Exception, SystemExit, SkipTest):
                import_module(module.name)


def is_theirs(name):
    return isinstance(name, str) and name.split(".")[0] in PACKAGES


def owners():
    """Return their modules and the classes in them, {name: module or class}."""
    found = {}
    for name, module in list(sys.modules.items()):
        if is_theirs(name) and isinstance(module, ModuleType):
            found[name] = module
            for each in list(vars(module).values()):
                if isinstance(each, type) and is_theirs(each.__module__):
                    found[f"{each.__module__}:{each.__qualname__}"] = each
    return found


def content(value):
    """Return what must stay: the object, or the objects in a container."""
    if type(value) is dict:
        return {key: id(each) for key, each in list(value.items())}
    if type(value) in (list, tuple):
        return [id(each) for each in value]
    if type(value) is set:
        return set(map(id, value))
    return id(value)


OWNERS = set()  # the names of all modules and classes at the first look
KEPT = []  # all objects, so that no id is used again


def look():
    found = {}
    for name, owner in owners().items():
        attributes = dict(vars(owner))
        KEPT.append([(value, content(value)) for value in attributes.values()])
        KEPT.extend(list(each.values()) for each in attributes.values() if type(each) is dict)
        for attribute, value in attributes.items():
            found[f"{name}:{attribute}"] = content(value)
    return found


def run(pool, broker, backend, **conf):
    """Run a task in a worker of a new app. Return the class of its consumer."""
    app = celery.Celery("app", broker=broker, backend=backend, set_as_current=False)
    app.conf.update(conf)

    @app.task(shared=False)
    def add(x, y):
        return x + y

    with in_thread(app, pool) as worker:
        assert add.delay(2, 3).get(timeout=60, interval=0.01) == 5
        kind = f"{type(worker.consumer).__module__}:{type(worker.consumer).__qualname__}"
    app.close()
    return kind


def main(url):
    import_all()
    for pool in POOLS:
        for broker, backend in ("memory://", "cache+memory://"), (url, url):
            run(pool, broker, backend)  # fills the caches
    before = look()
    OWNERS.update(owners())

    import celery_steady
    from celery_steady import defaults

    consumer = "celery_steady.consumer:Consumer"
    for module in "app", "beat", "events", "rabbitmq", "redis", "results", "sqs", "versions":
        import_module(f"celery_steady.{module}")
    transport = {"broker_transport": "celery_steady.redis:Transport"}
    for pool in POOLS:
        assert run(pool, "memory://", "cache+memory://", worker_consumer=consumer) == consumer
        assert run(pool, url, url, worker_consumer=consumer, **transport) == consumer

    front = celery_steady.Celery(
        "app", broker="sqs://", backend="dynamodb://", set_as_current=False
    )
    defaults.for_worker(front, None)
    front.connection_for_write()

    after = look()
    for name in sorted(before.keys() | after.keys()):
        owner, attribute = name.rsplit(":", 1)
        is_new = owner not in OWNERS  # a module that was imported only now, or its class
        if before.get(name) != after.get(name) and not (is_new or {name, attribute} & OWN):
            print(name)


if __name__ == "__main__":
    main(*sys.argv[1:])
