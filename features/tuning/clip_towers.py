"""Towers of open_clip: vision transformers, ResNets, and text transformers, causal or not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from features.encoders.clip import ClipEncoder
from features.errors import EncoderError
from features.tuning.hidden import Hidden, sequence
from features.tuning.timm_towers import TimmTower
from features.tuning.tower import Part, Tower, row_numbers


class ClipVitTower(Tower):
    """open_clip's VisionTransformer."""

    def __init__(self, encoder: ClipEncoder, visual: Any) -> None:
        blocks = visual.transformer.resblocks
        super().__init__(
            encoder, "image", [[b] for b in blocks], [visual.transformer.width] * (len(blocks) + 1)
        )
        self._visual = visual

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, 3, H, W) -> (B, P + 1, W), the class token first."""
        return sequence(self._visual._embeds(inputs))

    def _block(self, number: int, states: Tensor, context: None) -> Tensor:  # noqa: ARG002 - no mask
        out: Tensor = self._visual.transformer.resblocks[number](states)
        return out

    def finish(self, hidden: Hidden, start: int = 0) -> Tensor:
        """The last block for the class token alone, where the vector is made of it."""
        last = self.n_blocks - 1
        block = self._visual.transformer.resblocks[last]
        first = self._visual.pool_type == "tok" and self._visual.attn_pool is None
        if start > last or not first or not _is_plain(block):
            return super().finish(hidden, start)
        below = self.run(hidden, start, last)
        return self.head(below.with_states(_for_one_token(block, below.states, below.states[:, :1], None)))

    def head(self, hidden: Hidden) -> Tensor:
        """Pooling and final norm, in the tower's own order, then the projection."""
        vectors, _ = self._visual._pool(hidden.states)
        if self._visual.proj is not None:
            vectors = vectors @ self._visual.proj
        projected: Tensor = vectors
        return projected.float()

    def pooled(self, hidden: Hidden) -> Tensor:
        """The class token's state, or the patches' mean where the vector is made of all."""
        first = self._visual.pool_type == "tok" and self._visual.attn_pool is None
        return hidden.states[:, 0] if first else hidden.states[:, 1:].mean(dim=1)

    def stem_parts(self) -> Sequence[Part]:
        """Patches, class token, positions, first norm."""
        visual = self._visual
        embeddings: list[Part] = [visual.conv1, visual.class_embedding, visual.positional_embedding]
        return [*embeddings, visual.patch_dropout, visual.ln_pre]

    def head_parts(self) -> Sequence[Part]:
        """Attentional pooling where there is one, final norm, projection."""
        visual = self._visual
        contrastive = getattr(visual, "attn_pool_contrastive", None)
        return [visual.attn_pool, contrastive, visual.ln_post, visual.proj]


