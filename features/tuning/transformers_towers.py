"""Towers of transformers' models: CLIP, SigLIP, ViT, DINOv2, BERT and its kin."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from features.encoders.base import Encoder
from features.encoders.sentence import SentenceEncoder
from features.encoders.transformers_dual import DualEncoder
from features.encoders.transformers_files import floating_dtype
from features.encoders.transformers_text import TextModelEncoder, pool_tokens
from features.encoders.transformers_tokens import masked
from features.encoders.transformers_vision import VisionModelEncoder
from features.errors import EncoderError
from features.tuning.hidden import Hidden, sequence
from features.tuning.tower import Part, Tower, row_numbers

BERTS = frozenset({"bert", "roberta", "xlm-roberta", "camembert"})
"""Types whose text model is embeddings, `encoder.layer` and a pooler."""
VITS = frozenset({"vit", "dinov2", "dinov2_with_registers"})
"""Types whose vision model is embeddings, layers and a final norm."""


class DualImageTower(Tower):
    """The image tower of transformers' CLIP or SigLIP."""

    def __init__(self, encoder: DualEncoder, kind: Literal["clip", "siglip"]) -> None:
        self._vision: Any = encoder.model.vision_model
        self._layers = self._vision.encoder.layers
        width = self._vision.config.hidden_size
        super().__init__(encoder, "image", [[b] for b in self._layers], [width] * (len(self._layers) + 1))
        self._clip = kind == "clip"
        self._projection: Any = encoder.model.visual_projection if self._clip else None

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, 3, H, W) -> (B, L, W), CLIP's class token first."""
        states = self._vision.embeddings(inputs.to(floating_dtype(self._vision)))
        return sequence(self._vision.pre_layrnorm(states) if self._clip else states)

    def _block(self, number: int, states: Tensor, context: None) -> Tensor:
        out: Tensor = self._layers[number](states, context)
        return out

    def head(self, hidden: Hidden) -> Tensor:
        """CLIP: norm and projection of the class token; SigLIP: norm, then its attention pooling."""
        if self._clip:
            vectors: Tensor = self._projection(self._vision.post_layernorm(hidden.states[:, 0]))
        else:
            vectors = self._vision.head(self._vision.post_layernorm(hidden.states))
        return vectors.float()

    def pooled(self, hidden: Hidden) -> Tensor:
        """CLIP: the class token's state; SigLIP, which has none: the patches' mean."""
        return hidden.states[:, 0] if self._clip else hidden.states.mean(dim=1)

    def stem_parts(self) -> Sequence[Part]:
        """Patches, class token, positions, first norm."""
        return [self._vision.embeddings, self._vision.pre_layrnorm if self._clip else None]

    def head_parts(self) -> Sequence[Part]:
        """Final norm, pooling, projection."""
        return [self._vision.post_layernorm, self._projection if self._clip else self._vision.head]


