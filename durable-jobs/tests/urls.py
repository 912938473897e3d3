from django.contrib import admin
from django.http import HttpResponse
from django.urls import include, path
from rest_framework.routers import DefaultRouter

from durable_jobs.api.views import BatchViewSet, JobViewSet
from durable_jobs.contrib.prometheus import Metrics

router = DefaultRouter(use_regex_path=False)
router.include_format_suffixes = False
router.register("jobs", JobViewSet)
router.register("batches", BatchViewSet)

urlpatterns = [
    path("", lambda request: HttpResponse(), name="index"),
    path("admin/", admin.site.urls),
    path("api/", include(router.urls)),
    path("metrics", Metrics.as_view()),
]
