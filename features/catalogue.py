"""The items in their agreed order: id, picture, texts, and the hashes of what an encoder will see."""

import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

import polars as pl
from pydantic import BaseModel, Field, PositiveInt

from features.errors import FeatureError
from features.texts import clean_text

Modality = Literal["image", "text", "fused"]

Presence = Literal["present", "missing", "unreadable"]
"""Whether an item has something to encode; `unreadable` has a picture that could not be read at import."""

_SHA256_HEX = r"^[0-9a-f]{64}$"


class TextConfig(BaseModel, frozen=True, extra="forbid"):
    """Which text of an item is encoded."""

    fields: tuple[str, ...] = Field(
        ("title", "description"), min_length=1, description="Columns of the catalogue, joined in this order."
    )
    separator: str = Field(" ", description="What stands between two fields.")
    max_chars: PositiveInt = Field(20_000, description="Characters kept of an item's joined, cleaned text.")


@dataclass(frozen=True)
class Contents:
    """What one modality has to encode: columns of equal length, a row an item, in the catalogue's order."""

    modality: Modality
    item_ids: list[str]
    hashes: list[str | None]
    """SHA-256 in hex of the picture's bytes, of the cleaned text, or of both; None: nothing to encode."""
    images: list[str | None]
    """Path of the picture, relative to the catalogue's `image_root`; None for the modality `text`."""
    image_hashes: list[str | None]
    """SHA-256 in hex that the picture's bytes must have; None for the modality `text`."""
    texts: list[str | None]
    """Cleaned text; None for the modality `image`."""
    presence: list[Presence]
    reasons: list[str | None]
    """Why a row has no hash."""

    def __len__(self) -> int:
        return len(self.item_ids)

    def fingerprint(self) -> str:
        """SHA-256 over all rows' ids and hashes: all of a catalogue that can change its features."""
        digest = hashlib.sha256(self.modality.encode())
        for item_id, content_hash, presence in zip(self.item_ids, self.hashes, self.presence, strict=True):
            name = item_id.encode()
            digest.update(b"%d:%b=%b;" % (len(name), name, (content_hash or presence).encode()))
        return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Catalogue:
    """All items of a dataset in their agreed order.

    Args:
        items: A row an item: `item_id` (unique), `image` (path relative to `image_root`, or null),
            `image_hash` (SHA-256 in hex of the picture's bytes, null where it has none or could not be
            read), and any columns of text. `image` and `image_hash` may be left out.
        image_root: Local folder or fsspec URL; "" where no item has a picture.

    Raises:
        FeatureError: A column is missing or of the wrong type, an id is null, empty or there twice, a
            picture's path leaves `image_root`, or a hash is not SHA-256 in hex.
    """

    items: pl.DataFrame
    image_root: str = ""
    _contents: dict[tuple[Modality, TextConfig], Contents] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        items = self.items
        for column in ("image", "image_hash"):
            if column not in items.columns:
                items = items.with_columns(pl.lit(None, dtype=pl.String).alias(column))
            elif items[column].dtype in {pl.Null, pl.String}:
                items = items.with_columns(pl.col(column).cast(pl.String).replace("", None))
        _check_items(items)
        _check_pictures(items, self.image_root)
        object.__setattr__(self, "items", items)

    def __len__(self) -> int:
        return self.items.height

    @property
    def item_ids(self) -> list[str]:
        """The ids in the agreed order."""
        ids: list[str] = self.items["item_id"].to_list()
        return ids

    def texts(self, config: TextConfig | None = None) -> list[str | None]:
        """Each item's fields, cleaned, joined and cut; None where nothing is left.

        Raises:
            FeatureError: A field is no column of the catalogue, or does not hold texts.
        """
        config = config or TextConfig()
        columns = [_text_column(self.items, name) for name in config.fields]
        texts: list[str | None] = []
        for row in zip(*columns, strict=True):
            cleaned = (clean_text(value) for value in row if value)
            joined = config.separator.join(value for value in cleaned if value)
            texts.append(joined[: config.max_chars].strip() or None)
        return texts

    def contents(self, modality: Modality, text: TextConfig | None = None) -> Contents:
        """What there is to encode of each item; worked out once and kept, as cleaning texts takes its time.

        A fused content needs both a picture and a text; its hash is the SHA-256 of the two hashes.
        """
        key = (modality, text or TextConfig())
        if key not in self._contents:
            self._contents[key] = self._work_out(*key)
        return self._contents[key]

    def fingerprint(self, modality: Modality, text: TextConfig | None = None) -> str:
        """SHA-256 of all that can change the features of one modality: ids, their order, and contents.

        Another split of the same items, another folder for the same pictures or another column that is not
        encoded leaves it as it is.
        """
        return self.contents(modality, text).fingerprint()

    def _work_out(self, modality: Modality, config: TextConfig) -> Contents:
        nothing: list[str | None] = [None] * len(self)
        images: list[str | None] = nothing
        image_hashes: list[str | None] = nothing
        texts, text_hashes = nothing, nothing
        if modality != "text":
            images = self.items["image"].to_list()
            image_hashes = self.items["image_hash"].to_list()
        if modality != "image":
            texts = self.texts(config)
            text_hashes = [value and _sha256(value.encode()) for value in texts]
        hashes: list[str | None] = []
        presence: list[Presence] = []
        reasons: list[str | None] = []
        for image, image_hash, text_hash in zip(images, image_hashes, text_hashes, strict=True):
            state, reason = _presence(modality, image, image_hash, text_hash)
            presence.append(state)
            reasons.append(reason)
            if state != "present":
                hashes.append(None)
            elif modality == "fused":
                hashes.append(_sha256(f"{image_hash}+{text_hash}".encode()))
            else:
                hashes.append(image_hash or text_hash)
        return Contents(modality, self.item_ids, hashes, images, image_hashes, texts, presence, reasons)


