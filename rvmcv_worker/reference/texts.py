"""Texts that came from elsewhere, made such that every database and every answer can hold them."""

from __future__ import annotations


def storable(text: str) -> str:
    """Return the text without what is no character: halves of surrogate pairs, and NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
