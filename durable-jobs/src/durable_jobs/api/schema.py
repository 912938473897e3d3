"""What drf-spectacular cannot see in the views: headers, and answers other than an object."""

from drf_spectacular.extensions import OpenApiSerializerFieldExtension
from drf_spectacular.plumbing import ResolvedComponent
from drf_spectacular.utils import OpenApiParameter, OpenApiResponse, extend_schema
from rest_framework.settings import api_settings

# 1 to 255 printable ASCII characters. HTTP strips spaces at both ends.
KEY_SCHEMA = {"type": "string", "pattern": "^[!-~]([ -~]{0,253}[!-~])?$"}
DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}}
CONFLICT = OpenApiResponse(DETAIL, "Not possible in this state; `detail` says why")
REUSED = OpenApiResponse(DETAIL, "The key was used for another request")
HEADER = OpenApiParameter.HEADER
NAMES = ["Location", "Retry-After"]  # of a response 202
HEADERS = [OpenApiParameter(name, str, HEADER, response=[202]) for name in NAMES]


def describe(status, serializer):
    """Describe an action that takes no data and answers with this status."""
    answers = {status: serializer, 409: CONFLICT}
    return extend_schema(request=None, responses=answers, parameters=HEADERS)


class StateExtension(OpenApiSerializerFieldExtension):
    """Names the enum. Otherwise, it would clash with that of any other field `state` of the project."""

    target_class = "durable_jobs.api.serializers.StateField"

    def map_serializer_field(self, auto_schema, direction):
        schema = {"type": "string", "enum": [*self.target.choices]}
        component = ResolvedComponent("JobState", ResolvedComponent.SCHEMA, schema, "JobState")
        auto_schema.registry.register_on_missing(component)
        return component.ref


class EnqueueSchema(api_settings.DEFAULT_SCHEMA_CLASS):
    """Describes the POST of EnqueueMixin."""

    def get_override_parameters(self):
        return [OpenApiParameter("Idempotency-Key", KEY_SCHEMA, HEADER), *HEADERS]

    def get_response_serializers(self):
        return {202: super().get_response_serializers(), 422: REUSED}
