# Native ones, which a body that blocks all greenlets does not hold up.
start_new_thread = gevent.monkey.get_original("_thread", "start_new_thread")
lock = gevent.monkey.get_original("_thread", "allocate_lock")()
stop_at = float("inf")
