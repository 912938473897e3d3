"""The URLs of the API, in the namespace `durable_jobs`."""

from rest_framework.routers import SimpleRouter

from durable_jobs.api.views import BatchViewSet, JobViewSet

app_name = "durable_jobs"
router = SimpleRouter(use_regex_path=False)
router.register("jobs", JobViewSet, basename="job")
router.register("batches", BatchViewSet, basename="batch")
urlpatterns = router.urls
