HEADER = {"schema": {"type": "string"}}
ERROR = {"description": "An error, and what to do", "content": {"application/json": {}}}


def document_common_answers(result, generator, request, public):
    """Add to the OpenAPI document how every view tells errors, and what EnqueueMixin answers.

    A postprocessing hook of drf-spectacular: returns the changed document.
    """
    for operations in result["paths"].values():
        for operation in operations.values():
            responses = operation["responses"]
            responses["429"] = ERROR | {"headers": {"Retry-After": HEADER}}
            responses["default"] = ERROR
            parameters = [parameter["name"] for parameter in operation.get("parameters", [])]
            if "Idempotency-Key" in parameters:
                responses["202"] = responses.pop("201", responses.get("202"))
                responses["422"] = ERROR | {"description": "The key was used for another request"}
                responses["202"]["headers"] = {"Location": HEADER, "Retry-After": HEADER}
    return result
