"""Starts any task of the trials as a view of the project would."""

from django.conf import settings
from drf_spectacular.utils import extend_schema
from rest_framework.decorators import api_view
from rest_framework.response import Response

from . import tasks


@extend_schema(exclude=True)
@api_view(["POST"])
def start(request):
    task, options = getattr(tasks, request.data["task"]), request.data.get("options", {})
    sent = task.apply_async(request.data["args"], **options)
    if not hasattr(settings, "CELERY_RESULT_BACKEND"):
        return Response({"id": sent.id}, 202)
    from api.views import accepted

    return accepted(request, sent)
