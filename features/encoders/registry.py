"""From what a person types to an encoder.

| specification | encoder |
|---|---|
| `tiny` | the small CLIP that is shipped |
| `open_clip/<architecture>:<tag>` | pretrained weights by open_clip's name for them |
| `open_clip/<architecture>:<file>` | weights in a .safetensors, .pt or .bin file |
| `open_clip/<architecture>:<tag>@<file>` | a tag's file, brought here by hand: as the tag in all else |
| `open_clip/hf-hub:<owner>/<name>`, `open_clip/local-dir:<folder>` | a repository in open_clip's layout |
| `vlmo/base`, `vlmo/base_plus`, `vlmo/large` | released VLMo weights; `:coco` and others, or `:<file>` |
| `sentence-transformers/<owner>/<name>`, `sentence-transformers/local-dir:<folder>` | that library's layout |
| `tfidf` | word counts of the catalogue itself, fitted when it is extracted |
| `transformers/<owner>/<name>`, `transformers/local-dir:<folder>` | a model in `save_pretrained`'s layout |
| `timm/<name>.<tag>`, `timm/local-dir:<folder>`, `timm/<name>:<file>` | a vision model of timm |
| `precomputed/<format>:<path>` | vectors of another tool: npy, parquet, ducho, clip-retrieval, amazon |
| `random`, `random:<dim>`, `random:<dim>:<seed>` | a Gaussian row seeded by each content |
| `constant`, `constant:<dim>` | ones |
| `saved:<folder>` | an encoder that was trained here, with all it needs |
| a preset's name, such as `paper/clip` | what `presets.yaml` says |
| `shuffled:<specification>`, `shuffled:<specification>@<seed>` | another item's vector of the inner encoder |

Options follow a plus sign: `timm/resnet50+pool=mean`. Every specification takes `+l2=yes`: unit length.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from features.encoders import (
    clip,
    controls,
    precomputed,
    saved,
    sentence,
    tfidf,
    timm_models,
    tiny,
    transformers_models,
    vlmo,
)
from features.encoders.base import Encoder, EncoderInfo, digest_json
from features.encoders.options import join_options, split_options
from features.encoders.presets import presets
from features.encoders.unit_length import UnitLengthEncoder, unit_length_info
from features.errors import EncoderError


@dataclass(frozen=True)
class Family:
    """How the encoders of one kind of specification are described and made."""

    example: str
    describe: Callable[[str], EncoderInfo]
    load: Callable[[str], Encoder]


FAMILIES: dict[str, Family] = {
    "tiny": Family("tiny", tiny.describe_tiny, tiny.load_tiny),
    "open_clip": Family("open_clip/ViT-B-32:openai", clip.describe_clip, clip.load_clip),
    "vlmo": Family("vlmo/base", vlmo.describe_vlmo, vlmo.load_vlmo_encoder),
    "sentence-transformers": Family(
        "sentence-transformers/all-MiniLM-L6-v2", sentence.describe_sentence, sentence.load_sentence
    ),
    "transformers": Family(
        "transformers/google/siglip2-base-patch16-224",
        transformers_models.describe_transformers,
        transformers_models.load_transformers,
    ),
    "timm": Family("timm/resnet50", timm_models.describe_timm, timm_models.load_timm),
    "saved": Family("saved:<folder>", saved.describe_saved, saved.load_saved),
    "random": Family("random:64:0", controls.describe_control, controls.load_control),
    "constant": Family("constant:64", controls.describe_control, controls.load_control),
}
"""The word before the first `/`, `:` or `+` of a specification -> its family."""

OF_A_CATALOGUE: dict[str, Family] = {
    "tfidf": Family("tfidf+dim=256", tfidf.describe_tfidf, tfidf.load_tfidf),
    "precomputed": Family(
        "precomputed/npy:features.npy+ids=ids.txt",
        precomputed.describe_precomputed,
        precomputed.load_precomputed,
    ),
}
"""Families that only the extraction of a catalogue can make; their `load` says so."""

_SHUFFLED = "shuffled:"


@dataclass(frozen=True)
class ShuffledSpec:
    """`shuffled:<inner>@<seed>`, parsed."""

    inner: str
    seed: int


def describe_encoder(spec: str) -> EncoderInfo:
    """What an encoder is, without building it; its weights are hashed, and fetched first if a tag names them.

    `shuffled:<inner>` is described as its inner encoder with a digest of its own, as its rows are dealt
    from the inner feature set.

    Raises:
        EncoderError: The specification names nothing that can be had; the message says what to type.
    """
    shuffled = parse_shuffled(spec)
    if shuffled is not None:
        return _describe_shuffled(spec, shuffled)
    plain, unit_length = plain_spec(spec)
    info = _family(plain).describe(plain)
    return unit_length_info(spec, info) if unit_length else info.model_copy(update={"spec": spec})


def load_encoder(spec: str, *, device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a specification, in evaluation mode on ``device``; its `info` is `describe_encoder`'s.

    Raises:
        EncoderError: The specification names nothing that can be had, its weights do not fit, or it is
            `shuffled:...`, which deals the rows of a finished feature set and encodes nothing.
    """
    inner = inner_spec(spec)
    if inner is not None:
        raise EncoderError(
            f"encoder {spec!r} encodes nothing: it deals out the rows of {inner!r}; extract {inner!r} and "
            "shuffle its feature table."
        )
    plain, unit_length = plain_spec(spec)
    encoder = _family(plain).load(plain)
    encoder.info = encoder.info.model_copy(update={"spec": spec})
    return (UnitLengthEncoder(spec, encoder) if unit_length else encoder).to(device).eval()


