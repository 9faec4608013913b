"""VLMo's network: shared attention, an expert for each modality (Bao et al., 2022, arXiv 2111.02358).

Module names are those of the released checkpoints, so that weights load without a table of names.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, normalize, scaled_dot_product_attention

from features.encoders.vlmo.config import VlmoConfig
from features.encoders.vlmo.positions import image_index, joint_index, text_index

Expert = Literal["text", "imag", "vl"]
Head = Literal["itc", "itc_vl", "pooler", "itm", "mlm"]
HEADS: tuple[Head, ...] = ("itc", "itc_vl", "pooler", "itm", "mlm")

_BLOCK_EPS = 1e-6
_TEXT_EPS = 1e-12
_INITIAL_SCALE = 0.1
_INITIAL_STD = 0.02
_INVERSE_TEMPERATURE = 1 / 0.07


class Attention(nn.Module):
    """Self-attention with a position bias; keys have no bias of their own, as it would cancel."""

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        width = config.width
        self.n_heads = config.n_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """(B, n, D) -> (B, n, D); ``bias`` broadcasts to (B, H, n, n) and is added to the scaled logits."""
        shape = (*hidden.shape[:2], 3, self.n_heads, -1)
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if type(self.qkv) is nn.Linear:
            qkv = linear(hidden, self.qkv.weight, qkv_bias)
        else:  # wrapped, as by a low-rank adapter, which works in its forward
            qkv = self.qkv(hidden) + qkv_bias
        qkv = qkv.reshape(shape).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], attn_mask=bias)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected


class Mlp(nn.Module):
    """One expert: two layers with an exact GELU between them."""

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.mlp_width)
        self.fc2 = nn.Linear(config.mlp_width, config.width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.fc2(gelu(self.fc1(hidden)))
        return out


class Block(nn.Module):
    """Pre-norm attention, shared by all modalities, then the expert of one."""

    def __init__(self, config: VlmoConfig, number: int) -> None:
        super().__init__()
        self.drop_path = config.drop_path * number / max(config.depth - 1, 1)
        self.norm1 = nn.LayerNorm(config.width, eps=_BLOCK_EPS)
        self.attn = Attention(config)
        self.experts: tuple[Expert, ...] = (
            ("text", "imag", "vl") if number >= config.vl_start else ("text", "imag")
        )
        for expert in self.experts:
            self.add_module(f"norm2_{expert}", nn.LayerNorm(config.width, eps=_BLOCK_EPS))
            self.add_module(f"mlp_{expert}", Mlp(config))
        if config.layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((config.width,), _INITIAL_SCALE))
            self.gamma_2 = nn.Parameter(torch.full((config.width,), _INITIAL_SCALE))
        else:
            self.register_parameter("gamma_1", None)
            self.register_parameter("gamma_2", None)

    def forward(self, hidden: Tensor, bias: Tensor | None, expert: Expert, n_text: int = 0) -> Tensor:
        """(B, n, D) -> (B, n, D).

        Args:
            hidden: Tokens of a text, of a picture, or of a text followed by a picture.
            bias: See `Attention`.
            expert: The one for all tokens, or for those after the text's.
            n_text: How many tokens in front go through the text expert instead, padding included.
        """
        hidden = hidden + self._branch(self.attn(self.norm1(hidden), bias), self.gamma_1)
        if n_text:
            text = self._expert(hidden[:, :n_text], "text")
            return torch.cat([text, self._expert(hidden[:, n_text:], expert)], dim=1)
        return self._expert(hidden, expert)

    def _expert(self, hidden: Tensor, expert: Expert) -> Tensor:
        norm, mlp = self.get_submodule(f"norm2_{expert}"), self.get_submodule(f"mlp_{expert}")
        return hidden + self._branch(mlp(norm(hidden)), self.gamma_2)

    def _branch(self, update: Tensor, scale: Tensor | None) -> Tensor:
        """Layer scale, and stochastic depth by sample while training."""
        scaled = update if scale is None else scale * update
        if not self.training or self.drop_path == 0:
            return scaled
        kept = torch.rand(len(scaled), 1, 1, device=scaled.device) >= self.drop_path
        return scaled * kept.to(scaled.dtype) / (1 - self.drop_path)


class TextEmbeddings(nn.Module):
    """Words, BERT's own segment row, and absolute positions where the variant has them."""

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.width)
        self.token_type_embeddings = nn.Embedding(2, config.width)
        self.position_embeddings = None if config.relative else nn.Embedding(config.text_length, config.width)
        self.LayerNorm = nn.LayerNorm(config.width, eps=_TEXT_EPS)
        self.dropout = config.drop_path

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) -> (B, L, D)."""
        hidden: Tensor = self.word_embeddings(tokens) + self.token_type_embeddings.weight[0]
        if self.position_embeddings is not None:
            hidden = hidden + self.position_embeddings.weight[: tokens.shape[1]]
        return nn.functional.dropout(self.LayerNorm(hidden), self.dropout, self.training)


class Transformer(nn.Module):
    """The patches' embedding, the blocks and the final norm."""

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = (
            None if config.relative else nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.width))
        )
        self.patch_embed = nn.ModuleDict(
            {"proj": nn.Conv2d(3, config.width, config.patch_px, config.patch_px)}
        )
        self.blocks = nn.ModuleList(Block(config, number) for number in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=_BLOCK_EPS)

    def embed(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P + 1, D), the class token first."""
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)
        return hidden if self.pos_embed is None else hidden + self.pos_embed


class _Named(nn.Module):
    """A linear layer under the name ``fc`` or ``dense``, as the checkpoints have it."""

    def __init__(self, name: str, n_in: int, n_out: int, *, bias: bool) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(n_in, n_out, bias=bias))
        self._name = name

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.get_submodule(self._name)(hidden)
        return out


class _WordHead(nn.Module):
    """Masked language head: dense, GELU, norm, and a decoder that is not tied to the word embeddings."""

    def __init__(self, config: VlmoConfig) -> None:
        super().__init__()
        self.transform = nn.ModuleDict(
            {
                "dense": nn.Linear(config.width, config.width),
                "LayerNorm": nn.LayerNorm(config.width, eps=_TEXT_EPS),
            }
        )
        self.decoder = nn.Linear(config.width, config.vocabulary, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocabulary))

    def forward(self, hidden: Tensor) -> Tensor:
        transformed = self.transform["LayerNorm"](gelu(self.transform["dense"](hidden)))
        out: Tensor = self.decoder(transformed) + self.bias
        return out


@dataclass(frozen=True)
class Towers:
    """What the single-modality passes leave, before the final norm."""

    own: Tensor
    """(B, n, D): the modality's own expert in all blocks."""
    vl: Tensor | None
    """(B, n, D): the vision-language expert in the last blocks; None where it was not asked for."""


