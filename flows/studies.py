"""The form of a whole study: from its inputs to a configuration, and kept to be scheduled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prefect import runtime

from features.encoders.presets import presets
from flows.prepare_dataset import dataset_source
from flows.shards import Sharing
from pipeline.errors import ConfigError
from pipeline.kept import (
    KeptConfiguration,
    KeptDeployment,
    Study,
    configurations,
    with_absolute_paths,
)
from pipeline.selecting import listed
from pipeline.settings import changed, merged, read_settings, stage_config, to_yaml
from pipeline.store import Store


@dataclass(frozen=True)
class StudyForm:
    """What a person fills in; empty fields are as the kept configuration, or the defaults, say."""

    configuration: str = ""
    name: str = ""
    items: str = ""
    interactions: str = ""
    pictures: str = ""
    encoders: str = ""
    recommenders: str = ""
    seeds: int = 0
    settings: str = ""

    def raw(self, store: Store, study: Study) -> tuple[dict[str, Any], Sharing]:
        """Return the configuration to be checked, and how extraction is shared out.

        The settings change the kept configuration, and the inputs change both.

        Raises:
            ConfigError: There is no such configuration, it is of another study, or the settings are no YAML.
        """
        raw = merged(kept_raw(store, self.configuration, study), read_settings(self.settings))
        sharing = stage_config(Sharing, raw.pop("sharing", {}))
        return merged(raw, self._inputs(study)), sharing

    def _inputs(self, study: Study) -> dict[str, Any]:
        source = dataset_source(self.items, self.interactions, columns={"image_folder": self.pictures})
        encoders = listed(self.encoders)
        inputs: dict[str, Any] = {
            "name": self.name,
            "dataset": source,
            "recommenders": [{"model": model} for model in listed(self.recommenders)],
            "seeds": list(range(self.seeds)),
        }
        if study == "two-stage":
            inputs["feature_sets"] = [_feature_set(encoder) for encoder in encoders]
        else:
            inputs["encoders"] = encoders
        return {key: value for key, value in inputs.items() if value}


def _feature_set(encoder: str) -> dict[str, str]:
    """One encoder for pictures and texts, as far as it is known to encode them."""
    preset = presets().get(encoder)
    modalities = preset.modalities if preset is not None else ("image", "text")
    return {modality: encoder for modality in ("image", "text") if modality in modalities}


def kept_raw(store: Store, name: str, study: Study) -> dict[str, Any]:
    """Return a kept configuration, to be checked; empty without a name.

    Raises:
        ConfigError: There is no such configuration, or it is of another study.
    """
    if not name:
        return {}
    kept = configurations(store).read(name, KeptConfiguration)
    if kept.study != study:
        raise ConfigError(f"configuration {name!r} is of {kept.study}, not of {study}; run it there.")
    raw: dict[str, Any] = yaml.safe_load(kept.text) or {}
    return raw


def keep_study(store: Store, name: str, study: Study, raw: dict[str, Any], sharing: Sharing) -> None:
    """Keep a filled-in form as a configuration and as a deployment, and register that with the server.

    Raises:
        StoreError: The name is not allowed.
        ConfigError: A flow has that name.
    """
    from flows.deploying import keep, register_now  # noqa: PLC0415 - it imports every flow

    folder = str(Path.cwd())
    shared = {"sharing": found} if (found := changed(sharing)) else {}
    whole = {**raw, "name": raw.get("name", name), **shared}
    text = to_yaml(with_absolute_paths(whole, folder))
    deployment = KeptDeployment(flow=study, inputs={"configuration": name}, folder=folder)
    keep(store, name, deployment, KeptConfiguration(study=study, text=text))
    register_now(store, name)


def study_run_name() -> str:
    """Name a run after what it compares, as far as the form tells."""
    given = runtime.flow_run.parameters
    return str(given.get("name") or given.get("configuration") or runtime.flow_run.flow_name)
