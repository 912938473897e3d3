"""Errors that views have in common, in the OpenAPI document: see SPECTACULAR_SETTINGS."""

ERRORS = {
    401: "Not authenticated",
    403: "Not permitted",
    406: "Not acceptable",
    429: "Too many requests",
}
DETAIL = {"type": "object", "properties": {"detail": {"type": "string"}}}


def add_errors(result, **kwargs):
    """Add the errors that views have in common to the OpenAPI document (`result`)."""
    for path, operations in result["paths"].items():
        for operation in operations.values():
            responses = operation["responses"]
            for status, description in errors_of(path, operation).items():
                content = {"application/json": {"schema": {} if status == 400 else DETAIL}}
                responses.setdefault(str(status), {"description": description, "content": content})
            responses["429"]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
            responses["414"] = {"description": "URI too long"}  # gunicorn answers this
    return result


def errors_of(path, operation):
    """Return the errors of this operation, {status: description}."""
    errors = dict(ERRORS)
    parameters = {parameter["name"] for parameter in operation.get("parameters", [])}
    if "requestBody" in operation:
        errors |= {400: "Invalid request", 415: "Unsupported media type"}
    if {"page", "cursor"} & parameters:
        errors |= {400: "Invalid request", 404: "Not found"}
    if "{" in path:
        errors[404] = "Not found"
    return errors