class ClipResNetTower(Tower):
    """open_clip's ModifiedResNet: its four stages are the blocks, its attention pooling is the head."""

    def __init__(self, encoder: ClipEncoder, visual: Any) -> None:
        self._stages = [visual.layer1, visual.layer2, visual.layer3, visual.layer4]
        widths = [visual.bn3.num_features, *(stage[-1].bn3.num_features for stage in self._stages)]
        super().__init__(encoder, "image", [[stage] for stage in self._stages], widths)
        self._visual = visual

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, 3, H, W) -> (B, C, H / 4, W / 4)."""
        states: Tensor = self._visual.stem(inputs)
        mask = torch.ones(len(states), 0, dtype=torch.bool, device=states.device)
        return Hidden(states, mask, torch.zeros(len(states), dtype=torch.int64, device=states.device))

    def _block(self, number: int, states: Tensor, context: None) -> Tensor:  # noqa: ARG002 - no mask
        out: Tensor = self._stages[number](states)
        return out

    def head(self, hidden: Hidden) -> Tensor:
        """Attention pooling, which ends in the projection."""
        vectors: Tensor = self._visual.attnpool(hidden.states)
        return vectors.float()

    def pooled(self, hidden: Hidden) -> Tensor:
        """The mean over all places of the map."""
        return hidden.states.mean(dim=(2, 3))

    def stem_parts(self) -> Sequence[Part]:
        """The three convolutions in front."""
        visual = self._visual
        return [visual.conv1, visual.bn1, visual.conv2, visual.bn2, visual.conv3, visual.bn3]

    def head_parts(self) -> Sequence[Part]:
        """The attention pooling."""
        return [self._visual.attnpool]


class ClipTextTower(Tower):
    """open_clip's text transformer, as CLIP holds it flat and CustomTextCLIP below ``text``."""

    def __init__(self, encoder: ClipEncoder, text: Any) -> None:
        blocks = text.transformer.resblocks
        super().__init__(encoder, "text", [[b] for b in blocks], [text.transformer.width] * (len(blocks) + 1))
        self._text = text
        self._pool = str(getattr(text, "text_pool_type", getattr(text, "pool_type", "")))
        self._end_id: Any = getattr(text, "text_eos_id", getattr(text, "eos_id", None))

    def stem(self, inputs: Tensor) -> Hidden:
        """(B, L) ids -> (B, L, W)."""
        text, length = self._text, inputs.shape[1]
        dtype = text.transformer.get_cast_dtype()
        states = text.token_embedding(inputs).to(dtype) + text.positional_embedding[:length].to(dtype)
        return Hidden(states, torch.ones_like(inputs, dtype=torch.bool), self._places(inputs))

    def _places(self, tokens: Tensor) -> Tensor:
        if self._pool == "argmax":
            return tokens.argmax(dim=1)
        if self._pool == "eos":
            return torch.eq(tokens, self._end_id).int().argmax(dim=1)
        place = 0 if self._pool == "first" else tokens.shape[1] - 1
        return torch.full((len(tokens),), place, dtype=torch.int64, device=tokens.device)

    def _context(self, hidden: Hidden) -> Tensor | None:
        """The causal mask; what follows a text's end, padding too, is never looked at."""
        length = hidden.states.shape[1]
        mask: Tensor | None = self._text.attn_mask
        return None if mask is None else mask[:length, :length]

    def _block(self, number: int, states: Tensor, context: Tensor | None) -> Tensor:
        out: Tensor = self._text.transformer.resblocks[number](states, attn_mask=context)
        return out

    def finish(self, hidden: Hidden, start: int = 0) -> Tensor:
        """The last block for the pooled token alone."""
        last = self.n_blocks - 1
        block = self._text.transformer.resblocks[last]
        if start > last or not _is_plain(block):
            return super().finish(hidden, start)
        below = self.run(hidden, start, last)
        mask = self._context(below)
        # (L, L) -> each row's own: what the pooled token may look at, for every head.
        own = None if mask is None else mask[below.at].repeat_interleave(block.attn.num_heads, 0)[:, None]
        states = _for_one_token(block, below.states, self.pooled(below)[:, None], own)
        return self.head(Hidden(states, below.mask[:, :1], torch.zeros_like(below.at)))

    def head(self, hidden: Hidden) -> Tensor:
        """Final norm and projection of the pooled token."""
        vectors = self._text.ln_final(self.pooled(hidden))
        projection = self._text.text_projection
        if isinstance(projection, nn.Module):
            vectors = projection(vectors)
        elif projection is not None:
            vectors = vectors @ projection
        projected: Tensor = vectors
        return projected.float()

    def pooled(self, hidden: Hidden) -> Tensor:
        """The state of the token that the tower pools: the end of text, the first or the last."""
        return hidden.states[row_numbers(hidden.states), hidden.at]

    def stem_parts(self) -> Sequence[Part]:
        """Words and positions."""
        return [self._text.token_embedding, self._text.positional_embedding]

    def head_parts(self) -> Sequence[Part]:
        """Final norm and projection."""
        return [self._text.ln_final, self._text.text_projection]


def _is_plain(block: Any) -> bool:
    """Whether a block is open_clip's own, neither checkpointed nor opened for low-rank updates."""
    from open_clip.transformer import ResidualAttentionBlock  # noqa: PLC0415 - seconds of imports

    plain = type(block) is ResidualAttentionBlock and "forward" not in vars(block)
    return plain and isinstance(block.attn, nn.MultiheadAttention) and block.attn.batch_first


def _for_one_token(block: Any, states: Tensor, token: Tensor, mask: Tensor | None) -> Tensor:
    """What a block makes of one token of each row, (B, 1, W), that looks at all of (B, L, W)."""
    normed = block.ln_1(states)
    looked = block.attention(q_x=block.ln_1(token), k_x=normed, v_x=normed, attn_mask=mask)
    token = token + block.ls_1(looked)
    out: Tensor = token + block.ls_2(block.mlp(block.ln_2(token)))
    return out


def clip_image_tower(encoder: ClipEncoder) -> Tower:
    """The image tower of an encoder of open_clip.

    Raises:
        EncoderError: It is of a kind that has no blocks to speak of here.
    """
    from open_clip.modified_resnet import ModifiedResNet  # noqa: PLC0415 - seconds of imports
    from open_clip.timm_model import TimmModel  # noqa: PLC0415 - seconds of imports
    from open_clip.transformer import VisionTransformer  # noqa: PLC0415 - seconds of imports

    visual: Any = encoder.model.visual
    if isinstance(visual, VisionTransformer):
        return ClipVitTower(encoder, visual)
    if isinstance(visual, ModifiedResNet) and visual.attnpool is not None:
        return ClipResNetTower(encoder, visual)
    if isinstance(visual, TimmModel):
        return TimmTower(encoder, visual.trunk, projection=visual.head)
    raise EncoderError(f"its image tower is a {type(visual).__name__}")


def clip_text_tower(encoder: ClipEncoder) -> Tower:
    """The text tower of an encoder of open_clip.

    Raises:
        EncoderError: It appends a token, masks padding, or is a model of transformers.
    """
    text: Any = getattr(encoder.model, "text", encoder.model)
    appended = getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False)
    if not hasattr(text, "token_embedding") or appended:
        what = "appends a token or masks padding" if appended else f"is a {type(text).__name__}"
        raise EncoderError(f"its text tower {what}")
    pool = str(getattr(text, "text_pool_type", getattr(text, "pool_type", "")))
    if pool not in ("argmax", "eos", "first", "last"):
        raise EncoderError(f"its text tower pools {pool!r}")
    return ClipTextTower(encoder, text)
