{% from "chosen.jinja" import has_results with context %}
from celery import {{ "chord" if has_results else "group" }}
from django.contrib import admin

from .models import Newsletter, Order, Recipient
from .tasks import check_stock, {{ "email_forecasts, " if has_results }}forecast_demand, send_newsletter


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):
    list_display = ["product", "quantity", "owner", "created_at", "confirmed_at", "in_stock"]
    actions = ["forecast_demand", "check_stock"]

    @admin.action(description="Email me a forecast for these products", permissions=["change"])
    def forecast_demand(self, request, queryset):
        products = queryset.order_by().values_list("product", flat=True).distinct()
{% if has_results %}
        callback = email_forecasts.s(request.user.email)
        chord(forecast_demand.s(product) for product in products)(callback)
{% else %}
        group(forecast_demand.s(product, request.user.email) for product in products).delay()
{% endif %}
        self.message_user(request, f"The forecast will be sent to {request.user.email}.")

    @admin.action(description="Check stock", permissions=["change"])
    def check_stock(self, request, queryset):
        for order in queryset:
            check_stock.delay_on_commit(order.pk)
        self.message_user(request, "Checking the stock.")


class RecipientInline(admin.TabularInline):
    model = Recipient
    readonly_fields = ["sent_at"]


@admin.register(Newsletter)
class NewsletterAdmin(admin.ModelAdmin):
    inlines = [RecipientInline]
    actions = ["send"]

    @admin.action(description="Send to everyone who hasn't received it", permissions=["change"])
    def send(self, request, queryset):
        for newsletter in queryset:
            send_newsletter.delay_on_commit(newsletter.pk)
        self.message_user(request, "The newsletter is being sent.")
