from django.contrib import admin
from django.urls import include, path

from durable_jobs.contrib.prometheus import Metrics
from durable_jobs.views import JobsPage

page = JobsPage.as_view()
urlpatterns = [
    path("", page),
    path("jobs/<uuid:pk>/", page),
    path("admin/", admin.site.urls),
    path("api/", include("durable_jobs.urls")),
    path("metrics", Metrics.as_view()),
]
