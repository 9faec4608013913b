"""Attention whose projections are layers of their own, so that low-rank updates reach them."""

from collections.abc import Iterator
from contextlib import suppress
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class OpenAttention(nn.Module):
    """The self-attention of an `nn.MultiheadAttention`, on the same parameters.

    torch's module multiplies by its weights without calling a layer, so that nothing can be put around them.
    (peft's own way is to add the update to the frozen weights before every call and to subtract it after,
    which drifts with each step and leaves its dropout out.)

    Args:
        closed: Batch first, with one packed projection of queries, keys and values; parameters are shared.

    Raises:
        ValueError: ``closed`` is of another kind.
    """

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        super().__init__()
        packed, bias = closed.in_proj_weight, closed.in_proj_bias
        if not closed.batch_first or packed is None or closed.bias_k is not None or closed.add_zero_attn:
            raise ValueError("only packed, batch-first attention without extra keys can be opened.")
        self.closed = [closed]  # in a list, as it is no part of this module
        self.n_heads = closed.num_heads
        self.dropout = closed.dropout
        self.in_proj = nn.Linear(closed.embed_dim, len(packed), bias=bias is not None, device="meta")
        self.in_proj.weight = packed
        self.in_proj.bias = bias
        out = nn.Linear(
            closed.embed_dim, closed.embed_dim, bias=closed.out_proj.bias is not None, device="meta"
        )
        out.weight, out.bias = closed.out_proj.weight, closed.out_proj.bias
        self.out_proj = out
        self.train(closed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """(B, L, W) three times the same -> (B, L, W); ``attn_mask`` (L, L) is added to the logits.

        Raises:
            ValueError: Keys or values are not the queries, or weights are asked for.
        """
        if key is not query or value is not query or need_weights:
            raise ValueError("opened attention is self-attention, and gives no weights.")
        shape = (*query.shape[:2], 3, self.n_heads, -1)
        q, k, v = self.in_proj(query).reshape(shape).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out, None

    def close(self) -> nn.MultiheadAttention:
        """Torch's module again, on what the parameters are now."""
        closed = self.closed[0]
        closed.in_proj_weight, closed.in_proj_bias = self.in_proj.weight, self.in_proj.bias  # type: ignore[assignment]  # of torch's stubs
        closed.out_proj.weight, closed.out_proj.bias = self.out_proj.weight, self.out_proj.bias
        return closed.train(self.training)


def open_attention(root: nn.Module) -> None:
    """Replace each `nn.MultiheadAttention` below ``root`` that can be opened."""
    for parent, name, child in _children(root, nn.MultiheadAttention):
        with suppress(ValueError):
            setattr(parent, name, OpenAttention(child))


def close_attention(root: nn.Module) -> None:
    """Undo `open_attention`."""
    for parent, name, child in _children(root, OpenAttention):
        setattr(parent, name, child.close())


def _children(root: nn.Module, kind: type[ModuleT]) -> Iterator[tuple[nn.Module, str, ModuleT]]:
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                yield parent, name, child