def _presence(
    modality: Modality, image: str | None, image_hash: str | None, text_hash: str | None
) -> tuple[Presence, str | None]:
    """Whether an item has all that the modality needs, and else what it lacks."""
    lacks = []
    if modality != "text" and not image:
        lacks.append("no picture")
    if modality != "image" and not text_hash:
        lacks.append("no text")
    if lacks:
        return "missing", " and ".join(lacks)
    if modality != "text" and not image_hash:
        return "unreadable", "the picture could not be read when the dataset was imported"
    return "present", None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _check_items(items: pl.DataFrame) -> None:
    """Refuse what would make rows ambiguous."""
    if "item_id" not in items.columns:
        raise FeatureError(
            f"the catalogue has no column item_id, only {', '.join(items.columns) or 'none at all'}; "
            "name the column of the items' ids in the importer's settings."
        )
    if items["item_id"].dtype != pl.String:
        raise FeatureError(
            f"the catalogue's column item_id holds {items['item_id'].dtype}; expected strings; "
            "cast it, so that 1 and '01' stay what they are."
        )
    n_empty = items["item_id"].null_count() + (items["item_id"] == "").sum()
    if n_empty:
        raise FeatureError(f"{n_empty} of {items.height} items have no id; drop them or give them one.")
    repeated = items.filter(pl.col("item_id").is_duplicated())["item_id"].unique(maintain_order=True)
    if repeated.len():
        raise FeatureError(
            f"{repeated.len()} item ids are there more than once, first {repeated[0]!r}; expected one row an "
            "item; drop or merge the doubles."
        )


def _check_pictures(items: pl.DataFrame, image_root: str) -> None:
    """Refuse paths that could lead outside `image_root` and hashes that nothing can have."""
    for column in ("image", "image_hash"):
        if items[column].dtype != pl.String:
            raise FeatureError(
                f"the catalogue's column {column} holds {items[column].dtype}; expected strings or nulls."
            )
    images = items.filter(pl.col("image").is_not_null())
    if images.height and not image_root:
        raise FeatureError(
            f"{images.height} items name a picture, first {images['image'][0]!r} of item "
            f"{images['item_id'][0]!r}, but the catalogue has no image_root; say in which folder they lie."
        )
    for item_id, path in images.select("item_id", "image").iter_rows():
        if leaves_folder(path):
            raise FeatureError(
                f"the picture of item {item_id!r} is {path!r}, which leaves the pictures' folder; expected a "
                "relative path below it; correct or clear it."
            )
    wrong = items.filter(pl.col("image_hash").is_not_null() & ~pl.col("image_hash").str.contains(_SHA256_HEX))
    if wrong.height:
        raise FeatureError(
            f"image_hash of item {wrong['item_id'][0]!r} is {wrong['image_hash'][0]!r}; expected SHA-256 in "
            "64 lower-case hex digits; import the dataset again."
        )


def leaves_folder(path: str) -> bool:
    """Whether a relative path could name something outside its folder (symbolic links aside)."""
    parts = PurePosixPath(path.replace("\\", "/")).parts
    drive = len(path) > 1 and path[1] == ":"
    return not parts or parts[0] == "/" or ".." in parts or "://" in path or drive or "\0" in path


def _text_column(items: pl.DataFrame, name: str) -> Sequence[str | None]:
    """One field of all items as plain strings; the strings of a list are joined by commas."""
    known = [
        column
        for column, dtype in items.drop("image", "image_hash").schema.items()
        if dtype in {pl.String, pl.List(pl.String), pl.Null} or isinstance(dtype, pl.Categorical | pl.Enum)
    ]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        what = f"holds {items.schema[name]}" if name in items.columns else "is no column of the catalogue"
        raise FeatureError(
            f"the text field {name!r} {what}; columns of text are {', '.join(known) or 'none'}; "
            + (f"did you mean {near[0]!r}?" if near else "set text.fields to some of them.")
        )
    column = items[name]
    if column.dtype == pl.List(pl.String):
        column = column.list.drop_nulls().list.join(", ")
    texts: list[str | None] = column.cast(pl.String).to_list()
    return texts
