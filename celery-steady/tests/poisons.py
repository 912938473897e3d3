"""Tasks that harm their worker. A table in test_poisons.py says what becomes of each."""

import asyncio
import ctypes
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import billiard.pool
from celery import exceptions

MEGABYTE = 1_000_000


class Panic(BaseException):
    """As code in Rust raises it."""


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one, two, lambda: None)


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


class NeedsMore(Exception):
    """Can't be made again from its arguments."""

    def __init__(self, one, *, two):
        super().__init__(one)


class UnprintableDict(dict):
    def __repr__(self):
        raise ValueError("no text")


def raises(error):
    def run():
        raise error

    return run


def kills(number):
    return lambda: os.kill(os.getpid(), number)


def c_code(seconds):
    """Sleep in C, without the interpreter's lock or with it."""
    ctypes.PyDLL(None).usleep(int(seconds * MEGABYTE))


def in_thread(function):
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def forever():
    while True:
        time.sleep(1)


def leave(function, **options):
    threading.Thread(target=function, **options).start()


def deep():
    value = []
    for _ in range(100_000):
        value = [value]
    return value


def cyclic():
    value = []
    value.append(value)
    return value


def cause_itself():
    error, other = ValueError("one"), ValueError("two")
    error.__cause__, other.__cause__ = other, error
    raise error


def recurse():
    return recurse()


def segfault():
    ctypes.string_at(0)


def close_all_descriptors():
    os.closerange(3, 1000)


def close_standard_streams():
    os.closerange(0, 3)


def close_python_streams():
    sys.stdout.close()
    sys.stderr.close()


def ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def alarm():
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    time.sleep(1)


def own_session():
    os.setsid()


def fork_returns():
    """Both processes come back from the task function."""
    os.fork()


def fork_raises():
    if not os.fork():
        raise ValueError("in the copy")


def fork_exits():
    if not os.fork():
        sys.exit()


def fork_exits_at_once():
    if pid := os.fork():
        os.waitpid(pid, 0)
    else:
        os._exit(0)


def fork_waits():
    """The copy comes back long after the task has ended."""
    if not os.fork():
        time.sleep(2)


def fork_dies():
    """The copy comes back when its parent has died."""
    parent = os.getpid()
    if os.fork():
        os._exit(1)
    while os.getppid() == parent:
        time.sleep(0.01)


def fork_stays():
    """As a daemon does, with all descriptors of the worker."""
    if not os.fork():
        os.setsid()
        time.sleep(30)
        os._exit(0)


def big_error():
    raise ValueError("x" * 5 * MEGABYTE)


def big_error_dies():
    """The process ends while it is sending its error."""
    parent = os.getppid()
    os.kill(parent, signal.SIGSTOP)  # which reads nothing until this process is sending

    def die():
        time.sleep(1)
        os.kill(parent, signal.SIGCONT)
        os._exit(1)

    leave(die)
    raise ValueError("\0\0\0\1" * MEGABYTE)


def big_error_hangs():
    """The process stops while it is sending its error. It is killed, but the rest never arrives."""
    leave(lambda: (time.sleep(0.02), os.kill(os.getpid(), signal.SIGSTOP)))
    raise ValueError("\0\0\0\1" * MEGABYTE)


def big_error_pauses():
    """The process stops while it is sending its error, until the test continues it."""
    parent = os.getppid()
    os.kill(parent, signal.SIGSTOP)  # which reads nothing until this process is sending

    def pause():
        waits_in = Path(f"/proc/self/task/{os.getpid()}/wchan")
        while "pipe_write" not in waits_in.read_text():
            time.sleep(0.01)
        os.kill(parent, signal.SIGCONT)
        os.kill(os.getpid(), signal.SIGSTOP)

    leave(pause)
    raise ValueError("\0\0\0\1" * MEGABYTE)


def own_process(context):
    def run():
        process = context.Process(target=os.getpid)
        process.start()
        process.join()

    return run


def own_command():
    subprocess.run(["true"], check=True)


