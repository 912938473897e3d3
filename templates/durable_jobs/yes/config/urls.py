{% from "chosen.jinja" import has_example, has_flower with context %}
from django.conf import settings
from django.contrib import admin
from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import LoginView, LogoutView
from django.http import HttpResponse
from django.urls import include, path, reverse_lazy
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView
from durable_jobs.contrib.prometheus import Metrics
from durable_jobs.views import JobsPage
{% if has_example %}
from rest_framework.routers import SimpleRouter

from orders.views import ImportViewSet, NewsletterViewSet, OrderViewSet

router = SimpleRouter(use_regex_path=False)
router.register("orders", OrderViewSet, basename="order")
router.register("imports", ImportViewSet, basename="import")
router.register("newsletters", NewsletterViewSet, basename="newsletter")
{% endif %}

title = settings.SPECTACULAR_SETTINGS["TITLE"]
admin.site.site_header = admin.site.site_title = title
page = {  # the context of pages that extend durable_jobs/base.html
    "site_header": title,
    "site_title": title,
    "logout_url": reverse_lazy("logout"),
    "links": {"API docs": reverse_lazy("schema-ui")},  # in the top bar, for everybody
    "staff_links": {"Admin": reverse_lazy("admin:index")},
    # Buttons on the jobs page: the label, and the URL of a view that answers 202 with a job.
    "buttons": {{ '{"Write a report": reverse_lazy("order-report")}' if has_example else "{}" }},
}
{% if has_flower %}
if settings.FLOWER_URL:
    page["staff_links"]["Flower"] = settings.FLOWER_URL
{% endif %}
api_docs = SpectacularSwaggerSplitView.as_view()
login_page = {**page, "title": "Log in"}
log_in = LoginView.as_view(
    template_name="admin/login.html", extra_context=login_page, redirect_authenticated_user=True
)
jobs_page = JobsPage.as_view(extra_context=page)


urlpatterns = [
    path("", jobs_page, name="index"),
    path("jobs/<uuid:pk>/", jobs_page),
    path("login/", log_in, name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("favicon.ico", lambda request: HttpResponse(status=204)),  # the admin names no icon
    path("admin/", admin.site.urls),
    path("api/", include("durable_jobs.urls")),
{% if has_example %}
    path("api/", include(router.urls)),
{% endif %}
    path("api/schema/", SpectacularAPIView.as_view(), name="schema"),
    path("api/docs/", login_required(api_docs), name="schema-ui"),
    path("metrics", Metrics.as_view()),
]
