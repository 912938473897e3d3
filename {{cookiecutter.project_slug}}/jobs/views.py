import hashlib
import json
import re
import uuid
from traceback import walk_tb

from django.core import exceptions
from django.db import IntegrityError, transaction
from django.db.models import Q
from django.shortcuts import get_object_or_404
from django.urls import reverse
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import viewsets
from rest_framework.decorators import action
from rest_framework.exceptions import APIException, NotFound, ParseError, ValidationError
from rest_framework.pagination import CursorPagination
from rest_framework.response import Response
from rest_framework.views import exception_handler

from .models import Job
from .serializers import JobSerializer, may

# 1 to 255 printable ASCII characters; HTTP takes away spaces at the ends.
KEY = {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"}


class Conflict(APIException):
    status_code = 409


class KeyReused(APIException):
    status_code = 422
    default_detail = "This Idempotency-Key was used for another request."


def handle_exception(error, context):
    """What Django REST framework does, and 400 for JSON that is too big or too deep to be read."""
    if isinstance(error, exceptions.RequestDataTooBig):
        error = ParseError("The body is too big.")
    if isinstance(error, RecursionError):
        *_, (frame, _) = walk_tb(error.__traceback__)
        if frame.f_globals["__name__"].startswith("json."):  # anything else is a bug: 500
            error = ParseError("Nested too deeply.")
    return exception_handler(error, context)


class NewestFirst(CursorPagination):
    """Pages that cost the same however many jobs there are: no count, and no walk to page 1,000."""

    ordering = ["-created_at", "id"]

    def paginate_queryset(self, *args, **kwargs):
        try:
            return super().paginate_queryset(*args, **kwargs)
        except exceptions.ValidationError:  # well formed, but no time in it
            raise NotFound(self.invalid_cursor_message) from None


def accepted(job_id, data):
    """Return the answer that a job was enqueued."""
    headers = {"Location": reverse("job-detail", args=[job_id]), "Retry-After": "1"}
    return Response(data, status=202, headers=headers)


class JobViewSet(viewsets.ReadOnlyModelViewSet):
    """The caller's own jobs."""

    queryset = Job.objects.all()
    serializer_class = JobSerializer
    pagination_class = NewestFirst
    filterset_fields = ["state"]

    def get_queryset(self):
        """The user's own jobs; for staff also those that nobody owns, by id any that it may see."""
        user, jobs = self.request.user, super().get_queryset()
        if self.detail and may(user, "view" if self.action == "retrieve" else "delete"):
            return jobs
        own = Q(owner=user)
        if user.is_staff and self.action != "cancel":
            own |= Q(owner=None)
        return jobs.filter(own).defer("attempts")

    @extend_schema(request=None)
    @action(detail=True, methods=["post"])
    def cancel(self, request, pk):
        """Cancel: a queued job never starts, a running one stops when it next reports."""
        job = self.get_object()
        if not Job.objects.filter(pk=job.pk).cancel():
            raise Conflict("The job has ended already.")
        job.refresh_from_db()
        return Response(self.get_serializer(job).data)

    @extend_schema(request=None, responses={202: JobSerializer})
    @action(detail=True, methods=["post"])
    def run_again(self, request, pk):
        """Enqueue a job that does the same as one that has ended: for staff that may delete jobs."""
        if not may(request.user, "delete"):
            self.permission_denied(request)
        try:
            job = self.get_object().run_again()
        except (TypeError, ValueError) as error:
            raise Conflict(f"It cannot run again: {error}.") from error
        return accepted(job.pk, self.get_serializer(job).data)


class EnqueueMixin:
    """POST stores an object and enqueues its job in one transaction, then answers 202.

    The object has a field `job`: perform_create() saves it with job_id=self.job_id, and then calls
    self.enqueue(). Sent again with the same Idempotency-Key, a request does nothing and gets the
    same object and job.
    """

    @extend_schema(parameters=[OpenApiParameter("Idempotency-Key", KEY, OpenApiParameter.HEADER)])
    def create(self, request, *args, **kwargs):
        serializer = self.earlier()
        if serializer is None:
            serializer = self.get_serializer(data=request.data)
            serializer.is_valid(raise_exception=True)
            self.job_id = uuid.uuid4()
            try:
                with transaction.atomic():
                    self.perform_create(serializer)
            except IntegrityError:  # the same key at the same time: the other request has won
                serializer = self.earlier()
                if serializer is None:
                    raise
        return accepted(serializer.instance.job_id, serializer.data)

    def enqueue(self, task, *args, **kwargs):
        """Job.objects.enqueue() for the user and the Idempotency-Key of this request."""
        fields = {"pk": self.job_id, "owner": self.request.user, "fingerprint": self.fingerprint}
        key = self.idempotency_key
        return Job.objects.enqueue(task, args, kwargs, idempotency_key=key, **fields)

    def earlier(self):
        """Return a serializer of what the first request with this key stored, or None.

        Raises KeyReused (422) if that was another request.
        """
        if (key := self.idempotency_key) is None:
            return None
        job = Job.objects.filter(owner=self.request.user, idempotency_key=key).first()
        if job and job.fingerprint != self.fingerprint:
            raise KeyReused
        if job is None:
            return None
        return self.get_serializer(get_object_or_404(self.get_queryset(), job=job))

    @property
    def idempotency_key(self):
        key = self.request.headers.get("Idempotency-Key")
        if key is not None and not re.fullmatch(KEY["pattern"], key):
            raise ValidationError({"Idempotency-Key": ["1 to 255 printable ASCII characters."]})
        return key

    @property
    def fingerprint(self):
        """A digest of method, path and body: what makes a request the same request."""
        body = json.dumps(self.request.data, sort_keys=True)
        request = f"{self.request.method} {self.request.get_full_path()} {body}"
        return hashlib.sha256(request.encode()).hexdigest()
