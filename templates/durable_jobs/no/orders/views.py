{% from "chosen.jinja" import has_task_api with context %}
from django.db import transaction
from drf_spectacular.utils import extend_schema
from rest_framework import mixins, viewsets
from rest_framework.decorators import action
{% if has_task_api %}

from api.views import TaskSerializer, accepted
{% else %}
from rest_framework.response import Response
{% endif %}

from .models import Order
from .serializers import OrderSerializer
from .tasks import {{ "send_confirmation, write_report" if has_task_api else "email_report, send_confirmation" }}


class OrderViewSet(mixins.CreateModelMixin, viewsets.ReadOnlyModelViewSet):
    """The user's own orders. A task confirms each new one by email."""

    queryset = Order.objects.order_by("-created_at")
    serializer_class = OrderSerializer

    def get_queryset(self):
        return super().get_queryset().filter(owner=self.request.user)

    def perform_create(self, serializer):
        order = serializer.save(owner=self.request.user)
        # Like send_confirmation.delay_on_commit(order.pk), but an unavailable broker is only
        # logged: the order is stored, and confirm_forgotten_orders() will send the task.
        transaction.on_commit(lambda: send_confirmation.delay(order.pk), robust=True)

{% if has_task_api %}
    @extend_schema(request=None, responses={202: TaskSerializer})
    @action(detail=False, methods=["post"])
    def report(self, request):
        """Write a report of the user's orders. `Location` is the URL of the task's status."""
        return accepted(request, write_report.delay(request.user.pk))
{% else %}
    @extend_schema(request=None, responses={202: None})
    @action(detail=False, methods=["post"])
    def report(self, request):
        """Email a report of the user's orders."""
        email_report.delay(request.user.pk)
        return Response(status=202)
{% endif %}
