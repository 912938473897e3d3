"""Task functions that are coroutine functions."""

import asyncio
from contextlib import suppress

from durable_jobs.pools import pool


def run_coroutine(task, coroutine):
    """Run the coroutine of a task function in an event loop, which has a thread of its own.

    A function that the coroutine passes to sync_to_async() runs in the thread of this call, on its
    database connection. An exception that ends this call, such as that of a time limit, cancels the
    coroutine.
    """
    request, loop, current = task.request, None, None
    if run := task._run_in_this_thread():
        # Now, because a coroutine cannot query the database.
        run.read_cursor()
        run.read_batch()

    async def with_request():
        nonlocal loop, current
        loop, current = asyncio.get_running_loop(), asyncio.current_task()
        task.request_stack.push(request)  # each thread has its own stack
        try:
            return await coroutine
        finally:
            task.request_stack.pop()

    try:
        return pool.run_coroutine(with_request)
    except BaseException:
        with suppress(RuntimeError):  # the loop has ended
            if loop:
                loop.call_soon_threadsafe(current.cancel)
        raise
