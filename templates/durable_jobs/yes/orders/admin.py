from django.contrib import admin
from durable_jobs import batches
from durable_jobs.admin import announce
from durable_jobs.enqueue import enqueue_many

from . import tasks
from .models import Newsletter, Order


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):
    list_display = ["product", "quantity", "owner", "created_at", "confirmed_at"]
    actions = ["forecast_demand", "ask_supplier", "mail_sum"]

    @admin.action(description="Forecast demand for these products", permissions=["change"])
    def forecast_demand(self, request, queryset):
        products = queryset.order_by().values_list("product", flat=True).distinct()
        forecast = tasks.forecast_demand.using(owner=request.user)
        announce(request, enqueue_many([forecast.s(product) for product in products]))

    @admin.action(description="Ask the supplier about these products", permissions=["change"])
    def ask_supplier(self, request, queryset):
        products = list(queryset.order_by().values_list("product", flat=True).distinct())
        announce(request, [tasks.ask_supplier.using(owner=request.user).enqueue(products)])

    @admin.action(description="Email me what was ordered", permissions=["view"])
    def mail_sum(self, request, queryset):
        """A batch: many jobs, then one that emails the sum of their results. No request waits for it."""
        pks = list(queryset.values_list("pk", flat=True))
        batches.enqueue(
            [tasks.count_ordered.s(pks[at : at + 1000]) for at in range(0, len(pks), 1000)],
            owner=request.user,
            label="What was ordered",
            on_success=tasks.mail_sum.s(request.user.email),
        )
        self.message_user(request, f"The totals will be emailed to {request.user.email}.")


@admin.register(Newsletter)
class NewsletterAdmin(admin.ModelAdmin):
    list_display = ["subject", "job"]
    actions = ["send_preview"]

    @admin.action(description="Email me a preview", permissions=["change"])
    def send_preview(self, request, queryset):
        for newsletter in queryset:
            tasks.send_preview.delay_on_commit(newsletter.pk, request.user.email)
        self.message_user(request, f"The preview will be emailed to {request.user.email}.")
