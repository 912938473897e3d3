"""The OpenAPI schema class of all views, which the setting REST_FRAMEWORK names."""

from drf_spectacular.openapi import AutoSchema

DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}}
COMMON = {
    401: "Not authenticated",
    403: "Not permitted",
    406: "No such representation",
    429: "Too many requests",
}
WITH_BODY = {400: "Not valid", 415: "Not JSON"}
WITH_PAGES = {400: "Not valid", 404: "Not found"}
RETRY_AFTER = {"Retry-After": {"schema": {"type": "string"}}}


class Schema(AutoSchema):
    """Adds the error responses that views have in common, so that no view needs to declare them."""

    def get_operation(self, path, *args, **kwargs):
        operation = super().get_operation(path, *args, **kwargs)
        if operation is None:  # the view is not in the document
            return None
        responses, more = operation["responses"], dict(COMMON)
        parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
        if "requestBody" in operation:
            more |= WITH_BODY
        if {"page", "cursor"} & parameters:
            more |= WITH_PAGES
        if "{" in path:
            more[404] = "Not found"
        if "Idempotency-Key" in parameters:  # the view has EnqueueMixin
            responses["202"] = responses.pop("201")
            more[422] = "The key was used for another request"
        for status, description in more.items():
            content = {"application/json": {"schema": DETAIL if status != 400 else {}}}
            responses.setdefault(str(status), {"description": description, "content": content})
        responses["429"].setdefault("headers", RETRY_AFTER)
        responses["414"] = {"description": "The address is too long"}  # gunicorn answers this
        return operation
