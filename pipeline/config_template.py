"""A configuration type as commented YAML: every setting with its default and what it means."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

_WIDTH = 110


def template(config: BaseModel) -> str:
    """Return YAML that reads back to an equal configuration, each setting under its description."""
    return "\n".join(_lines(config, 0)) + "\n"


def _lines(config: BaseModel, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        for line in _comment(field, len(indent)):
            yield f"{indent}# {line}"
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, depth + 1)
        else:
            yield f"{indent}{name}: {_flow(value)}"


def _comment(field: FieldInfo, indent: int) -> list[str]:
    """Description and allowed values, wrapped."""
    words = [field.description or ""]
    if get_origin(field.annotation) is Literal:
        words.append("One of " + ", ".join(str(choice) for choice in get_args(field.annotation)) + ".")
    text = " ".join(word for word in words if word)
    return textwrap.wrap(text, _WIDTH - indent - 2)


def _flow(value: Any) -> str:
    """A value on one line."""
    plain = _plain(value)
    text = yaml.safe_dump(plain, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value
