"""Text models of transformers: BERT and its kin, and decoders such as Qwen3."""

from typing import Any, Literal

import torch
from torch import Tensor

from features.encoders.base import Encoder, EncoderInfo
from features.encoders.controls import blank_picture
from features.encoders.transformers_files import ModelFiles, Plan, load_model, make_info
from features.encoders.transformers_tokens import (
    PADDING,
    LibraryTokenizer,
    find_tokenizer,
    masked,
    tokenizer_settings,
)
from features.errors import EncoderError

TextPool = Literal["cls", "mean", "last", "pooler"]

_OFFSET_POSITIONS = frozenset(
    {"roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer"}
    | {"data2vec-text", "xmod", "ibert", "esm"}
)
"""Their positions start behind the padding's id, so that two fewer tokens fit than there are positions."""


class TextModelEncoder(Encoder):
    """A text model and how one vector is made of its tokens' states.

    Args:
        info: What this encoder is.
        model: transformers' model without a head.
        tokenizer: Its tokenizer.
        pool: cls: the first token; mean: of all real tokens; last: the last real token; pooler: the model's
            own layer behind the first token.
        layer: Which hidden state, as transformers counts them (-2: the last but one); None: the output.
    """

    def __init__(
        self, info: EncoderInfo, model: Any, tokenizer: LibraryTokenizer, pool: TextPool, layer: int | None
    ) -> None:
        super().__init__(info, blank_picture, tokenizer, pad_id=PADDING)
        self.model = model
        self.files: ModelFiles | None = None
        """Where it came from, by which it can be saved."""
        self.pool = pool
        self.layer = layer
        self.fill = model.config.pad_token_id or 0
        self._is_decoder = is_decoder(model.config)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, D) float32; padding counts nowhere."""
        ids, mask = masked(tokens, self.fill)
        more = {"use_cache": False} if self._is_decoder else {}
        given = self.model(
            input_ids=ids, attention_mask=mask, output_hidden_states=self.layer is not None, **more
        )
        if self.pool == "pooler":
            pooled: Tensor = given.pooler_output
            return pooled.float()
        states = given.last_hidden_state if self.layer is None else given.hidden_states[self.layer]
        return pool_tokens(states, mask, self.pool)


def pool_tokens(states: Tensor, mask: Tensor, pool: TextPool) -> Tensor:
    """One vector a text.

    Args:
        states: (B, L, D).
        mask: (B, L), ones where there is a token, the padding behind them.
        pool: cls, mean or last.

    Returns:
        (B, D) float32.
    """
    if pool == "cls":
        return states[:, 0].float()
    if pool == "last":
        rows = torch.arange(len(states), device=states.device)
        return states[rows, mask.sum(dim=1) - 1].float()
    weights = mask[:, :, None].to(torch.float32)
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1)


def is_decoder(config: Any) -> bool:
    """Whether a token sees those before it only."""
    from transformers.models.auto.modeling_auto import (  # noqa: PLC0415 - seconds of imports
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    causal = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return causal or bool(getattr(config, "is_decoder", False))


def plan_text(
    files: ModelFiles,
    model_class: Any,
    config: Any,
    pool: TextPool | None,
    layer: int | None,
    *,
    has_pooler: bool,
) -> Plan:
    """How a text model becomes an encoder.

    Args:
        files: Of the model.
        model_class: transformers' class.
        config: Its configuration.
        pool: None for the default: mean, or last where a token sees only those before it.
        layer: As for `TextModelEncoder`.
        has_pooler: Whether the class can be built with and without a pooling layer.

    Raises:
        EncoderError: The model or an option is of another kind, or there is no tokenizer.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise EncoderError(
            f"encoder {files.spec!r}: {files.model_type} is an encoder with a decoder, which gives no "
            "vector of a text; choose a text encoder such as sentence-transformers/all-mpnet-base-v2."
        )
    causal = is_decoder(config)
    pooled: TextPool = pool or ("last" if causal else "mean")
    if pooled == "cls" and causal:
        raise EncoderError(
            f"encoder {files.spec!r}: option pool=cls does not apply to {files.model_type}, whose first "
            "token sees no other; choose last or mean."
        )
    if pooled == "pooler" and (not has_pooler or layer is not None):
        why = "together with a layer" if has_pooler else f"to {files.model_type}"
        raise EncoderError(
            f"encoder {files.spec!r}: option pool=pooler does not apply {why}; choose cls, mean or last."
        )
    n_layers = int(getattr(config, "num_hidden_layers", 0) or getattr(config, "n_layers", 0))
    check_layer(files.spec, layer, n_layers + 1)
    tokenizer = find_tokenizer(files, _positions(files, config))
    info = make_info(
        files,
        vectors={"pool": pooled, "layer": layer},
        dims={"text": int(config.hidden_size)},
        tokenizer=tokenizer_settings(tokenizer),
        context_length=tokenizer.context_length,
    )

    def build() -> Encoder:
        arguments = {"add_pooling_layer": pooled == "pooler"} if has_pooler else {}
        model, notes = load_model(files, model_class, config, arguments)
        encoder = TextModelEncoder(info, model, tokenizer, pooled, layer)
        encoder.notes = notes
        return encoder

    return Plan(info, build)


def check_layer(spec: str, layer: int | None, n_states: int) -> None:
    """Refuse a layer that the model does not have.

    Raises:
        EncoderError: Out of range.
    """
    if layer is not None and not -n_states <= layer < n_states:
        raise EncoderError(
            f"encoder {spec!r}: option layer is {layer}; the model has {n_states} hidden states, so expected "
            f"{-n_states} to {n_states - 1} (-1 is the last, -2 the last but one, 0 what goes into the "
            "first)."
        )


def _positions(files: ModelFiles, config: Any) -> int:
    """Most tokens that have a position."""
    positions = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 0)
    if positions > 0 and files.model_type in _OFFSET_POSITIONS:
        return positions - int(config.pad_token_id or 0) - 1
    return max(positions, 0)
