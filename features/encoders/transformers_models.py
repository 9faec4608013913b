"""The family `transformers`: dual encoders, vision models and text models in `save_pretrained`'s layout."""

import difflib
import inspect
from typing import Any, Literal, cast

from pydantic import BaseModel

from features.encoders.base import Encoder, EncoderInfo
from features.encoders.options import read_options
from features.encoders.transformers_dual import DUAL_KINDS, DualEncoder, DualPool, plan_dual
from features.encoders.transformers_files import ModelFiles, Plan, find_model, library_config
from features.encoders.transformers_text import TextModelEncoder, plan_text
from features.encoders.transformers_vision import VisionModelEncoder, VisionPool, plan_vision
from features.errors import EncoderError


class TransformersOptions(BaseModel, frozen=True, extra="forbid"):
    """What may follow the name of a model of transformers."""

    pool: Literal["cls", "mean", "penultimate", "pooler", "last"] | None = None
    """How one vector is made of many; None: the model's default. penultimate: the default of layer -2."""
    layer: int | None = None
    """Which hidden state; None: the model's output."""
    revision: str | None = None
    """A branch, tag or commit of the hub's repository."""


_POOLS = {
    "text": ("cls", "mean", "last", "pooler"),
    "image": ("cls", "mean", "pooler"),
    "dual": ("cls", "mean"),
}


def describe_transformers(spec: str) -> EncoderInfo:
    """Info of `transformers/...`: the weights are fetched and hashed; nothing with memory is built."""
    return _plan(spec).info


def load_transformers(spec: str) -> Encoder:
    """The encoder of `transformers/...`.

    Raises:
        EncoderError: It cannot be had, an option does not apply, or the weights do not fill the model.
    """
    encoder = _plan(spec).build()
    if isinstance(encoder, DualEncoder | VisionModelEncoder | TextModelEncoder):
        encoder.files = _files(spec)
    return encoder


def _files(spec: str) -> ModelFiles:
    base, options = read_options(spec, TransformersOptions)
    return find_model(spec, base, options.revision)


def _plan(spec: str) -> Plan:
    options = read_options(spec, TransformersOptions)[1]
    files = _files(spec)
    pool, layer = options.pool, options.layer
    if pool == "penultimate":
        if layer is not None:
            raise EncoderError(f"encoder {spec!r}: pool=penultimate is layer -2; leave one of the two out.")
        pool, layer = None, -2
    model_class, config = _library_model(files)
    seen = _modality(files, model_class)
    if pool is not None and pool not in _POOLS[seen]:
        raise EncoderError(
            f"encoder {spec!r}: option pool={pool} does not apply to {files.model_type}; choose one of "
            f"{', '.join(_POOLS[seen])}."
        )
    if seen == "dual":
        if layer is not None:
            raise EncoderError(
                f"encoder {spec!r}: option layer does not apply to {files.model_type}, whose projections "
                "were trained on the output; leave it out."
            )
        return plan_dual(files, model_class, config, cast("DualPool | None", pool))
    has_pooler = "add_pooling_layer" in inspect.signature(model_class.__init__).parameters
    if seen == "text":
        return plan_text(files, model_class, config, pool, layer, has_pooler=has_pooler)
    return plan_vision(
        files, model_class, config, cast("VisionPool | None", pool), layer, has_pooler=has_pooler
    )


def _library_model(files: ModelFiles) -> tuple[Any, Any]:
    """Transformers' class of a model without a head, and its configuration.

    Raises:
        EncoderError: transformers does not know the type, or only by code that lies in the repository.
    """
    from transformers import CONFIG_MAPPING, MODEL_MAPPING  # noqa: PLC0415 - seconds of imports

    kind = files.model_type
    if kind not in CONFIG_MAPPING:
        if "auto_map" in files.config:
            raise EncoderError(
                f"encoder {files.spec!r}: its model type {kind!r} is code in its repository, and code of "
                "others is never run; choose a model that transformers itself knows."
            )
        near = difflib.get_close_matches(kind, list(CONFIG_MAPPING.keys()), n=3)
        hint = f"did it mean {' or '.join(near)}?" if near else "a newer transformers may know it."
        raise EncoderError(f"encoder {files.spec!r}: transformers knows no model type {kind!r}; {hint}")
    config = library_config(files)
    if type(config) not in MODEL_MAPPING:
        raise EncoderError(
            f"encoder {files.spec!r}: transformers has no plain model of the type {kind!r}; choose a dual "
            "encoder, a vision model or a text model."
        )
    model_class = MODEL_MAPPING[type(config)]
    return model_class[0] if isinstance(model_class, tuple) else model_class, config


def _modality(files: ModelFiles, model_class: Any) -> Literal["dual", "image", "text"]:
    """What a model reads.

    Raises:
        EncoderError: Something else, or pictures and texts in a way that is not known here.
    """
    if files.model_type in DUAL_KINDS:
        return "dual"
    given = model_class.input_modalities
    modalities = {given} if isinstance(given, str) else set(given)
    if (
        model_class.main_input_name == "pixel_values"
        and len(modalities) == 1
        and modalities <= {"image", "text"}
    ):
        return "image"  # "text" is the library's default where a class states nothing
    if modalities == {"text"} and model_class.main_input_name == "input_ids":
        return "text"
    raise EncoderError(
        f"encoder {files.spec!r}: models of the type {files.model_type!r} read "
        f"{' and '.join(sorted(modalities))} in a way that is not supported; dual encoders: "
        f"{', '.join(DUAL_KINDS)}; or a vision or text model."
    )
