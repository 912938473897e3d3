"""The jobs page."""

import uuid

import pytest

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize("url", ["/", f"/jobs/{uuid.UUID(int=1)}/"])
def test_the_jobs_page_needs_a_login_and_no_url_names_of_the_project(client, user, settings, url):
    settings.LOGIN_URL = "/accounts/login/"
    assert client.get(url)["Location"] == f"/accounts/login/?next={url}"
    client.force_login(user)
    page = client.get(url).content
    assert b'data-jobs-url="/api/jobs/"' in page
    assert b'data-login-url="/accounts/login/"' in page
