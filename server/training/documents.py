"""Stored JSON, back as the frozen dataclasses that it was made from, every field checked against its type."""

from typing import TypeVar, cast

from pydantic import TypeAdapter

_Kind = TypeVar("_Kind")
_readers: dict[object, object] = {}
"""By kind: making one takes milliseconds."""


def read_document(kind: type[_Kind], document: object) -> _Kind:
    """What `dataclasses.asdict` made of a `kind`, also once it was JSON: lists become tuples, texts become dates.

    Fields that `kind` doesn't have are left out. Raises ValueError where one is missing or of another type.
    """
    if kind not in _readers:
        _readers[kind] = TypeAdapter(kind)
    return cast("TypeAdapter[_Kind]", _readers[kind]).validate_python(document)
