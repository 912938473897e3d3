from django.contrib.auth.models import AbstractUser


class User(AbstractUser):
    """Django's own, for you to add fields to: once there is data, no other can take its place."""
