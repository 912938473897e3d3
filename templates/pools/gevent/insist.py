def in_native_thread(function):
    """Take a worker's call off its greenlet, which would open a database connection for each job."""

    def call(*args, **kwargs):
        if not gevent.monkey.is_module_patched("socket"):  # no worker
            return function(*args, **kwargs)
        return gevent.get_hub().threadpool.apply(function, args, kwargs)

    return call


@in_native_thread
