"""The REST API."""

import hashlib
import json
import re
import uuid
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from django.core.exceptions import ValidationError as DjangoValidationError
from django.db import IntegrityError, transaction
from django.db.models import Case, JSONField, Q, TextField, Value, When
from django.db.models.functions import Cast, Length
from django.http import HttpRequest, QueryDict
from django.utils.functional import cached_property
from django_filters.rest_framework import DjangoFilterBackend, FilterSet, UUIDFilter
from rest_framework import viewsets
from rest_framework.decorators import action
from rest_framework.exceptions import APIException, NotFound, ValidationError
from rest_framework.pagination import CursorPagination
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.reverse import reverse

from durable_jobs import actions, batches
from durable_jobs.api.schema import KEY_SCHEMA, EnqueueSchema, describe
from durable_jobs.api.serializers import (
    BatchSerializer,
    JobSerializer,
    ListedBatchSerializer,
    ListedJobSerializer,
    has_job_perm,
    may_run_again,
)
from durable_jobs.enqueue import MEMBER_OPTIONS, JobSignature, check_call, insert, new_fields
from durable_jobs.models import Batch, Job

__all__ = ["BatchViewSet", "EnqueueMixin", "JobViewSet", "accepted"]

MAX_RUN_AGAIN = 1000  # jobs of a batch in a request: they take some seconds
TOO_LONG = "Too long for a list: see the job itself"


class Conflict(APIException):
    status_code = 409


class KeyReused(APIException):
    status_code = 422
    default_detail = "This Idempotency-Key was used for another request."


class StrictFilter(DjangoFilterBackend):
    """Answers 400 to a parameter that is empty or is given twice, because it is ambiguous."""

    def filter_queryset(self, request, queryset, view):
        for name, values in request.query_params.lists():
            if len(values) > 1 or not values[0]:
                raise ValidationError({name: ["Pass this parameter once, with a value."]})
        return super().filter_queryset(request, queryset, view)


class NewestFirst(CursorPagination):
    """Cursor pagination without a count: a page costs the same however many jobs there are."""

    ordering = ["-created_at", "id"]
    page_size = 20

    def paginate_queryset(self, *args, **kwargs):
        try:
            return super().paginate_queryset(*args, **kwargs)
        except DjangoValidationError:  # the cursor was decoded, but its position is not a date
            raise NotFound(self.invalid_cursor_message) from None


def accepted(request: HttpRequest | Request, job: Job | Batch) -> Response:
    """Return a response 202 that shows the job or batch, with its address in the header Location."""
    name, kind = ("batch", BatchSerializer) if isinstance(job, Batch) else ("job", JobSerializer)
    shown = kind(job, context={"request": request})
    return Response(shown.data, status=202, headers=headers_of(request, job.pk, name))


def headers_of(request, pk, name="job"):
    url = reverse(f"durable_jobs:{name}-detail", [pk], request=request)
    return {"Location": urlsplit(url).path, "Retry-After": "1"}


def identify_upload(upload):
    """Return the name of an uploaded file, and a digest of its content."""
    identity = [upload.name, hashlib.file_digest(upload.file, "sha256").hexdigest()]
    upload.seek(0)
    return identity


class RowViewSet(viewsets.ReadOnlyModelViewSet):
    """What jobs and batches have in common: the caller's own rows. Staff also see those without an owner."""

    permission_classes = [IsAuthenticated, *viewsets.ReadOnlyModelViewSet.permission_classes]
    pagination_class = NewestFirst
    filter_backends = [StrictFilter]
    filterset_fields = ["state"]

    def determine_version(self, request, *args, **kwargs):
        try:
            return super().determine_version(request, *args, **kwargs)
        except NotFound:  # NamespaceVersioning takes "durable_jobs" for a version
            scheme = self.versioning_class()
            return scheme.default_version, scheme

    def get_queryset(self):
        """Return the rows that this user may see, or may change with this action.

        Lists have the user's own rows and, for staff, rows without an owner. Staff with the permission
        view_job can also read a single row of another user. With delete_job they can cancel it or run it
        again.
        """
        user, rows = self.request.user, super().get_queryset()
        if self.detail and has_job_perm(user, "view" if self.action == "retrieve" else "delete"):
            return rows
        visible = Q(owner=user)
        # run_again() and run_failed_again() call may_run_again().
        if user.is_staff and self.action != "cancel":
            visible |= Q(owner=None)
        return rows.filter(visible)

    def get_serializer_class(self):
        return self.list_serializer_class if self.action == "list" else self.serializer_class


class JobFilter(FilterSet):
    batch = UUIDFilter("batch_id", label="The id of a batch: lists its jobs")

    class Meta:
        model = Job
        fields = ["state"]


