"""CLIP's two towers in NumPy, from a state_dict (Radford et al., 2021; Dosovitskiy et al., 2021)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

Weights = Mapping[str, np.ndarray]
Activation = Callable[[np.ndarray], np.ndarray]

_erf = np.vectorize(math.erf)


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def quick_gelu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-1.702 * x))


def layer_norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def attend(x: np.ndarray, weights: Weights, name: str, n_heads: int, *, causal: bool) -> np.ndarray:
    """One sequence (L, W), head by head."""
    width = x.shape[1]
    size = width // n_heads
    q, k, v = np.split(x @ weights[f"{name}.in_proj_weight"].T + weights[f"{name}.in_proj_bias"], 3, axis=1)
    out = np.zeros_like(x)
    for head in range(n_heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        if causal:
            scores[np.triu_indices(len(x), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, part] = shares / shares.sum(axis=1, keepdims=True) @ v[:, part]
    return out @ weights[f"{name}.out_proj.weight"].T + weights[f"{name}.out_proj.bias"]


def transform(
    x: np.ndarray, weights: Weights, name: str, n_heads: int, activation: Activation, *, causal: bool
) -> np.ndarray:
    layer = 0
    while f"{name}.resblocks.{layer}.ln_1.weight" in weights:
        block = f"{name}.resblocks.{layer}"
        x = x + attend(
            layer_norm(x, weights, f"{block}.ln_1"), weights, f"{block}.attn", n_heads, causal=causal
        )
        hidden = layer_norm(x, weights, f"{block}.ln_2") @ weights[f"{block}.mlp.c_fc.weight"].T
        hidden = activation(hidden + weights[f"{block}.mlp.c_fc.bias"])
        x = x + hidden @ weights[f"{block}.mlp.c_proj.weight"].T + weights[f"{block}.mlp.c_proj.bias"]
        layer += 1
    return x


def plain_image_features(
    pixels: np.ndarray, weights: Weights, n_heads: int, activation: Activation
) -> np.ndarray:
    """(3, H, W) -> (D,)."""
    kernel = weights["visual.conv1.weight"]  # (W, 3, P, P)
    side = kernel.shape[-1]
    rows, columns = pixels.shape[1] // side, pixels.shape[2] // side
    patches = [
        kernel.reshape(len(kernel), -1)
        @ pixels[:, r * side : (r + 1) * side, c * side : (c + 1) * side].ravel()
        for r in range(rows)
        for c in range(columns)
    ]
    x = np.stack([weights["visual.class_embedding"], *patches]) + weights["visual.positional_embedding"]
    x = layer_norm(x, weights, "visual.ln_pre")
    x = transform(x, weights, "visual.transformer", n_heads, activation, causal=False)
    return layer_norm(x, weights, "visual.ln_post")[0] @ weights["visual.proj"]


def plain_text_features(
    tokens: np.ndarray, weights: Weights, n_heads: int, activation: Activation
) -> np.ndarray:
    """(L,) padded to the whole context length -> (D,), taken where the id is highest."""
    x = weights["token_embedding.weight"][tokens] + weights["positional_embedding"]
    x = transform(x, weights, "transformer", n_heads, activation, causal=True)
    return layer_norm(x, weights, "ln_final")[int(tokens.argmax())] @ weights["text_projection"]
