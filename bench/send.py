"""send.py bare|plain|job all|each COUNT PATH [ARGUMENTS]: send tasks, print how long it took.

`all` prints how many a second were sent; `each` waits until one is done before it sends the next,
and prints the seconds of each.
"""

import json
import os
import sys
import time

kind, mode, count, path = sys.argv[1:5]
arguments = json.loads("".join(sys.argv[5:]) or "{}")

if kind == "bare":
    import bare  # noqa: F401
else:
    import django

    os.environ["DJANGO_SETTINGS_MODULE"] = "config.settings"
    django.setup()
    from jobs.models import Job

import work  # noqa: E402


def send():
    if kind == "job":
        return Job.objects.enqueue(work.job, [path], arguments)
    return work.plain.delay(path, **arguments)


def done(job, size):
    if kind == "job":
        return Job.objects.filter(pk=job.pk, state="succeeded").exists()
    return os.path.getsize(path) > size


def send_all():
    send()  # connects
    began = time.perf_counter()
    for _ in range(int(count) - 1):
        send()
    return (int(count) - 1) / (time.perf_counter() - began)


def send_each():
    for _ in range(int(count)):
        size = os.path.getsize(path)
        began = time.perf_counter()
        sent = send()
        while not done(sent, size):
            time.sleep(0.001)
        yield time.perf_counter() - began


print(json.dumps(send_all() if mode == "all" else list(send_each())))
