"""A configuration as the text of one form field: only what differs from the defaults, in YAML, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel

from pipeline.config import parse_config
from pipeline.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def changed(config: BaseModel) -> dict[str, Any]:
    """Return what of a configuration differs from its defaults; reading it gives the same configuration."""
    found: dict[str, Any] = {}
    plain = config.model_dump(mode="json")
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            found[name] = changed(value) if isinstance(value, BaseModel) else plain[name]
    return found


def settings_text(config: BaseModel, without: Collection[str] = ()) -> str:
    """Return as YAML what differs from the defaults; empty where nothing does.

    Args:
        config: Any configuration.
        without: Fields that are handed over in another way.
    """
    found = {name: value for name, value in changed(config).items() if name not in without}
    return to_yaml(found)


def to_yaml(raw: Mapping[str, Any]) -> str:
    """Return a nested mapping as YAML, in its order; empty where it holds nothing."""
    return yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True) if raw else ""


def read_settings(text: str, source: str = "settings") -> dict[str, Any]:
    """Read a form field that holds YAML.

    Raises:
        ConfigError: It is not YAML, or holds no keys.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} cannot be read as YAML: {error}") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{source} holds {raw!r:.80}; expected keys and values such as `training: {{epochs: 20}}`."
        )
    return raw


def inputs_of(config: BaseModel, *names: str, **more: BaseModel) -> dict[str, Any]:
    """Return the form of a stage, filled in so that `stage_config` gives this configuration back.

    Args:
        config: The stage's configuration.
        names: Its fields that are inputs of their own.
        more: Further sections of the settings.
    """
    deeper = {name: value for name, value in changed(config).items() if name not in names}
    deeper |= {name: found for name, section in more.items() if (found := changed(section))}
    return {**{name: getattr(config, name) for name in names}, "settings": to_yaml(deeper)}


def stage_config(config_type: type[ConfigT], settings: str | Mapping[str, Any], **inputs: Any) -> ConfigT:
    """Put a stage's form together: its inputs, and everything deeper, as text or as read already.

    Raises:
        ConfigError: The text sets what is an input of its own, or a key or value is not right.
    """
    raw = read_settings(settings) if isinstance(settings, str) else settings
    for name in inputs:
        if name in raw:
            raise ConfigError(
                f"settings: {name!r} has a field of its own in this form; set it there ({raw[name]!r:.80})."
            )
    return parse_config({**raw, **inputs}, config_type, "settings")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lay one nested mapping over another; lists and values of ``above`` replace those below."""
    result = dict(below)
    for name, value in above.items():
        lower = result.get(name)
        both = isinstance(value, Mapping) and isinstance(lower, Mapping)
        result[name] = merged(lower, value) if both else value  # type: ignore[arg-type]  # checked in `both`
    return result
