"""TF-IDF and a truncated singular value decomposition, fitted on a catalogue's own texts.

No pretrained network at all: what is left to a text encoder beyond counting words is its distance from this.
Vectors are those of scikit-learn's `TfidfVectorizer` and `TruncatedSVD` with their defaults.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, PositiveInt
from torch import Tensor

from features.encoders.base import Encoder, EncoderInfo, digest_json
from features.encoders.controls import blank_picture
from features.encoders.options import read_options
from features.errors import EncoderError
from features.texts import TEXT_CLEANING_VERSION

FAMILY = "tfidf"
SVD_SEED = 0
"""Of the randomised decomposition: the same texts give the same vectors."""


class TfidfOptions(BaseModel, frozen=True, extra="forbid"):
    """What may follow the name, as `+name=value`."""

    dim: PositiveInt = 256
    min_df: PositiveInt = 1
    ngrams: Annotated[int, Field(ge=1, le=5)] = 1


@dataclass(frozen=True)
class TfidfFit:
    """What fitting gave."""

    n_texts: int
    words: tuple[str, ...]
    """(V,) the vocabulary in the order of the rows below."""
    idf: NDArray[np.float32]
    """(V,) inverse document frequencies."""
    components: NDArray[np.float32]
    """(V, D) what each word adds to a vector."""
    explained_variance: float
    """Share of the variance of the TF-IDF rows that the D numbers keep."""

    def digest(self) -> str:
        """SHA-256 in hex of all that vectors depend on."""
        digest = hashlib.sha256("\0".join(self.words).encode("utf-8", "surrogatepass"))
        digest.update(self.idf.tobytes())
        digest.update(self.components.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class TfidfTokenizer:
    """Texts -> the numbers of their known words, repeated as often as they occur.

    Args:
        row_of: Word, or several words in a row -> its number.
        ngrams: Most words in a row that count as one.
    """

    row_of: Mapping[str, int]
    ngrams: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Numbers of each text's words, ascending; unknown words are left out."""
        analyse = _analyser(self.ngrams)
        return [sorted(self.row_of[word] for word in analyse(text) if word in self.row_of) for text in texts]


@lru_cache(maxsize=8)
def _analyser(ngrams: int) -> Callable[[str], list[str]]:
    from sklearn.feature_extraction.text import CountVectorizer  # noqa: PLC0415 - seconds of imports

    analyse: Callable[[str], list[str]] = CountVectorizer(ngram_range=(1, ngrams)).build_analyzer()
    return analyse


class TfidfEncoder(Encoder):
    """A fitted TF-IDF: counts times inverse document frequency, unit length, then the projection.

    It stays on the CPU, as it has nothing that a GPU would do faster than the copies take.
    """

    def __init__(self, spec: str, fit: TfidfFit) -> None:
        info = describe_tfidf(spec).model_copy(
            update={"weights_sha256": fit.digest(), "n_parameters": fit.components.size + fit.idf.size}
        )
        ngrams = _options(spec).ngrams
        row_of = {word: row for row, word in enumerate(fit.words)}
        super().__init__(info, blank_picture, TfidfTokenizer(row_of, ngrams), pad_id=-1)
        self.fitted = fit
        self.register_buffer("idf", torch.from_numpy(fit.idf))
        self.register_buffer("components", torch.from_numpy(fit.components))
        self.idf: Tensor
        self.components: Tensor

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L), negative where there is no word -> (B, D) float32; zeros where no word is known."""
        rows, columns = torch.nonzero(tokens >= 0, as_tuple=True)
        words = tokens[rows, columns]
        shape = (len(tokens), len(self.idf))
        with torch.autocast(tokens.device.type, enabled=False):
            # Equal words of a text are added up here: that is the term frequency.
            weights = torch.sparse_coo_tensor(
                torch.stack([rows, words]), self.idf[words], shape, check_invariants=False
            ).coalesce()
            squares = torch.zeros(len(tokens)).index_add_(0, weights.indices()[0], weights.values().square())
            vectors: Tensor = torch.sparse.mm(weights, self.components)
            return vectors / squares.sqrt().masked_fill(squares == 0, 1)[:, None]


def describe_tfidf(spec: str) -> EncoderInfo:
    """Info of `tfidf...` before it is fitted: the weights' digest stands for its settings."""
    options = _options(spec)
    name = f"tfidf-{options.dim}"
    name += f"-{options.ngrams}grams" if options.ngrams > 1 else ""
    name += f"-min{options.min_df}" if options.min_df > 1 else ""
    return EncoderInfo(
        spec=spec,
        name=name,
        family=FAMILY,
        weights_sha256=digest_json({"unfitted": FAMILY, "seed": SVD_SEED, **options.model_dump()}),
        preprocessing_sha256=digest_json({"ngrams": options.ngrams, "texts": TEXT_CLEANING_VERSION}),
        modalities=("text",),
        dims={"text": options.dim},
        image_size_px=0,
        context_length=0,
        n_parameters=0,
    )


def load_tfidf(spec: str) -> Encoder:
    """Refuse: there is nothing to load.

    Raises:
        EncoderError: Always.
    """
    raise EncoderError(
        f"encoder {spec!r} is fitted on the texts of a catalogue, so it cannot be had without one; run "
        f"`tandem extract <dataset> --encoder {spec} --modality text`."
    )


def fit_tfidf(texts: Sequence[str], spec: str) -> TfidfEncoder:
    """Fit on cleaned texts; the same texts in the same order give the same encoder.

    Args:
        texts: Of all items that have one.
        spec: `tfidf` with its options.

    Raises:
        EncoderError: No word in any text, or fewer texts or words than `dim`.
    """
    from sklearn.decomposition import TruncatedSVD  # noqa: PLC0415 - seconds of imports
    from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415 - seconds of imports

    options = _options(spec)
    vectorizer = TfidfVectorizer(min_df=options.min_df, ngram_range=(1, options.ngrams))
    try:
        counted = vectorizer.fit_transform(texts)  # sparse (N, V)
    except ValueError as error:
        raise EncoderError(
            f"encoder {spec!r}: {len(texts):,} texts hold no word that it could count ({error}); a word has "
            f"two letters or more and is in {options.min_df} texts or more; take a smaller min_df, or "
            "other text fields."
        ) from error
    most = min(counted.shape)
    if options.dim > most:
        raise EncoderError(
            f"encoder {spec!r}: {counted.shape[0]:,} texts with {counted.shape[1]:,} different words give at "
            f"most {most} numbers a vector, not {options.dim}; type tfidf+dim={most} or less."
        )
    svd = TruncatedSVD(n_components=options.dim, random_state=SVD_SEED).fit(counted)
    fit = TfidfFit(
        n_texts=len(texts),
        words=tuple(vectorizer.get_feature_names_out().tolist()),
        idf=vectorizer.idf_.astype(np.float32),
        components=np.ascontiguousarray(svd.components_.T, dtype=np.float32),
        explained_variance=float(svd.explained_variance_ratio_.sum()),
    )
    return TfidfEncoder(spec, fit)


def _options(spec: str) -> TfidfOptions:
    base, options = read_options(spec, TfidfOptions)
    if base != FAMILY:
        raise EncoderError(
            f"encoder {spec!r}: expected {FAMILY} and options; for example tfidf+dim=64+ngrams=2."
        )
    return options
