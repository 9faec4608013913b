"""VLMo's image and text towers: shared attention, one expert in each block."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from features.encoders.vlmo.encoder import VlmoEncoder
from features.encoders.vlmo.model import Expert, Towers, added_of, hiding_of
from features.tuning.hidden import Hidden, sequence
from features.tuning.tower import Part, Tower

_Context = tuple[list[Tensor] | None, Tensor | None]
"""Position biases, a block each, and what hides the padding."""


class VlmoTower(Tower):
    """One modality's way through VLMo.

    Attention, its norm and its scales are the other modality's too, in every block; the table of position
    biases, which all blocks of both share, counts as part of the stem.

    Args:
        encoder: Whose tower.
        modality: image or text.
    """

    def __init__(self, encoder: VlmoEncoder, modality: Literal["image", "text"]) -> None:
        self._model = encoder.model
        self._vl = encoder.options.output == "vl"
        self._cls = encoder.options.output == "cls"
        config = encoder.model.config
        self._own: Expert = "imag" if modality == "image" else "text"
        self._experts: list[Expert] = [
            "vl" if self._vl and number >= config.vl_start else self._own for number in range(config.depth)
        ]
        blocks: list[list[Part]] = []
        for block, expert in zip(_blocks(encoder), self._experts, strict=True):
            layers = [block.get_submodule(f"{layer}_{expert}") for layer in ("norm2", "mlp")]
            blocks.append([block.norm1, block.attn, block.gamma_1, block.gamma_2, *layers])
        super().__init__(encoder, modality, blocks, [config.width] * (config.depth + 1))

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, 3, H, W) or (B, L), padding negative -> (B, P + 1, W) or (B, L, W), the first token's first."""
        model = self._model
        if self.modality == "image":
            typed = inputs.to(model.transformer.cls_token.dtype)
            return sequence(model.transformer.embed(typed) + model.token_type_embeddings.weight[1])
        states = model.text_embeddings(inputs.clamp(min=0)) + model.token_type_embeddings.weight[0]
        at = torch.zeros(len(inputs), dtype=torch.int64, device=inputs.device)
        return Hidden(states, inputs >= 0, at)

    def _context(self, hidden: Hidden) -> _Context:
        if self.modality == "image":
            return self._model.bias("image", 0), None
        biases = self._model.bias("text", hidden.states.shape[1])
        return biases, hiding_of(hidden.mask, hidden.states)

    def _block(self, number: int, states: Tensor, context: _Context) -> Tensor:
        biases, hiding = context
        out: Tensor = self._model.transformer.blocks[number](
            states, added_of(biases, number, hiding), self._experts[number]
        )
        return out

    def head(self, hidden: Hidden) -> Tensor:
        """Final norm of the class token, and the contrastive projection unless the output is cls."""
        if self._cls:
            return self._model.first(hidden.states).float()
        towers = Towers(hidden.states, hidden.states if self._vl else None)
        embed = self._model.image_embedding if self.modality == "image" else self._model.text_embedding
        return embed(towers, vl=self._vl).float()

    def pooled(self, hidden: Hidden) -> Tensor:
        """The class token's state."""
        return hidden.states[:, 0]

    def block_modules(self) -> list[nn.Module]:
        """Whole blocks, all experts in them."""
        return list(self._model.transformer.blocks)

    def stem_parts(self) -> Sequence[Part]:
        """The modality's embeddings, and what both share: token types and position biases."""
        model, transformer = self._model, self._model.transformer
        shared: list[Part] = [model.token_type_embeddings, model.relative_position_bias_table]
        if self.modality == "text":
            return [model.text_embeddings, *shared]
        return [transformer.patch_embed, transformer.cls_token, transformer.pos_embed, *shared]

    def head_parts(self) -> Sequence[Part]:
        """The final norm, which both share, and the projection."""
        if self._cls:
            return [self._model.transformer.norm]
        branch = "itc_vl" if self._vl else "itc"
        return [
            self._model.transformer.norm,
            self._model.get_submodule(f"{branch}_{self.modality}_proj"),
        ]


def _blocks(encoder: VlmoEncoder) -> list[Any]:
    return list(encoder.model.transformer.blocks)
