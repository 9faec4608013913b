"""Vectors that earlier extractions left on disk, found by the hash of what they encode."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from features.errors import FeatureFileError
from features.parts import PartFile, Vectors


class KnownVectors:
    """Vectors of one recipe by content hash; they stay on disk until they are taken.

    Args:
        paths: Parts of earlier artefacts; where several hold one content, the first wins.
        recipe: `extraction.recipe_digest` of the vectors wanted. Parts of another recipe and damaged parts
            are left out, as encoding again is always right.
    """

    def __init__(self, paths: Sequence[Path], recipe: str) -> None:
        self.left_out: list[Path] = []
        """Parts that are damaged or of another recipe."""
        self._parts: list[PartFile] = []
        self._mapped: dict[int, Vectors] = {}
        frames = []
        for path in paths:
            try:
                part = PartFile(path, verify=True)
                if part.metadata.get("recipe") != recipe:
                    self.left_out.append(path)
                    continue
                table = part.columns(("content_hash", "status"))
            except FeatureFileError:
                self.left_out.append(path)
                continue
            frame = pl.DataFrame(
                {
                    "hash": pl.Series(table["content_hash"], dtype=pl.String),
                    "ok": pl.Series(table["status"]).cast(pl.String) == "ok",
                }
            ).with_row_index("row")
            frame = frame.filter(pl.col("ok") & pl.col("hash").is_not_null())
            frames.append(frame.select("hash", "row", pl.lit(len(self._parts), pl.UInt32).alias("part")))
            self._parts.append(part)
        schema = {"hash": pl.String, "row": pl.UInt32, "part": pl.UInt32}
        everything = pl.concat(frames) if frames else pl.DataFrame(schema=schema)
        self._places = everything.unique("hash", keep="first", maintain_order=True)

    def __len__(self) -> int:
        return self._places.height

    def find(self, hashes: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Where each content lies, -1 where it is not known; for `take`."""
        wanted = pl.DataFrame({"hash": pl.Series(hashes, dtype=pl.String)})
        places = self._places.with_row_index("place")
        joined = wanted.join(places, on="hash", how="left", maintain_order="left")
        return joined["place"].cast(pl.Int64).fill_null(-1).to_numpy().copy()

    def take(self, places: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Vectors:
        """(N, D) vectors of places that `find` gave, none of them -1.

        Raises:
            FeatureFileError: A part turns out to be damaged.
        """
        chosen = self._places[places]
        parts, rows = chosen["part"].to_numpy(), chosen["row"].to_numpy()
        first = self._parts[0]
        out = np.empty((len(places), first.dim), first.dtype)
        for part in np.unique(parts):
            mine = parts == part
            out[mine] = self._part(int(part))[rows[mine]]
        return out

    def _part(self, number: int) -> Vectors:
        if number not in self._mapped:
            self._mapped[number] = self._parts[number].mapped()
        return self._mapped[number]
