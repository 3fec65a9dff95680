"""A request that validates by its form, but cannot be done: a 422 that names the field."""

from __future__ import annotations


class FieldRefusedError(Exception):
    """The field at fault, and why."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message
