import hashlib
import json
import re
import uuid
from datetime import datetime
from typing import Any

from django.core.exceptions import SuspiciousFileOperation
from django.core.exceptions import ValidationError as DjangoValidationError
from django.db import IntegrityError, transaction
from django.db.models import Case, JSONField, Q, TextField, Value, When
from django.db.models.functions import Cast, Length, Now
from django.http import HttpRequest, QueryDict
from django.urls import reverse
from django.utils.functional import cached_property
from django_filters.rest_framework import DjangoFilterBackend
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework import viewsets
from rest_framework.decorators import action
from rest_framework.exceptions import APIException, NotFound, ParseError, ValidationError
from rest_framework.pagination import CursorPagination
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.settings import api_settings

from .models import Job
from .queryset import insert, new_fields
from .serializers import TOO_LONG, JobSerializer, has_job_perm

__all__ = ["EnqueueMixin", "JobViewSet", "accepted"]

# 1 to 255 printable ASCII characters. HTTP strips spaces at both ends.
KEY_SCHEMA = {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"}
# For the OpenAPI document
DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}}
HEADER = OpenApiParameter.HEADER
ACCEPTED_HEADERS = [
    OpenApiParameter(name, str, HEADER, response=[201, 202]) for name in ["Location", "Retry-After"]
]
ALREADY_ENDED = OpenApiResponse(DETAIL, "The job has already ended")
CANNOT_RUN_AGAIN = OpenApiResponse(
    DETAIL, "The job is active, or its task is gone or takes other arguments"
)


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
                raise ValidationError({name: ["Give it once, with a value."]})
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


def accepted(request: HttpRequest | Request, job: Job) -> Response:
    """Return a response 202 that shows the job, with its address in the header Location."""
    shown = JobSerializer(job, context={"request": request})
    return Response(shown.data, status=202, headers=headers_of(job.pk))


def headers_of(job_id):
    return {"Location": reverse("job-detail", args=[job_id]), "Retry-After": "1"}


def identify_upload(upload):
    """Return the name of an uploaded file, and a digest of its content."""
    identity = [upload.name, hashlib.file_digest(upload.file, "sha256").hexdigest()]
    upload.seek(0)
    return identity


class JobViewSet(viewsets.ReadOnlyModelViewSet):
    """The caller's own jobs. Staff also see jobs without an owner."""

    queryset = Job.objects.all()
    serializer_class = JobSerializer
    pagination_class = NewestFirst
    filter_backends = [StrictFilter]
    filterset_fields = ["state"]

    def get_queryset(self):
        """Return the jobs that this user may see, or may change with this action.

        Lists have the user's own jobs and, for staff, jobs without an owner. Staff with the permission
        view_job can also read a single job of another user. With delete_job they can cancel it or run it
        again.
        """
        user, jobs = self.request.user, super().get_queryset()
        if self.detail and has_job_perm(user, "view" if self.action == "retrieve" else "delete"):
            return jobs
        own = Q(owner=user)
        # To cancel a job without an owner, staff need delete_job, which returned above.
        if user.is_staff and self.action != "cancel":
            own |= Q(owner=None)
        if not self.detail:  # the jobs page polls the list, so leave out values that may be large
            long = When(length__gt=10_000, then=Value(TOO_LONG, JSONField()))
            short = Case(long, default="result")
            jobs = jobs.alias(length=Length(Cast("result", TextField()))).annotate(
                short_result=short
            )
            jobs = jobs.defer("args", "kwargs", "cursor", "result")
        return jobs.filter(own)

    @extend_schema(request=None, responses={200: JobSerializer, 409: ALREADY_ENDED})
    @action(detail=True, methods=["post"])
    def cancel(self, request, pk):
        """Cancel a job. A queued job never starts. A running job stops when it next reports."""
        job = self.get_object()
        if not job.cancel():
            raise Conflict("The job has already ended.")
        job.refresh_from_db()
        return Response(self.get_serializer(job).data)

    @extend_schema(
        request=None,
        parameters=ACCEPTED_HEADERS,
        responses={202: JobSerializer, 409: CANNOT_RUN_AGAIN},
    )
    @action(detail=True, methods=["post"])
    def run_again(self, request, pk):
        """Enqueue a copy of a job that has ended. Only for staff who may delete jobs."""
        if not has_job_perm(request.user, "delete"):
            self.permission_denied(request)
        try:
            job = self.get_object().run_again()
        except (TypeError, ValueError) as error:
            raise Conflict(f"The job cannot run again: {error}.") from error
        return accepted(request, job)


class EnqueueSchema(api_settings.DEFAULT_SCHEMA_CLASS):
    """Describes the POST of EnqueueMixin in the OpenAPI document."""

    def get_override_parameters(self):
        return [OpenApiParameter("Idempotency-Key", KEY_SCHEMA, HEADER), *ACCEPTED_HEADERS]

    def get_response_serializers(self):
        reused = OpenApiResponse(DETAIL, "The key was used for another request")
        return {202: super().get_response_serializers(), 422: reused}


class EnqueueMixin:
    """POST stores an object and enqueues its job in one transaction, then answers 202.

    The object has a field `job`. Your perform_create() must save the object with job_id=self.job_id, then
    call self.enqueue(). A second request with the same Idempotency-Key stores nothing, and is answered with
    the same object and job.
    """

    job_id: uuid.UUID

    def create(self, request, *args, **kwargs):
        serializer = self._find_stored()
        if serializer is None:
            serializer = self.get_serializer(data=request.data)
            serializer.is_valid(raise_exception=True)
            self.job_id = uuid.uuid4()
            try:
                with transaction.atomic():
                    self.perform_create(serializer)
            except SuspiciousFileOperation:  # for which Django answers with a page
                raise ParseError("The name of the file is invalid.") from None
            except IntegrityError:  # another request with the same key was faster
                serializer = self._find_stored()
                if serializer is None:
                    raise
        headers = headers_of(serializer.instance.job_id)
        return Response(serializer.data, status=202, headers=headers)

    create.kwargs = {"schema": EnqueueSchema}  # extend_schema() sets the same attribute

    def enqueue(
        self,
        task: Any,
        args: list | tuple = (),
        kwargs: dict | None = None,
        *,
        label: str = "",
        queue: str | None = None,
        countdown: float | None = None,
        eta: datetime | None = None,
    ) -> Job:
        """Enqueue the object's job for the user of this request. See Job.objects.enqueue().

        The owner and the idempotency_key are those of the request. There is no `unique`, because two
        objects could get the same job.
        """
        fields = new_fields(
            Now(), task, args, kwargs, self.request.user, label, queue, countdown, eta
        )
        if key := self._idempotency_key:
            fields |= {"idempotency_key": key, "fingerprint": self._fingerprint}
        return insert(Job.objects, {**fields, "pk": self.job_id})

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
        if found := self.get_queryset().filter(job=job).first():
            return self.get_serializer(found)
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