class JobViewSet(RowViewSet):
    """The caller's own jobs. Staff also see jobs without an owner."""

    queryset = Job.objects.all()
    serializer_class, list_serializer_class = JobSerializer, ListedJobSerializer
    filterset_class = JobFilter

    def get_queryset(self):
        jobs = super().get_queryset()
        if self.detail:
            return jobs
        if "batch" not in self.request.query_params:
            jobs = jobs.filter(batch=None)
        # The jobs page polls the list, so leave out values that may be large.
        long = When(length__gt=10_000, then=Value(TOO_LONG, JSONField()))
        jobs = jobs.alias(length=Length(Cast("result", TextField())))
        jobs = jobs.annotate(short_result=Case(long, default="result"))
        return jobs.defer("args", "kwargs", "cursor", "steps", "result")

    @describe(200, JobSerializer)
    @action(detail=True, methods=["post"])
    def cancel(self, request, pk):
        """Cancel a job. A queued job never starts. A running job stops when it next reports."""
        job = self.get_object()
        if not actions.cancel(job):
            raise Conflict("The job has already ended.")
        job.refresh_from_db()
        return Response(self.get_serializer(job).data)

    @describe(202, JobSerializer)
    @action(detail=True, methods=["post"])
    def run_again(self, request, pk):
        """Queue a job again that failed or was cancelled, or enqueue a copy of one that succeeded.

        Staff who may delete jobs can do this. The owner can do it if the task of the job allows it, but not
        if the job succeeded.
        """
        job = self.get_object()
        if not may_run_again(request.user, job):
            self.permission_denied(request)
        try:
            again = actions.run_again(job)
        except (TypeError, ValueError) as error:
            raise Conflict(f"The job can't run again: {error}.") from error
        if again.owner_id != job.owner_id and not has_job_perm(request.user, "delete"):
            raise Conflict("A job of another owner with the same `unique` is active.")
        return accepted(request, again)


class BatchViewSet(RowViewSet):
    """The caller's own batches. Staff also see batches without an owner."""

    queryset = Batch.objects.defer("on_success", "on_finish")  # they may be large
    serializer_class, list_serializer_class = BatchSerializer, ListedBatchSerializer

    @describe(200, BatchSerializer)
    @action(detail=True, methods=["post"])
    def cancel(self, request, pk):
        """Cancel the jobs of a batch that are active. The batch ends."""
        batch = self.get_object()
        if batch.ended_at:
            raise Conflict("The batch has already ended.")
        batches.cancel(batch)
        return Response(self.get_serializer(batch).data)

    @describe(202, BatchSerializer)
    @action(detail=True, methods=["post"])
    def run_failed_again(self, request, pk):
        """Run the failed and cancelled jobs of a batch again, at most 1,000 in a request.

        Staff who may delete jobs can do this. The owner can do it if the tasks of all these jobs allow it.
        """
        batch = self.get_object()
        for task in batches.unsuccessful(batch).values_list("task", flat=True).distinct():
            if not may_run_again(request.user, Job(task=task, owner_id=batch.owner_id)):
                self.permission_denied(request)
        if not batches.run_failed_again(batch, most=MAX_RUN_AGAIN):
            raise Conflict("No failed or cancelled job of this batch can run again.")
        return accepted(request, batch)


class EnqueueMixin:
    """POST stores an object and enqueues its job in one transaction, then answers 202.

    The object has a field `job`. Your perform_create() must save the object with job_id=self.job_id, then
    call self.enqueue(). A second request with the same Idempotency-Key stores nothing, and is answered with
    the same object and job.
    """

    job_id: uuid.UUID

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        serializer = self._find_stored()
        if serializer is None:
            serializer = self.get_serializer(data=request.data)
            serializer.is_valid(raise_exception=True)
            self.job_id = uuid.uuid4()
            try:
                with transaction.atomic():
                    self.perform_create(serializer)
            except IntegrityError:  # another request with the same key was faster
                serializer = self._find_stored()
                if serializer is None:
                    raise
        headers = headers_of(request, serializer.instance.job_id)
        return Response(serializer.data, status=202, headers=headers)

    create.kwargs = {"schema": EnqueueSchema}  # drf-spectacular reads an action's own schema here

    def enqueue(self, call: JobSignature[[]], batch: Batch | None = None) -> Job:
        """Enqueue the object's job, such as task.s(pk), for the user of this request.

        The owner and the idempotency_key are those of the request. There is no `unique`, because two
        objects could get the same job. With `batch`, it is the first job of this batch: see open_batch().
        """
        check_call(call, MEMBER_OPTIONS)
        if batch:
            batches.keep_open(batch)
        owner = self.request.user
        fields = new_fields(call.task, call.args, call.kwargs, owner=owner, **call.options)
        if key := self._idempotency_key:
            fields["fingerprint"] = self._fingerprint
        job = insert({**fields, "pk": self.job_id, "batch": batch}, idempotency_key=key)
        # Results are sorted by created_at: without this, add() would use the transaction's time, which is earlier.
        if batch:
            batch._next_member_at = job.created_at + timedelta(microseconds=1)
        return job

    def _find_stored(self):
        """Return a serializer of the object that the first request with this key stored, or None.

        Raises KeyReused (422) if that was a different request.
        """
        if (key := self._idempotency_key) is None:
            return None
        fingerprint = self._fingerprint  # before a serializer or a storage reads the files
        job = Job.objects.filter(owner=self.request.user, idempotency_key=key).first()
        if job is None:
            return None
        if job.fingerprint != fingerprint:
            raise KeyReused
        if row := self.get_queryset().filter(job=job).first():
            return self.get_serializer(row)
        if Job.objects.filter(pk=job.pk).exists():
            raise NotFound  # the object was deleted
        return None  # the job was purged between the queries, so its key is free

    @property
    def _idempotency_key(self):
        key = self.request.headers.get("Idempotency-Key")
        if key is not None and not re.fullmatch(KEY_SCHEMA["pattern"], key):
            raise ValidationError({"Idempotency-Key": ["Use 1 to 255 printable ASCII characters."]})
        return key

    @cached_property
    def _fingerprint(self):
        """A digest of method, path, data and files. Requests with the same key must have the same one."""
        data = self.request.data
        if isinstance(data, QueryDict):  # json would see only the last value of each name
            data = dict(data.lists())
        body = json.dumps(data, sort_keys=True, default=identify_upload)
        request = f"{self.request.method} {self.request.get_full_path()} {body}"
        return hashlib.sha256(request.encode()).hexdigest()
