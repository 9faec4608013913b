"""Questions to a finished store: which items are near, and what to recommend to whom."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from PIL import Image

from features.images import ImageLimits, UnreadableImage, open_image
from features.indexing import load_index, search
from features.texts import clean_text
from pipeline.errors import ConfigError
from pipeline.progress import SILENT, Reporter
from pipeline.reading import read_dataset
from pipeline.stages.build_index import vector_files
from pipeline.stages.extract_features import CONTROLS, restore_encoder
from pipeline.stages.train_recommender import restore_scorer
from recommenders.evaluation import recommend_top_k

if TYPE_CHECKING:
    from pipeline.store import Artefact, Store


@dataclass(frozen=True)
class Query:
    """What is asked for: exactly one of an item's id, a text and a picture."""

    item: str = ""
    text: str = ""
    picture: Path | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("item", "text", "picture") if getattr(self, name)]
        if len(given) != 1:
            raise ConfigError(
                "A query is one of --item, --text and --picture; got "
                f"{' and '.join(given) or 'none of them'}."
            )


@dataclass(frozen=True)
class Hit:
    """One answer."""

    rank: int
    item_id: str
    similarity: float
    title: str


def similar_items(store: Store, index: str, query: Query, k: int = 10) -> list[Hit]:
    """Return the k items nearest to an item, a text or a picture; an item is not its own neighbour.

    Args:
        store: Where the index and what it was made from lie.
        index: Name, key or folder of an index artefact.
        query: What is asked for.
        k: How many.

    Raises:
        ConfigError: An unknown item, one without a vector, or an encoder that cannot read the query.
    """
    artefact = store.get(index, "index")
    source = store.get(artefact.manifest.inputs[0].key)
    faiss_index = load_index(artefact.path("index.faiss"))
    item_ids: list[str] = pl.read_parquet(artefact.path("item_ids.parquet"))["item_id"].to_list()
    vector = _item_vector(source, query.item) if query.item else _encode(store, source, query)
    rows, similarities = search(faiss_index, vector[None], k + 1)
    titles = _titles(store, source)
    hits = [
        (item_ids[row], float(similarity))
        for row, similarity in zip(rows[0], similarities[0], strict=True)
        if row >= 0 and item_ids[row] != query.item
    ]
    return [
        Hit(rank, item_id, similarity, titles.get(item_id, ""))
        for rank, (item_id, similarity) in enumerate(hits[:k], start=1)
    ]


def _item_vector(source: Artefact, item_id: str) -> NDArray[np.float32]:
    from features.feature_table import FeatureSet  # noqa: PLC0415

    features = FeatureSet.read(vector_files(source))
    rows = (features.item_ids == item_id).arg_true()
    if not len(rows):
        raise ConfigError(f"{source.ref} has no item {item_id!r}; its first is {features.item_ids[0]!r}.")
    row = int(rows[0])
    if features.status[row] != "ok":
        raise ConfigError(
            f"Item {item_id!r} has no vector in {source.ref}: its status is {features.status[row]}. "
            "Ask in an index of the other modality, or by --text or --picture."
        )
    vector: NDArray[np.float32] = features.vectors[row].float().numpy()
    return vector


def _encode(store: Store, source: Artefact, query: Query) -> NDArray[np.float32]:
    """Encode a text or a picture with the encoder that made the indexed vectors."""
    shown = source.manifest.parameters
    spec = str(shown.get("encoder", ""))
    wanted = "text" if query.text else "image"
    info = shown.get("info")
    readable = info.get("modalities") if isinstance(info, dict) else None
    if not isinstance(readable, list) or wanted not in readable or spec.startswith(CONTROLS):
        raise ConfigError(
            f"{source.ref} was made by {spec or 'a recommender'}, which cannot encode a {wanted} query; "
            "ask by --item, or in an index of an encoder with both towers."
        )
    encoder = restore_encoder(store, source)
    with torch.inference_mode():
        if query.text:
            encoded = encoder.encode_texts(encoder.tokenize([clean_text(query.text)]))
        else:
            encoded = encoder.encode_images(encoder.image_transform(_picture(query.picture))[None])
    vector: NDArray[np.float32] = encoded[0].float().numpy()
    return vector


def _picture(path: Path | None) -> Image.Image:
    assert path is not None  # noqa: S101 - Query checked that one of the three is given
    try:
        return open_image(path.read_bytes(), ImageLimits())
    except (OSError, UnreadableImage) as error:
        raise ConfigError(f"{path} is not a picture that can be read: {error}.") from error


def _titles(store: Store, source: Artefact) -> dict[str, str]:
    """Item id -> title, from the dataset behind the vectors, where it is still there."""
    for reference in source.manifest.inputs:
        if reference.kind != "dataset":
            continue
        dataset = store.find("dataset", reference.key)
        if dataset is not None:
            items = pl.read_parquet(dataset.path("items.parquet"))
            if "title" in items.columns:
                return dict(
                    items.select("item_id", pl.col("title").cast(pl.String).fill_null("")).iter_rows()
                )
    return {}


class Written(TypedDict):
    """What ``write_recommendations`` wrote."""

    users: int
    rows: int
    file: str


def write_recommendations(
    store: Store,
    run: str,
    output: Path,
    *,
    k: int = 10,
    users: Sequence[str] = (),
    exclude: Literal["train", "all"] = "all",
    reporter: Reporter = SILENT,
) -> Written:
    """Write the k best unseen items of each user: user_id, rank (1 is best), item_id, score.

    Args:
        store: Where the run and what it was made from lie.
        run: Name, key or folder of a run.
        output: The Parquet file, written whole.
        k: Items a user.
        users: Only these; all where empty.
        exclude: Leave out what the user has in training, or in all parts of the split (to serve people).
        reporter: Told what is done.

    Raises:
        ConfigError: A user that the dataset does not know, or an output that cannot be written.
    """
    artefact = store.get(run, "run")
    dataset = read_dataset(store.get(_input_key(artefact, "dataset"), "dataset"))
    rows = _user_rows(dataset.user_ids, users)
    split = dataset.split
    seen = split.train if exclude == "train" else split.train.plus(split.valid).plus(split.test)
    reporter.say(f"  ranking {split.n_items:,} items for {len(rows):,} users")
    items, scores = recommend_top_k(restore_scorer(store, artefact), rows, min(k, split.n_items), seen)
    kept = items >= 0
    per_user, depth = items.shape
    table = pl.DataFrame(
        {
            "user_id": np.repeat(np.array(dataset.user_ids, dtype=object)[rows], depth)[
                kept.ravel()
            ].tolist(),
            "rank": np.tile(np.arange(1, depth + 1, dtype=np.int32), per_user)[kept.ravel()],
            "item_id": np.array(dataset.item_ids, dtype=object)[items[kept]].tolist(),
            "score": scores[kept],
        }
    )
    aside = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        table.write_parquet(aside)
        aside.replace(output)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written ({error}); name another --output.") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    return Written(users=len(rows), rows=len(table), file=str(output))


def _input_key(artefact: Artefact, kind: str) -> str:
    return next(reference.key for reference in artefact.manifest.inputs if reference.kind == kind)


def _user_rows(known: Sequence[str], users: Sequence[str]) -> NDArray[np.int64]:
    if not users:
        return np.arange(len(known), dtype=np.int64)
    row_of = {user_id: row for row, user_id in enumerate(known)}
    unknown = [user for user in users if user not in row_of]
    if unknown:
        raise ConfigError(
            f"The dataset has no user {unknown[0]!r} ({len(known):,} users, first {known[0]!r})."
        )
    return np.array([row_of[user] for user in users], dtype=np.int64)
