"""The page of a user's jobs, on top of the API."""

from django.contrib.auth.mixins import LoginRequiredMixin
from django.shortcuts import resolve_url
from django.views.generic import TemplateView

__all__ = ["JobsPage"]


class JobsPage(LoginRequiredMixin, TemplateView):
    """Shows the user's jobs or, with a `pk` in its URL, one job."""

    template_name = "durable_jobs/index.html"

    def get_context_data(self, **context):
        return super().get_context_data(login_url=resolve_url(self.get_login_url()), **context)
