{% from "chosen.jinja" import has_example, has_flower, has_task_api with context %}
from django.conf import settings
from django.contrib import admin
from django.contrib.auth.decorators import login_required
from django.contrib.auth.views import LoginView, LogoutView
from django.http import HttpResponse
from django.urls import include, path
from django.views.generic import TemplateView
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView
from rest_framework.routers import DefaultRouter
{% if has_example or has_task_api %}

{% endif %}
{% if has_task_api %}
from api.views import TaskView
{% endif %}
{% if has_example %}
from orders.views import OrderViewSet
{% endif %}

router = DefaultRouter()
router.include_format_suffixes = False  # "report.json" would pass the view an argument "format"
{% if has_example %}
router.register("orders", OrderViewSet, basename="order")
{% endif %}

TITLE = settings.SPECTACULAR_SETTINGS["TITLE"]
admin.site.site_header = admin.site.site_title = TITLE
index = TemplateView.as_view(
    template_name="index.html",
    extra_context={"site_title": TITLE{{ ', "flower_url": settings.FLOWER_URL' if has_flower }}},
)
log_in = LoginView.as_view(
    template_name="admin/login.html",
    extra_context={"site_header": TITLE, "site_title": TITLE, "title": "Log in"},
    redirect_authenticated_user=True,
)

urlpatterns = [
    path("", login_required(index), name="index"),
    path("login/", log_in, name="login"),
    path("logout/", LogoutView.as_view(), name="logout"),
    path("favicon.ico", lambda request: HttpResponse(status=204)),  # the admin names no icon
    path("admin/", admin.site.urls),
    path("api/", include(router.urls)),
{% if has_task_api %}
    path("api/tasks/<str:key>/", TaskView.as_view(), name="task"),
{% endif %}
    path("api/schema/", SpectacularAPIView.as_view(), name="schema"),
    path("api/docs/", login_required(SpectacularSwaggerSplitView.as_view()), name="schema-ui"),
]
