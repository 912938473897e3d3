"""A view without jobs: it stores the order and sends a plain task."""

from django.urls import path
from orders.serializers import OrderSerializer
from rest_framework.generics import CreateAPIView
from work_tasks import plain


class PlainOrders(CreateAPIView):
    serializer_class = OrderSerializer

    def perform_create(self, serializer):
        order = serializer.save(owner=self.request.user)
        plain.delay(order.pk)


urlpatterns = [path("plain/orders/", PlainOrders.as_view())]
