"""What drf-spectacular cannot see in the views: headers, and answers other than an object."""

from drf_spectacular.utils import OpenApiParameter, OpenApiResponse
from rest_framework.settings import api_settings

# 1 to 255 printable ASCII characters. HTTP strips spaces at both ends.
KEY_SCHEMA = {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"}
DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}}
CONFLICT = OpenApiResponse(DETAIL, "The state does not allow it, for the reason that is given")
HEADER = OpenApiParameter.HEADER
LOCATION = OpenApiParameter("Location", str, HEADER, response=[202])


class EnqueueSchema(api_settings.DEFAULT_SCHEMA_CLASS):
    """Describes the POST of EnqueueMixin."""

    def get_override_parameters(self):
        return [OpenApiParameter("Idempotency-Key", KEY_SCHEMA, HEADER), LOCATION]

    def get_response_serializers(self):
        reused = OpenApiResponse(DETAIL, "The key was used for another request")
        return {202: super().get_response_serializers(), 422: reused}
