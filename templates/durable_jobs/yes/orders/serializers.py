from rest_framework import serializers

from .models import Import, Newsletter, Order, Recipient

MAX_UPLOAD_BYTES = 10_000_000


class OrderSerializer(serializers.ModelSerializer):
    class Meta:
        model = Order
        fields = ["id", "product", "quantity", "created_at", "confirmed_at", "job"]
        read_only_fields = ["created_at", "confirmed_at", "job"]


class Addresses(serializers.ListField):
    """Checks its length before its items: a million items would block a web process."""

    child = serializers.EmailField(max_length=254)

    def run_child_validation(self, data):
        if len(data) > self.max_length:
            self.fail("max_length", max_length=self.max_length)
        return super().run_child_validation(data)


class NewsletterSerializer(serializers.ModelSerializer):
    recipients = Addresses(max_length=10_000, write_only=True)

    class Meta:
        model = Newsletter
        fields = ["id", "subject", "body", "recipients", "job"]
        read_only_fields = ["job"]
        extra_kwargs = {"body": {"max_length": 100_000}}

    def create(self, validated_data):
        emails = set(validated_data.pop("recipients"))
        newsletter = super().create(validated_data)
        Recipient.objects.bulk_create(Recipient(newsletter=newsletter, email=e) for e in emails)
        return newsletter


class ImportSerializer(serializers.ModelSerializer):
    class Meta:
        model = Import
        fields = ["id", "file", "job"]
        read_only_fields = ["job"]
        extra_kwargs = {"file": {"write_only": True}}

    def validate_file(self, file):
        if file.size > MAX_UPLOAD_BYTES:
            raise serializers.ValidationError(f"The file has more than {MAX_UPLOAD_BYTES:,} bytes.")
        return file