class Vlmo(nn.Module):
    """Image pass, text pass and fused pass, with the heads that a checkpoint has.

    Args:
        config: Sizes.
        heads: Which heads to make.
    """

    def __init__(self, config: VlmoConfig, heads: tuple[Head, ...] = HEADS) -> None:
        super().__init__()
        self.config = config
        self.heads = heads
        width = config.width
        self.transformer = Transformer(config)
        self.text_embeddings = TextEmbeddings(config)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.relative_position_bias_table = (
            nn.Parameter(torch.zeros(config.table_rows, config.depth * config.n_heads))
            if config.relative
            else None
        )
        if "pooler" in heads:
            self.pooler = _Named("dense", width, width, bias=True)
        for head, kind in (("itc", ""), ("itc_vl", "_vl")):
            if head in heads:
                self.add_module(f"itc{kind}_text_proj", _Named("fc", width, width, bias=False))
                self.add_module(f"itc{kind}_image_proj", _Named("fc", width, width, bias=False))
                scale = nn.Parameter(torch.tensor(_INVERSE_TEMPERATURE).log())
                self.register_parameter(f"logit{kind}_scale", scale)
        if "itm" in heads:
            self.itm_score = _Named("fc", width, 2, bias=True)
        if "mlm" in heads:
            self.mlm_score = _WordHead(config)
        self._biases: dict[tuple[str, bool, tuple[object, ...]], Tensor] = {}

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Fill in the values that training starts from: normal of spread 0.02, norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if name.endswith(("gamma_1", "gamma_2")) or "logit" in name:
                continue
            if parameter.ndim == 1:
                nn.init.constant_(
                    parameter, 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
                )
            elif name == "relative_position_bias_table":
                nn.init.zeros_(parameter)
            else:
                nn.init.trunc_normal_(parameter, std=_INITIAL_STD, generator=generator)

    def image_pass(self, pixels: Tensor, *, vl: bool = False) -> Towers:
        """(B, 3, H, W) -> tokens of the picture alone, P + 1 a picture."""
        hidden = self.transformer.embed(pixels) + self.token_type_embeddings.weight[1]
        return self._towers(hidden, self.bias("image", 0), None, "imag", vl=vl)

    def text_pass(self, tokens: Tensor, mask: Tensor, *, vl: bool = False) -> Towers:
        """(B, L) ids and mask (true for real tokens) -> tokens of the text alone."""
        hidden = self.text_embeddings(tokens) + self.token_type_embeddings.weight[0]
        return self._towers(
            hidden, self.bias("text", tokens.shape[1]), hiding_of(mask, hidden), "text", vl=vl
        )

    def _towers(
        self, hidden: Tensor, biases: list[Tensor] | None, hiding: Tensor | None, expert: Expert, *, vl: bool
    ) -> Towers:
        start = self.config.vl_start
        branch = hidden
        for number, block in enumerate(self.transformer.blocks):
            branch = hidden if number == start else branch
            hidden = block(hidden, added_of(biases, number, hiding), expert)
        if not vl:
            return Towers(hidden, None)
        if start == len(self.transformer.blocks):
            raise ValueError("this VLMo has no vision-language experts")
        for number in range(start, self.config.depth):
            branch = self.transformer.blocks[number](branch, added_of(biases, number, hiding), "vl")
        return Towers(hidden, branch)

    def joint_pass(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """(B, 3, H, W), (B, L) ids and mask -> (B, L + P + 1, D) normed tokens, the text's first."""
        text = self.text_embeddings(tokens) + self.token_type_embeddings.weight[0]
        image = self.transformer.embed(pixels) + self.token_type_embeddings.weight[1]
        n_text = tokens.shape[1]
        hidden = torch.cat([text, image], dim=1)
        hiding = hiding_of(
            torch.cat([mask.bool(), mask.new_ones(image.shape[:2], dtype=torch.bool)], dim=1), hidden
        )
        biases = self.bias("joint", n_text)
        for number, block in enumerate(self.transformer.blocks):
            fused = number >= self.config.vl_start
            added = added_of(biases, number, hiding)
            hidden = block(hidden, added, "vl") if fused else block(hidden, added, "imag", n_text)
        normed: Tensor = self.transformer.norm(hidden)
        return normed

    def first(self, hidden: Tensor) -> Tensor:
        """(B, n, D) before the final norm -> (B, D): the class token behind it."""
        norm = self.transformer.norm
        return layer_norm(hidden[:, 0], norm.normalized_shape, norm.weight, norm.bias, norm.eps)

    def image_embedding(self, towers: Towers, *, vl: bool = False) -> Tensor:
        """(B, D) contrastive embedding of a picture, not of unit length."""
        return self._embedding("image", towers, vl=vl)

    def text_embedding(self, towers: Towers, *, vl: bool = False) -> Tensor:
        """(B, D) contrastive embedding of a text, not of unit length."""
        return self._embedding("text", towers, vl=vl)

    def _embedding(self, modality: str, towers: Towers, *, vl: bool) -> Tensor:
        hidden = towers.vl if vl else towers.own
        if hidden is None:
            raise ValueError("the pass was run without its vision-language part")
        head = self.get_submodule(f"itc{'_vl' if vl else ''}_{modality}_proj")
        embedding: Tensor = head(self.first(hidden))
        return embedding

    def pooled(self, joint: Tensor) -> Tensor:
        """(B, L + P + 1, D) of `joint_pass` -> (B, D)."""
        return torch.tanh(self.pooler(joint[:, 0]))

    def unit(self, embedding: Tensor) -> Tensor:
        """(B, D) of length 1, as the contrastive loss compares them."""
        return normalize(embedding, dim=-1, eps=0.0)

    def bias(self, kind: Literal["image", "text", "joint"], n_text: int) -> list[Tensor] | None:
        """N biases that broadcast to (B, H, n, n); without gradients they are gathered once and kept."""
        table = self.relative_position_bias_table
        if table is None:
            return None
        if torch.is_grad_enabled() and table.requires_grad:
            return list(self._gather(table, kind, n_text).unbind())
        longest = max(n_text, self.config.text_length)
        # A training step, a cast or a move changes one of these; an old bias is then never found again.
        version = (table.data_ptr(), table._version, table.dtype, table.device, longest)
        key = (kind, torch.is_inference_mode_enabled(), version)
        if key not in self._biases:
            if any(known[2] != version for known in self._biases):
                self._biases.clear()
            self._biases[key] = self._gather(table.detach(), kind, longest)
        whole = self._biases[key]
        if kind == "text":
            whole = whole[..., :n_text, :n_text]
        elif kind == "joint" and n_text < longest:
            kept = torch.arange(whole.shape[-1], device=whole.device)
            kept = torch.cat([kept[:n_text], kept[longest:]])
            whole = whole[..., kept[:, None], kept]
        return list(whole.unbind())

    def _gather(self, table: Tensor, kind: str, n_text: int) -> Tensor:
        """(N, 1, H, n, n); table columns are block by block, head by head."""
        if kind == "image":
            index = image_index(self.config)
        else:
            index = (text_index if kind == "text" else joint_index)(self.config, n_text)
        rows = table[index.to(table.device).flatten()]
        shaped = rows.reshape(*index.shape, self.config.depth, 1, self.config.n_heads)
        return shaped.permute(2, 3, 4, 0, 1).contiguous()

    def __getstate__(self) -> dict[str, object]:
        """Copies start without the kept biases."""
        return self.__dict__ | {"_biases": {}}


def hiding_of(mask: Tensor, hidden: Tensor) -> Tensor | None:
    """(B, 1, 1, n) that takes padded keys out of every softmax; None where there is no padding."""
    if mask.device.type == "cpu" and bool(mask.all()):  # asking a GPU would wait for it
        return None
    hiding = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device)
    return hiding.masked_fill_(~mask.bool(), -torch.inf)[:, None, None, :]


def added_of(biases: list[Tensor] | None, number: int, hiding: Tensor | None) -> Tensor | None:
    """What block ``number`` adds to its attention logits: its bias, what hides the padding, both or None."""
    if biases is None:
        return hiding
    return biases[number] if hiding is None else biases[number] + hiding
