"""What `tandem recommenders` shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from recommenders.models.registry import MODELS, ModelEntry, model_entry
from recommenders.ranges import Between, Range
from recommenders.search_space import TRAINING
from recommenders.training import TrainingConfig


def listed(runs: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return a document for each recommender.

    Args:
        runs: Name -> how many runs of it there are.
    """
    return [
        {
            **_head(name, entry),
            "settings": {key: field.default for key, field in entry.config.model_fields.items()},
            "runs": runs.get(name, 0),
        }
        for name, entry in MODELS.items()
    ]


def described(name: str) -> dict[str, Any]:
    """Return one recommender with every setting: default, what it may be, meaning, and range of a search.

    Settings of training are among them where the recommender's own search changes them.

    Raises:
        RecommenderError: There is no such recommender.
    """
    entry = model_entry(name)
    fields = dict(entry.config.model_fields)
    of_training = [setting for setting in entry.search if setting.startswith(TRAINING)]
    fields |= {name: TrainingConfig.model_fields[name.removeprefix(TRAINING)] for name in of_training}
    settings = [
        {
            "setting": setting,
            "default": field.default,
            "one_of": _choices(field),
            "description": field.description,
            "search": _plain(entry.search.get(setting)),
        }
        for setting, field in fields.items()
    ]
    return {**_head(name, entry), "scoring": entry.model.scoring, "settings": settings}


def every_setting(document: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the rows of a table of ``described``: setting, default, and what it means."""
    return [
        (setting["setting"], str(setting["default"]), " ".join(_sentences(setting)))
        for setting in document["settings"]
    ]


def _sentences(setting: Mapping[str, Any]) -> Iterator[str]:
    yield setting["description"]
    if setting["one_of"]:
        yield f"One of {', '.join(setting['one_of'])}."
    if setting["search"] is not None:
        yield f"Searched: {_range_in_words(setting['search'])}."


def _head(name: str, entry: ModelEntry) -> dict[str, Any]:
    paper = entry.paper
    return {
        "model": name,
        "paper": paper.short if paper else "",
        "title": paper.title if paper else "",
        "venue": paper.venue if paper else "",
        "year": paper.year if paper else None,
        "reads": "features" if entry.model.needs_features else "interactions",
    }


def _choices(field: FieldInfo) -> list[str]:
    literal = get_origin(field.annotation) is Literal
    return [str(choice) for choice in get_args(field.annotation)] if literal else []


def _plain(values: Range | None) -> Any:
    """Return a range as JSON: a list of values, or its ends; None where nothing is searched."""
    if isinstance(values, Between):
        return values.model_dump(mode="json")
    return None if values is None else list(values)


def _range_in_words(values: Any) -> str:
    if isinstance(values, dict):
        return f"{values['low']} to {values['high']}" + (" (log)" if values["log"] else "")
    return ", ".join(str(value) for value in values)
