"""Which settings tell one training from another, as settings are added over time."""

from __future__ import annotations

from enum import Enum

from pydantic import BaseModel, JsonValue


class Counts(Enum):
    """When a setting goes into a key; written into its type, ``Annotated[bool, Counts.IF_CHANGED]``.

    A setting without this mark always does.
    """

    IF_CHANGED = "if changed"
    """It came after runs were kept: those made before it are runs with its default, and keep their keys."""
    NEVER = "never"
    """It changes no result."""


def left_out(config: BaseModel) -> set[str]:
    """Return the names of the settings that do not count as they are."""
    names = set()
    for name, field in type(config).model_fields.items():
        unchanged = getattr(config, name) == field.default
        if Counts.NEVER in field.metadata or (Counts.IF_CHANGED in field.metadata and unchanged):
            names.add(name)
    return names


def identity(config: BaseModel) -> dict[str, JsonValue]:
    """Return the settings that count, for a key: equal for trainings that are the same."""
    counted: dict[str, JsonValue] = config.model_dump(mode="json", exclude=left_out(config))
    return counted
