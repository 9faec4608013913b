"""Who liked what: pairs of user and item rows, and their three-way split."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

PARTS = ("train", "valid", "test")
"""Names of the parts of a split, in the order of their labels 0, 1, 2."""

Int64Array = NDArray[np.int64]
Float32Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Interactions:
    """Pairs of one user and one item, each with a time and a rating where they are known.

    Rows count from 0 in the dataset's agreed order of users and items. A pair may occur more than once
    (a user who bought twice); whoever needs a set takes ``csr()`` or ``keys()``.

    Raises:
        ValueError: Arrays of unequal length, or a row outside of ``n_users`` or ``n_items``.
    """

    user_rows: Int64Array
    """(E,) user of each pair."""
    item_rows: Int64Array
    """(E,) item of each pair."""
    n_users: int
    n_items: int
    timestamps: Int64Array | None = None
    """(E,) time of each pair in a unit that orders them, or None where the data has no times."""
    ratings: Float32Array | None = None
    """(E,) or None."""

    def __post_init__(self) -> None:
        """Store contiguous int64 and float32 arrays and check them, so that no reader has to."""
        columns = {
            "user_rows": np.int64,
            "item_rows": np.int64,
            "timestamps": np.int64,
            "ratings": np.float32,
        }
        for name, dtype in columns.items():
            if getattr(self, name) is None:
                continue
            values = np.ascontiguousarray(getattr(self, name), dtype=dtype)
            if values.ndim != 1 or len(values) != len(self.user_rows):
                raise ValueError(
                    f"{name} has shape {values.shape}; expected (E,) = ({len(self.user_rows)},)."
                )
            object.__setattr__(self, name, values)  # a frozen dataclass is set up this way; its only write
        _check_rows("user_rows", self.user_rows, self.n_users)
        _check_rows("item_rows", self.item_rows, self.n_items)

    def __len__(self) -> int:
        return len(self.user_rows)

    def take(self, which: NDArray[np.bool_] | Int64Array) -> Interactions:
        """Return the pairs that a mask (E,) or an array of positions names, in that order."""
        return Interactions(
            self.user_rows[which],
            self.item_rows[which],
            self.n_users,
            self.n_items,
            None if self.timestamps is None else self.timestamps[which],
            None if self.ratings is None else self.ratings[which],
        )

    def plus(self, other: Interactions) -> Interactions:
        """Return these pairs followed by those of ``other``, without times and ratings."""
        return Interactions(
            np.concatenate([self.user_rows, other.user_rows]),
            np.concatenate([self.item_rows, other.item_rows]),
            self.n_users,
            self.n_items,
        )

    def keys(self) -> Int64Array:
        """Return the (E',) sorted and unique ``user * n_items + item``: the set of pairs as one array."""
        keys = np.sort(self.user_rows * self.n_items + self.item_rows)
        new = np.ones(len(keys), dtype=np.bool_)
        new[1:] = keys[1:] != keys[:-1]
        distinct: Int64Array = keys[new]  # as np.unique, which takes 6 times as long (NumPy 2.4)
        return distinct

    def csr(self) -> sparse.csr_matrix:
        """Return the (n_users, n_items) float32 matrix, 1 at each pair, columns sorted, repeats once."""
        users, items = np.divmod(self.keys(), max(self.n_items, 1))
        starts = np.searchsorted(users, np.arange(self.n_users + 1))
        ones = np.ones(len(items), dtype=np.float32)
        return sparse.csr_matrix((ones, items, starts), shape=(self.n_users, self.n_items))

    def items_per_user(self) -> Int64Array:
        """Return the (n_users,) number of pairs of each user."""
        return np.bincount(self.user_rows, minlength=self.n_users)

    def users_per_item(self) -> Int64Array:
        """Return the (n_items,) number of pairs of each item."""
        return np.bincount(self.item_rows, minlength=self.n_items)


@dataclass(frozen=True, eq=False)
class Split:
    """Training, validation and test pairs over the same users and items."""

    train: Interactions
    valid: Interactions
    test: Interactions
    rule: str
    """Name of the splitting rule, for people; the fingerprint does not depend on it."""

    def __post_init__(self) -> None:
        """Check that the three parts are about the same users and items."""
        sizes = {(part.n_users, part.n_items) for part in (self.train, self.valid, self.test)}
        if len(sizes) != 1:
            raise ValueError(f"Parts of a split have (n_users, n_items) {sorted(sizes)}; expected one size.")

    @property
    def n_users(self) -> int:
        """Number of users, those without any pair included."""
        return self.train.n_users

    @property
    def n_items(self) -> int:
        """Number of items, those without any pair included."""
        return self.train.n_items

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pairs of each part: equal splits of equal rows, whatever their order and dtype."""
        digest = hashlib.sha256(f"tandem split 1|{self.n_users}|{self.n_items}".encode())
        for name, part in (("train", self.train), ("valid", self.valid), ("test", self.test)):
            # Repeated pairs count: a sorted list, not a set. Little-endian, so that machines agree.
            keys = np.sort(part.user_rows * self.n_items + part.item_rows).astype("<i8")
            digest.update(f"|{name}|{len(keys)}|".encode())
            digest.update(keys.tobytes())
        return digest.hexdigest()

    def summary(self) -> dict[str, int]:
        """Count the parts, and what their evaluation has to face: users and items that training never saw."""
        trained_user = self.train.items_per_user() > 0
        trained_item = self.train.users_per_item() > 0
        counts = {
            "n_users": self.n_users,
            "n_items": self.n_items,
            "n_train": len(self.train),
            "n_valid": len(self.valid),
            "n_test": len(self.test),
            "users_without_train": int((~trained_user).sum()),
            "items_without_train": int((~trained_item).sum()),
        }
        for name, part in (("valid", self.valid), ("test", self.test)):
            counts[f"{name}_users"] = int((part.items_per_user() > 0).sum())
            counts[f"{name}_pairs_of_cold_users"] = int((~trained_user[part.user_rows]).sum())
            counts[f"{name}_pairs_of_cold_items"] = int((~trained_item[part.item_rows]).sum())
        return counts


def _check_rows(name: str, rows: Int64Array, size: int) -> None:
    """Refuse rows outside of 0 .. size - 1."""
    if len(rows) and (rows.min() < 0 or rows.max() >= size):
        raise ValueError(
            f"{name} holds {int(rows.min())} to {int(rows.max())}; expected rows from 0 to {size - 1}."
        )