def parse_shuffled(spec: str) -> ShuffledSpec | None:
    """Read `shuffled:<inner>` or `shuffled:<inner>@<seed>` (seed 0 if left out); None for any other encoder.

    Raises:
        EncoderError: No inner encoder, or it is shuffled itself.
    """
    if not spec.startswith(_SHUFFLED):
        return None
    inner = spec.removeprefix(_SHUFFLED)
    seed = 0
    if match := re.fullmatch(r"(.+)@([0-9]+)", inner):
        inner, seed = match[1], int(match[2])
    if not inner or inner.startswith(_SHUFFLED):
        raise EncoderError(
            f"encoder {spec!r} shuffles no encoder; for example shuffled:tiny or shuffled:tiny@1."
        )
    return ShuffledSpec(inner, seed)


def inner_spec(spec: str) -> str | None:
    """The encoder whose rows `shuffled:...` deals out; None for any other encoder."""
    shuffled = parse_shuffled(spec)
    return None if shuffled is None else shuffled.inner


def plain_spec(spec: str) -> tuple[str, bool]:
    """A preset's name replaced by what it stands for, options kept; and whether unit length is asked for.

    Raises:
        EncoderError: `l2` is neither yes nor no.
    """
    base, options = split_options(spec)
    if base in presets():
        base, given = split_options(presets()[base].spec)
        options = given | options
    wish = options.pop("l2", "no")
    if wish not in ("yes", "no"):
        raise EncoderError(f"encoder {spec!r}: option l2 is {wish!r}; expected yes or no.")
    return join_options(base, options), wish == "yes"


def _describe_shuffled(spec: str, shuffled: ShuffledSpec) -> EncoderInfo:
    inner = describe_encoder(shuffled.inner)
    dealt = digest_json({"preprocessing": inner.preprocessing_sha256, "shuffled_with_seed": shuffled.seed})
    name = f"shuffled-{shuffled.seed}-{inner.name}"
    return inner.model_copy(update={"spec": spec, "name": name, "preprocessing_sha256": dealt})


def _family(spec: str) -> Family:
    word = re.split(r"[/:+]", spec, maxsplit=1)[0]
    families = FAMILIES | OF_A_CATALOGUE
    if word in families:
        return families[word]
    if word == "given":
        raise EncoderError(
            "encoder 'given' stands for features that came with a dataset and encodes nothing; use it where "
            "a dataset was imported with features (MMRec's .npy files)."
        )
    if word == "store":
        raise EncoderError(
            f"encoder {spec!r} lies in a store, which only stages and `tandem` commands open; type "
            "saved:<folder> with the artefact's folder."
        )
    base = split_options(spec)[0]
    near = difflib.get_close_matches(base, presets(), n=1)
    near = near or difflib.get_close_matches(word, [*families, "shuffled", "given"], n=1)
    examples = ", ".join(family.example for family in families.values())
    hint = f"did you mean {near[0]!r}? Forms: " if near else "expected a form like "
    raise EncoderError(f"encoder {spec!r} is not known; {hint}{examples}, shuffled:tiny.")