class DualTextTower(Tower):
    """The text tower of transformers' CLIP or SigLIP."""

    def __init__(self, encoder: DualEncoder, kind: Literal["clip", "siglip"]) -> None:
        self._text: Any = encoder.model.text_model
        self._layers = self._text.encoder.layers
        width = self._text.config.hidden_size
        super().__init__(encoder, "text", [[b] for b in self._layers], [width] * (len(self._layers) + 1))
        self._clip = kind == "clip"
        self._projection: Any = encoder.model.text_projection if self._clip else self._text.head
        self._fill, self._uses_mask = encoder.fill, encoder.uses_mask

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, L) ids, padding negative -> (B, L, W); the mask is true everywhere where padding is seen."""
        ids, mask = masked(inputs, self._fill)
        seen = mask.bool() if self._uses_mask else torch.ones_like(mask, dtype=torch.bool)
        return Hidden(self._text.embeddings(input_ids=ids), seen, self._places(ids))

    def _places(self, ids: Tensor) -> Tensor:
        if not self._clip:
            return torch.full((len(ids),), ids.shape[1] - 1, dtype=torch.int64, device=ids.device)
        if self._text.eos_token_id == 2:  # as old configurations of CLIP state it: the highest id
            return ids.argmax(dim=1)
        return torch.eq(ids, self._text.eos_token_id).int().argmax(dim=1)

    def _context(self, hidden: Hidden) -> Any:
        from transformers import masking_utils  # noqa: PLC0415 - seconds of imports

        make: Any = (
            masking_utils.create_causal_mask if self._clip else masking_utils.create_bidirectional_mask
        )
        mask = hidden.mask.long() if self._uses_mask else None
        more = {"past_key_values": None} if self._clip else {}
        return make(config=self._text.config, inputs_embeds=hidden.states, attention_mask=mask, **more)

    def _block(self, number: int, states: Tensor, context: Any) -> Tensor:
        more = {"is_causal": True} if self._clip else {}
        out: Tensor = self._layers[number](states, context, **more)
        return out

    def head(self, hidden: Hidden) -> Tensor:
        """Final norm and projection of the pooled token."""
        vectors: Tensor = self._projection(self._text.final_layer_norm(self.pooled(hidden)))
        return vectors.float()

    def pooled(self, hidden: Hidden) -> Tensor:
        """The state of the token that is pooled: CLIP's end of text, SigLIP's last place."""
        return hidden.states[row_numbers(hidden.states), hidden.at]

    def stem_parts(self) -> Sequence[Part]:
        """Words and positions."""
        return [self._text.embeddings]

    def head_parts(self) -> Sequence[Part]:
        """Final norm and projection."""
        return [self._text.final_layer_norm, self._projection]


class VisionTower(Tower):
    """transformers' ViT, DINOv2, and DINOv2 with registers."""

    def __init__(self, encoder: VisionModelEncoder) -> None:
        self._model: Any = encoder.model
        self._layers = self._model.layers if hasattr(self._model, "layers") else self._model.encoder.layer
        width = self._model.config.hidden_size
        super().__init__(encoder, "image", [[b] for b in self._layers], [width] * (len(self._layers) + 1))
        self._pool = encoder.pool
        self._n_prefix = 1 + int(getattr(self._model.config, "num_register_tokens", 0))

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, 3, H, W) -> (B, L, W), the class token and registers first."""
        return sequence(self._model.embeddings(inputs.to(floating_dtype(self._model))))

    def _block(self, number: int, states: Tensor, context: None) -> Tensor:
        out: Tensor = self._layers[number](states, context)
        return out

    def head(self, hidden: Hidden) -> Tensor:
        """Final norm, then the pooling that the encoder was asked for."""
        states: Tensor = self._model.layernorm(hidden.states)
        pooler = getattr(self._model, "pooler", None)
        if self._pool == "mean":
            return states[:, self._n_prefix :].float().mean(dim=1)
        vectors: Tensor = pooler(states) if self._pool == "pooler" and pooler else states[:, 0]
        return vectors.float()

    def pooled(self, hidden: Hidden) -> Tensor:
        """The class token's state, or the patches' mean where the encoder pools so."""
        if self._pool == "mean":
            return hidden.states[:, self._n_prefix :].mean(dim=1)
        return hidden.states[:, 0]

    def stem_parts(self) -> Sequence[Part]:
        """Patches, class token, registers, positions."""
        return [self._model.embeddings]

    def head_parts(self) -> Sequence[Part]:
        """Final norm, and the pooler where there is one."""
        return [self._model.layernorm, getattr(self._model, "pooler", None)]


class BertTower(Tower):
    """A text model of BERT's build, and whatever makes one vector of its tokens."""

    def __init__(self, encoder: Encoder, model: Any, fill: int) -> None:
        self._model = model
        self._layers = model.encoder.layer
        width = model.config.hidden_size
        super().__init__(encoder, "text", [[b] for b in self._layers], [width] * (len(self._layers) + 1))
        self._fill = fill

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, L) ids, padding negative -> (B, L, W)."""
        ids, mask = masked(inputs, self._fill)
        at = torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
        return Hidden(self._model.embeddings(input_ids=ids), mask.bool(), at)

    def _context(self, hidden: Hidden) -> Any:
        from transformers import masking_utils  # noqa: PLC0415 - seconds of imports

        make: Any = masking_utils.create_bidirectional_mask
        return make(config=self._model.config, inputs_embeds=hidden.states, attention_mask=hidden.mask.long())

    def _block(self, number: int, states: Tensor, context: Any) -> Tensor:
        out: Tensor = self._layers[number](states, context)
        return out

    def head(self, hidden: Hidden) -> Tensor:
        """The encoder's own pooling."""
        encoder: Any = self.encoder
        if isinstance(encoder, SentenceEncoder):
            return encoder.pool_tokens(hidden.states, hidden.mask.long())
        if encoder.pool == "pooler":
            vectors: Tensor = self._model.pooler(hidden.states)
            return vectors.float()
        return pool_tokens(hidden.states, hidden.mask.long(), encoder.pool)

    def pooled(self, hidden: Hidden) -> Tensor:
        """The first token's state where that is pooled, else the mean of all real tokens."""
        first = getattr(self.encoder, "pool", "mean") in ("cls", "pooler")
        return pool_tokens(hidden.states, hidden.mask.long(), "cls" if first else "mean")

    def stem_parts(self) -> Sequence[Part]:
        """Words, positions, token types and their norm."""
        return [self._model.embeddings]

    def head_parts(self) -> Sequence[Part]:
        """The pooler; of sentence-transformers, the modules behind the network."""
        steps: list[nn.Module] = []
        if isinstance(self.encoder, SentenceEncoder):
            steps = list(self.encoder.steps)[1:]
        return [getattr(self._model, "pooler", None), *steps]