def own_command_stays():
    subprocess.Popen(["sleep", "600"], close_fds=False)


def own_threads():
    with ThreadPoolExecutor(4) as executor:
        list(executor.map(time.sleep, [0.01] * 8))


def own_loop():
    asyncio.run(asyncio.sleep(0.01))


def own_loop_exits():
    async def run():
        sys.exit("from a coroutine")

    asyncio.run(run())


def swallow_limit():
    try:
        forever()
    except exceptions.SoftTimeLimitExceeded:
        forever()


def swallow_each_limit():
    while True:
        try:
            forever()
        except BaseException:  # noqa: S112
            continue


def return_at_limit():
    try:
        forever()
    except exceptions.SoftTimeLimitExceeded:
        return "in time"


def fail_at_limit():
    try:
        forever()
    finally:
        os.remove("a file that is gone")


def exit_at_limit():
    try:
        forever()
    finally:
        os._exit(1)


def garbage():
    """Write what is no message into the pipe to the worker's main process."""
    child = next(each for each in gc.get_objects() if isinstance(each, billiard.pool.Worker))
    os.write(child.outq._writer.fileno(), b"\0\0\0\1\0")


FUNCTIONS = {name: value for name, value in vars().items() if callable(value)} | {
    "system_exit": raises(SystemExit()),
    "system_exit_0": raises(SystemExit(0)),
    "system_exit_text": raises(SystemExit("text")),
    "keyboard_interrupt": raises(KeyboardInterrupt()),
    "generator_exit": raises(GeneratorExit()),
    "base_group": raises(BaseExceptionGroup("group", [Panic(), ValueError()])),
    "group": raises(ExceptionGroup("group", [ValueError()])),
    "panic": raises(Panic("at line 1")),
    "memory_error": raises(MemoryError()),
    "cancelled": raises(asyncio.CancelledError()),
    "stop_iteration": raises(StopIteration()),
    "worker_shutdown": raises(exceptions.WorkerShutdown(0)),
    "worker_terminate": raises(exceptions.WorkerTerminate(1)),
    "worker_lost": raises(exceptions.WorkerLostError()),
    "hard_limit": raises(exceptions.TimeLimitExceeded(1)),
    "soft_limit": raises(exceptions.SoftTimeLimitExceeded()),
    "connection_lost": raises(ConnectionResetError()),
    "unpicklable": lambda: raises(Unpicklable(1, 2))(),
    "unprintable": raises(Unprintable()),
    "needs_more": raises(NeedsMore(1, two=2)),
    "ignore": raises(exceptions.Ignore()),
    "exit_0": lambda: os._exit(0),
    "exit_1": lambda: os._exit(1),
    "exit_in_thread": lambda: in_thread(lambda: os._exit(3)),
    "abort": os.abort,
    "sigkill": kills(signal.SIGKILL),
    "sigterm": kills(signal.SIGTERM),
    "sigint": kills(signal.SIGINT),
    "sigbus": kills(signal.SIGBUS),
    "sigpipe": kills(signal.SIGPIPE),
    "sighup": kills(signal.SIGHUP),
    "sigusr1": kills(signal.SIGUSR1),
    "big_result": lambda: "x" * 5 * MEGABYTE,
    "deep_result": deep,
    "cyclic_result": cyclic,
    "object_result": object,
    "surrogate_result": lambda: "\ud800",
    "huge_number": lambda: 10**10_000,
    "unprintable_result": lambda: UnprintableDict(a=1),
    "generator_result": lambda: (n for n in range(3)),
    "short_c_code": lambda: c_code(0.2),
    "endless_c_code": lambda: c_code(600),
    "forever": forever,
    "thread_raises": lambda: in_thread(raises(ValueError())),
    "thread_stays": lambda: leave(forever),
    "daemon_thread_stays": lambda: leave(forever, daemon=True),
    "multiprocessing": own_process(multiprocessing),
    "billiard": own_process(billiard),
    "nothing": lambda: None,
    "garbage": garbage,
}
