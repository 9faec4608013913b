"""`store/<encoder artefact>` as an encoder: from what a person types to a folder on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from features.encoders.options import join_options, split_options
from features.encoders.registry import describe_encoder, load_encoder, parse_shuffled
from features.encoders.saved import ENCODER_FILE, save_encoder
from features.encoders.tiny import WEIGHTS_FILE as TINY_WEIGHTS_FILE
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from pydantic import JsonValue

    from features.encoders.base import Encoder, EncoderInfo
    from pipeline.store import Artefact, Draft, InputRef, Store

STORED = "store/"
"""How the specification of an encoder artefact begins."""
_SHUFFLED = "shuffled:"


@dataclass(frozen=True)
class ResolvedEncoder:
    """An encoder's specification, and where it is on this machine."""

    spec: str
    """What is recorded and shown: `store/<folder>` for an artefact, otherwise as typed."""
    local: str
    """What `features` can load; for an artefact it holds a path, and goes into no manifest."""
    artefact: Artefact | None = None

    @property
    def inputs(self) -> list[InputRef]:
        """What an artefact made with this encoder lists beside its other inputs."""
        return [] if self.artefact is None else [self.artefact.as_input("encoder")]

    def describe(self) -> EncoderInfo:
        """What the encoder is, under its recorded specification.

        Raises:
            EncoderError: It cannot be what its specification says.
        """
        return describe_encoder(self.local).model_copy(update={"spec": self.spec})

    def load(self, *, device: str | torch.device = "cpu") -> Encoder:
        """The encoder in evaluation mode on ``device``, under its recorded specification.

        Raises:
            EncoderError: It cannot be what its specification says, or only deals out other rows.
        """
        encoder = load_encoder(self.local, device=device)
        encoder.info = encoder.info.model_copy(update={"spec": self.spec})
        return encoder


def is_stored(spec: str) -> bool:
    """Whether a specification names an encoder artefact; `shuffled:` before it does not count."""
    return spec.startswith(STORED)


def resolve_encoder(store: Store, spec: str) -> ResolvedEncoder:
    """Find the artefact that `store/<name, key or folder>` means; of a remote store its files are fetched.

    Options behind it, and `shuffled:` with its seed around it, stay. Any other specification stays as it is.

    Raises:
        StoreError: There is no such encoder artefact.
        ConfigError: The artefact holds no encoder that can be loaded.
        EncoderError: The specification is not well formed.
    """
    shuffled = parse_shuffled(spec)
    if shuffled is not None:
        inner = resolve_encoder(store, shuffled.inner)
        if inner.artefact is None:
            return ResolvedEncoder(spec, spec)
        seed = f"@{shuffled.seed}" if shuffled.seed else ""
        shown, local = (f"{_SHUFFLED}{one}{seed}" for one in (inner.spec, inner.local))
        return ResolvedEncoder(shown, local, inner.artefact)
    if not is_stored(spec):
        return ResolvedEncoder(spec, spec)
    base, options = split_options(spec)
    artefact = store.get(base.removeprefix(STORED), "encoder")
    shown = join_options(f"{STORED}{artefact.manifest.folder}", options)
    return ResolvedEncoder(shown, join_options(_local_spec(artefact), options), artefact)


def stored_spec(artefact: Artefact) -> str:
    """What to type for an encoder artefact: `store/<folder>`."""
    return f"{STORED}{artefact.manifest.folder}"


def _local_spec(artefact: Artefact) -> str:
    """The family that reads the artefact's folder, all of it on this machine."""
    files = artefact.manifest.files
    family, first = ("saved", ENCODER_FILE) if ENCODER_FILE in files else ("tiny", TINY_WEIGHTS_FILE)
    if first not in files:
        raise ConfigError(
            f"{artefact.ref} holds no {ENCODER_FILE}, so that it cannot be loaded; make it again, and name "
            "that one."
        )
    artefact.paths()
    return f"{family}:{artefact.path(first).parent}"


def store_encoder(
    draft: Draft, encoder: Encoder, *, name: str, provenance: Mapping[str, JsonValue] | None = None
) -> None:
    """Fill the draft of an encoder artefact, and record what the encoder is.

    Args:
        draft: Of kind `encoder`. What a killed try has left of an encoder is replaced; other files stay, and
            more may be written beside these.
        encoder: In plain form.
        name: What it is to be called, in slugs and tables.
        provenance: How it came to be: kept in `encoder.json`; keys of artefacts, settings, measures.

    Raises:
        EncoderError: Its family cannot be saved.
    """
    with TemporaryDirectory(dir=draft.scratch) as folder:
        fresh = Path(folder) / "encoder"
        saved = save_encoder(encoder, fresh, name=name, provenance=provenance)
        for file in (*saved.files, ENCODER_FILE):
            (fresh / file).replace(draft.path(file))
    info = describe_encoder(f"saved:{draft.folder}")
    draft.record(
        encoder=info.model_dump(mode="json", exclude={"spec"}),
        base=saved.base.name,
        summary={"parameters": info.n_parameters, "base": saved.base.name},
    )