def dual_tower(encoder: DualEncoder, modality: Literal["image", "text"]) -> Tower:
    """A tower of transformers' CLIP or SigLIP.

    Raises:
        EncoderError: The model is of another type.
    """
    kind = encoder.model.config.model_type
    if kind not in ("clip", "siglip"):
        raise EncoderError(f"it is a {kind} of transformers")
    name: Literal["clip", "siglip"] = "clip" if kind == "clip" else "siglip"
    return DualImageTower(encoder, name) if modality == "image" else DualTextTower(encoder, name)


def vision_tower(encoder: VisionModelEncoder) -> Tower:
    """The tower of a vision model of transformers.

    Raises:
        EncoderError: The model is of another type, or the vector is taken from a layer in between.
    """
    kind = encoder.model.config.model_type
    if kind not in VITS or encoder.layer is not None:
        raise EncoderError(f"it is a {kind} of transformers" if kind not in VITS else "it ends at a layer")
    return VisionTower(encoder)


def text_tower(encoder: TextModelEncoder) -> Tower:
    """The tower of a text model of transformers.

    Raises:
        EncoderError: The model is of another type, or the vector is taken from a layer in between.
    """
    kind = encoder.model.config.model_type
    if kind not in BERTS or encoder.layer is not None or encoder.model.config.is_decoder:
        raise EncoderError(f"it is a {kind} of transformers" if kind not in BERTS else "it ends at a layer")
    return BertTower(encoder, encoder.model, encoder.fill)


def sentence_tower(encoder: SentenceEncoder) -> Tower:
    """The text tower of an encoder of sentence-transformers.

    Raises:
        EncoderError: Its network is not of BERT's build, or gives more than tokens.
    """
    network: Any = getattr(encoder.steps[0], "model", None)
    kind = getattr(getattr(network, "config", None), "model_type", type(encoder.steps[0]).__name__)
    if kind not in BERTS:
        raise EncoderError(f"its network is a {kind}")
    return BertTower(encoder, network, encoder.filler)
