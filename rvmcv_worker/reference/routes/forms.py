"""What the OpenAPI document says of bodies that the framework does not read itself."""

from __future__ import annotations

from typing import Any


def form_body(schema: dict[str, Any], file: str, json_schema: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what the OpenAPI document says of a form with these fields and one file."""
    fields = {**schema, "properties": {**schema["properties"], file: {"type": "string", "format": "binary"}}}
    fields["required"] = [*schema.get("required", []), file]
    content = {"multipart/form-data": {"schema": fields}}
    if json_schema is not None:
        content["application/json"] = {"schema": _inlined(json_schema, json_schema.get("$defs", {}))}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a schema that refers to nothing outside of itself."""
    if isinstance(schema, list):
        return [_inlined(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    return {key: _inlined(value, definitions) for key, value in schema.items() if key != "$defs"}
