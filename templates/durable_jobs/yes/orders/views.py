from django.http import FileResponse
from drf_spectacular.utils import extend_schema
from durable_jobs.api.serializers import JobSerializer
from durable_jobs.api.views import EnqueueMixin, accepted
from rest_framework import permissions, viewsets
from rest_framework.decorators import action
from rest_framework.parsers import MultiPartParser

from . import tasks
from .models import Import, Newsletter, Order
from .serializers import ImportSerializer, NewsletterSerializer, OrderSerializer


class ModelPermissions(permissions.DjangoModelPermissions):
    """Require the same permissions as the admin. Reading requires the view permission."""

    perms_map = permissions.DjangoModelPermissions.perms_map | {
        "GET": ["%(app_label)s.view_%(model_name)s"]
    }


class OrderViewSet(EnqueueMixin, viewsets.ReadOnlyModelViewSet):
    """The caller's own orders. A job confirms each new one by email."""

    queryset = Order.objects.order_by("-created_at")
    serializer_class = OrderSerializer

    def get_queryset(self):
        return super().get_queryset().filter(owner=self.request.user)

    def perform_create(self, serializer):
        # EnqueueMixin has begun a transaction and chosen job_id, so the order can be stored before its job.
        order = serializer.save(owner=self.request.user, job_id=self.job_id)
        self.enqueue(tasks.send_confirmation.s(order.pk))

    @extend_schema(request=None, responses={202: JobSerializer})
    @action(detail=False, methods=["post"])
    def report(self, request):
        """Write a report of the caller's own orders. The job's result contains it."""
        job = tasks.write_report.using(owner=request.user).enqueue(request.user.pk)
        return accepted(request, job)


class ImportViewSet(EnqueueMixin, viewsets.ReadOnlyModelViewSet):
    """The caller's own files of orders. A job imports each new file."""

    queryset = Import.objects.order_by("-pk")
    serializer_class = ImportSerializer
    parser_classes = [MultiPartParser]

    def get_queryset(self):
        return super().get_queryset().filter(owner=self.request.user)

    def perform_create(self, serializer):
        upload = serializer.save(owner=self.request.user, job_id=self.job_id)
        label = f"Import {self.request.FILES['file'].name}"
        self.enqueue(tasks.import_orders.using(label=label).s(upload.pk))

    @extend_schema(responses={(200, "application/octet-stream"): bytes})
    @action(detail=True)
    def file(self, request, pk):
        """Download the caller's file, as an attachment: a page in it can't run scripts here."""
        return FileResponse(self.get_object().file.open(), as_attachment=True)


class NewsletterViewSet(EnqueueMixin, viewsets.ReadOnlyModelViewSet):
    """For staff who have permission. One POST enqueues a job that emails thousands of recipients."""

    queryset = Newsletter.objects.order_by("-pk")
    serializer_class = NewsletterSerializer
    permission_classes = [permissions.IsAdminUser, ModelPermissions]

    def perform_create(self, serializer):
        newsletter = serializer.save(job_id=self.job_id)
        self.enqueue(tasks.send_newsletter.s(newsletter.pk))
