"""Views that enqueue jobs for the tests of faults."""

from django.db import transaction
from rest_framework.decorators import api_view
from rest_framework.response import Response

from durable_jobs import batches
from durable_jobs.enqueue import enqueue as store
from durable_jobs.models import Batch, Job

from . import tasks
from .survey import MEMBERS, numbers_of


@api_view(["POST"])
def enqueue(request):
    """Enqueue a job, once for each key."""
    task, key = getattr(tasks, request.data["task"]), request.data.get("key")
    with transaction.atomic():
        job = Job.objects.filter(idempotency_key=key).exclude(idempotency_key=None).first()
        if not job:
            args, owner = request.data["args"], request.user
            job = store(task, args, owner=owner, idempotency_key=key)
    return Response({"id": job.pk}, status=202)


@api_view(["POST"])
def work(request):
    """Store a job with next jobs, or a batch, once for each key."""
    key, number = request.data["key"], request.data["number"]
    numbers = numbers_of(number)
    members, rest = numbers[:MEMBERS], numbers[MEMBERS:]
    callbacks = [tasks.write.si(n, 0.1) for n in rest]
    options = {"owner": request.user, "label": key}
    with transaction.atomic():
        if any(model.objects.filter(label=key).exists() for model in (Batch, Job)):
            pass
        elif number % 3 == 0:
            tasks.write.using(**options).enqueue(numbers[0], 0.1, numbers[1:])
        elif number % 3 == 1:
            calls = [tasks.write.s(members[0], 0.1, rest[1:])]
            calls += [tasks.write.s(each, 0.1) for each in members[1:]]
            batches.enqueue(calls, on_success=callbacks[0], **options)
        else:
            first, last = callbacks
            calls = [tasks.write.s(each, 0.1) for each in members]
            batches.enqueue(calls, on_success=first, on_finish=last, **options)
    return Response({"id": key}, status=202)
