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
    confirmed_at = models.DateTimeField(null=True, editable=False)  # null: still to be confirmed
    in_stock = models.BooleanField(null=True, editable=False)

    def __str__(self):
        return f"{self.quantity} × {self.product}"


class Newsletter(models.Model):
    subject = models.CharField(max_length=200)
    body = models.TextField()

    def __str__(self):
        return self.subject


class Recipient(models.Model):
    newsletter = models.ForeignKey(Newsletter, models.CASCADE, related_name="recipients")
    email = models.EmailField()
    # null: still to be sent. A refused address counts as sent.
    sent_at = models.DateTimeField(null=True, editable=False)
    attempts = models.PositiveIntegerField(default=0, editable=False)

    def __str__(self):
        return self.email
