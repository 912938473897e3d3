from django.conf import settings
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models


class Order(models.Model):
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
    product = models.CharField(max_length=100)
    quantity = models.PositiveIntegerField(
        default=1, validators=[MinValueValidator(1), MaxValueValidator(1000)]
    )
    created_at = models.DateTimeField(auto_now_add=True)
    confirmed_at = models.DateTimeField(null=True, editable=False)
    job = models.OneToOneField("durable_jobs.Job", models.SET_NULL, null=True, editable=False)

    def __str__(self):
        return f"{self.quantity} × {self.product}"


class Import(models.Model):
    """An uploaded CSV file of orders. Its first line names the columns product and quantity."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE)
    file = models.FileField(upload_to="imports/")
    job = models.OneToOneField("durable_jobs.Job", models.SET_NULL, null=True, editable=False)

    def __str__(self):
        return self.file.name


class Newsletter(models.Model):
    subject = models.CharField(max_length=200)
    body = models.TextField()
    job = models.OneToOneField("durable_jobs.Job", models.SET_NULL, null=True, editable=False)

    def __str__(self):
        return self.subject


class Recipient(models.Model):
    newsletter = models.ForeignKey(Newsletter, models.CASCADE, related_name="recipients")
    email = models.EmailField()
    sent_at = models.DateTimeField(null=True, editable=False)
    attempts = models.PositiveIntegerField(default=0, editable=False)

    def __str__(self):
        return self.email
