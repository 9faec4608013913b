"""The loss that MGCN and SMORE share: behavioural embeddings plus sides made of modalities, kept alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from recommenders.info_nce import info_nce
from recommenders.losses import bpr_loss, half_squared_norm, pair_scores
from recommenders.models.base import batch_items, rows_of, unit_rows
from recommenders.sampling import Batch

Propagated = tuple[Tensor, list[Tensor], list[Tensor]]
"""(U + I, D) behavioural embeddings, users first; by part (U, D) of the users and (I, D) of the items."""


class SideLossConfig(Protocol):
    """Settings that the loss reads."""

    @property
    def contrast_weight(self) -> float:
        """Of the contrast between sides and behaviour."""
        ...

    @property
    def temperature(self) -> float:
        """Of the contrast."""
        ...

    @property
    def l2(self) -> float:
        """Of the batch's own embeddings."""
        ...


def side_loss(
    batch: Batch,
    embeddings: Tensor,
    propagated: Propagated,
    side: Callable[[Tensor, Sequence[Tensor]], Tensor],
    config: SideLossConfig,
) -> Tensor:
    """Return BPR, contrast and L2; what is done row by row is done for the batch's rows alone.

    Args:
        batch: Users, positive and negative items.
        embeddings: (U + I, D) the nodes' own, users first.
        propagated: What the graphs made of them.
        side: (R, D) behaviour and parts of R users or items -> (R, D) what is added to the behaviour.
        config: Weights.
    """
    behaviour, user_parts, item_parts = propagated
    n_users = len(user_parts[0])
    item_rows = batch_items(batch)
    user_rows, user_places = torch.unique(batch.users, return_inverse=True)
    rows, places = torch.unique(item_rows, return_inverse=True)
    # One gather for both ends: the backward of each fills a table of all nodes with zeros.
    taken = rows_of(behaviour, torch.cat([user_rows, n_users + rows]))
    users, items = taken[: len(user_rows)], taken[len(user_rows) :]
    side_users = side(users, [rows_of(part, user_rows) for part in user_parts])
    side_items = side(items, [rows_of(part, rows) for part in item_parts])
    scores = pair_scores(rows_of(users + side_users, user_places), rows_of(items + side_items, places))
    loss = bpr_loss(scores)
    if config.contrast_weight:
        positives = torch.unique(places[:, 0])
        pairs = [(side_users, users), (rows_of(side_items, positives), rows_of(items, positives))]
        contrast = torch.stack(
            [info_nce(unit_rows(own), unit_rows(other), config.temperature) for own, other in pairs]
        )
        loss = loss + config.contrast_weight * contrast.sum()
    own = rows_of(embeddings, torch.cat([batch.users, n_users + item_rows.flatten()]))
    return loss + config.l2 / len(batch.users) * half_squared_norm(own)
