"""The tag by which a run file's mapping picks a member of a union."""

from collections.abc import Mapping
from typing import Any


# `Any`: what a run file holds before it is validated.
def tag_of(value: Any, field: str, *, default: str) -> str | None:
    """Read the tag of a mapping or of a config object.

    Args:
        value: A mapping from a run file, or an object made by hand.
        field: Name of the field that holds the tag.
        default: Tag of a mapping without that field.

    Returns:
        The tag; `None`, which matches nothing, where `value` is neither.
    """
    if isinstance(value, Mapping):
        return value.get(field, default)
    # Anything may stand here; what has no tag is refused by the union.
    return getattr(value, field, None)
