from rest_framework import authentication
from structlog.contextvars import bind_contextvars


class TokenAuthentication(authentication.TokenAuthentication):
    """Names the user in log lines. django-structlog looks for one before DRF reads the token."""

    def authenticate_credentials(self, key):
        user, token = super().authenticate_credentials(key)
        bind_contextvars(user_id=user.pk)
        return user, token
