"""How well pictures find their texts and texts their pictures, among items that were held out."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

CUTS = (1, 10)
_BLOCK = 1024


@dataclass(frozen=True)
class Retrieval:
    """Shares of the items, by cut-off: 0 to 1."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]

    @property
    def mean(self) -> float:
        """Of all cut-offs and both directions: what chooses the epoch."""
        values = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(values) / len(values)

    def row(self) -> dict[str, float]:
        """By the names of the history's columns."""
        return (
            {f"image_to_text_recall@{k}": value for k, value in self.image_to_text.items()}
            | {f"text_to_image_recall@{k}": value for k, value in self.text_to_image.items()}
            | {"retrieval": self.mean}
        )


def cross_modal_retrieval(images: Tensor, texts: Tensor, picture_of: Tensor, text_of: Tensor) -> Retrieval:
    """Recall@k by cosine in both directions.

    A picture has found its text where a text equal to its own is among the first k, and likewise for texts:
    equal contents cannot be told apart. Of items that score the same the one with the lower row is first.

    Args:
        images: (H, D).
        texts: (H, D); row h is the same item's as ``images[h]``.
        picture_of: (H,) number of the content of each picture; equal pictures have equal numbers.
        text_of: (H,) number of the content of each text.
    """
    images, texts = normalize(images.float(), dim=1), normalize(texts.float(), dim=1)
    return Retrieval(_recall(images, texts, text_of), _recall(texts, images, picture_of))


def _recall(queries: Tensor, candidates: Tensor, content: Tensor) -> dict[int, float]:
    """Share of the queries that have a candidate of their own content among the first k, for each k."""
    deepest = min(max(CUTS), len(candidates))
    hits = dict.fromkeys(CUTS, 0)
    for start in range(0, len(queries), _BLOCK):
        some = slice(start, start + _BLOCK)
        scores = queries[some] @ candidates.T
        first = scores.argsort(dim=1, descending=True, stable=True)[:, :deepest]
        found = content[first] == content[some][:, None]
        for k in CUTS:
            hits[k] += int(found[:, :k].any(dim=1).sum())
    return {k: hits[k] / len(queries) for k in CUTS}
