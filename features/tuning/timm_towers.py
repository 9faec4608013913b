"""Towers of timm's vision transformers, alone and inside open_clip's SigLIP."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from features.encoders.base import Encoder
from features.encoders.timm_models import TimmEncoder
from features.errors import EncoderError
from features.tuning.hidden import Hidden, sequence
from features.tuning.tower import Part, Tower


class TimmTower(Tower):
    """timm's VisionTransformer.

    Args:
        encoder: Whose tower.
        trunk: timm's model.
        projection: What open_clip puts behind it; None for an encoder of timm alone.

    Raises:
        EncoderError: The trunk is no VisionTransformer.
    """

    def __init__(self, encoder: Encoder, trunk: Any, projection: nn.Module | None = None) -> None:
        from timm.models.vision_transformer import VisionTransformer  # noqa: PLC0415 - seconds of imports

        if type(trunk) is not VisionTransformer:
            raise EncoderError(f"its image tower is timm's {type(trunk).__name__}")
        blocks = [[block] for block in trunk.blocks]
        super().__init__(encoder, "image", blocks, [trunk.embed_dim] * (len(blocks) + 1))
        self._trunk: Any = trunk
        self._projection = projection

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, 3, H, W) -> (B, L, W), class token and registers first where there are any."""
        trunk = self._trunk
        typed = inputs if self._projection is not None else inputs.to(next(trunk.parameters()).dtype)
        states = trunk._pos_embed(trunk.patch_embed(typed))
        return sequence(trunk.norm_pre(trunk.patch_drop(states)))

    def _block(self, number: int, states: Tensor, context: None) -> Tensor:  # noqa: ARG002 - no mask
        out: Tensor = self._trunk.blocks[number](states)
        return out

    def head(self, hidden: Hidden) -> Tensor:
        """Final norm and pooling; and the projection where there is one."""
        states = self._trunk.norm(hidden.states)
        if self._projection is None:
            vectors: Tensor = self._trunk.forward_head(states, pre_logits=True).flatten(1)
        else:
            vectors = self._projection(self._trunk.forward_head(states))
        return vectors.float()

    def pooled(self, hidden: Hidden) -> Tensor:
        """The class token's state where that is the vector, else the patches' mean."""
        if self._trunk.global_pool == "token":
            return hidden.states[:, 0]
        return hidden.states[:, self._trunk.num_prefix_tokens :].mean(dim=1)

    def stem_parts(self) -> Sequence[Part]:
        """Patches, class token, registers, positions, first norm."""
        trunk = self._trunk
        tokens: list[Part] = [trunk.patch_embed, trunk.cls_token, trunk.reg_token, trunk.pos_embed]
        return [*tokens, trunk.pos_drop, trunk.patch_drop, trunk.norm_pre]

    def head_parts(self) -> Sequence[Part]:
        """Final norms, pooling, and the projection where there is one."""
        trunk = self._trunk
        return [trunk.norm, trunk.attn_pool, trunk.fc_norm, trunk.head, self._projection]


def timm_tower(encoder: TimmEncoder) -> Tower:
    """The tower of an encoder of timm.

    Raises:
        EncoderError: It is no vision transformer, or takes its vector elsewhere than its classifier does.
    """
    if encoder.options.layer is not None or encoder.options.pool != "model":
        raise EncoderError("its options take the vector at another place than its classifier")
    return TimmTower(encoder, encoder.model)
