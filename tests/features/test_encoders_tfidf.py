"""TF-IDF fitted on a catalogue's texts: equal to scikit-learn's own pipeline, and deterministic."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.pipeline import make_pipeline

from features.encoders.registry import describe_encoder, load_encoder, plain_spec
from features.encoders.tfidf import TfidfEncoder, describe_tfidf, fit_tfidf
from features.errors import EncoderError

NOUNS = ["bag", "mug", "shoe", "lamp", "chair", "desk", "clock", "scarf"]
COLOURS = ["red", "blue", "green", "black", "white"]
TEXTS = [f"A {colour} {noun} and {noun}, {COLOURS[len(noun) % 3]}" for noun in NOUNS for colour in COLOURS]


def encode(encoder: TfidfEncoder, texts: list[str]) -> np.ndarray:
    with torch.inference_mode():
        return encoder.encode_texts(encoder.tokenize(texts)).numpy()


@pytest.mark.parametrize(("options", "min_df", "ngrams"), [("", 1, 1), ("+min_df=2+ngrams=2", 2, 2)])
def test_vectors_are_those_of_scikit_learn(options: str, min_df: int, ngrams: int) -> None:
    reference = make_pipeline(
        TfidfVectorizer(min_df=min_df, ngram_range=(1, ngrams)), TruncatedSVD(6, random_state=0)
    )
    expected = reference.fit_transform(TEXTS)
    encoder = fit_tfidf(TEXTS, f"tfidf+dim=6{options}")
    np.testing.assert_allclose(encode(encoder, TEXTS), expected, atol=1e-5)
    new = ["RED bag; red bag!", "unknown words alone", "", "lamp"]
    np.testing.assert_allclose(encode(encoder, new), reference.transform(new), atol=1e-5)
    svd = reference.named_steps["truncatedsvd"]
    assert encoder.fitted.explained_variance == pytest.approx(svd.explained_variance_ratio_.sum())
    assert (encoder.fitted.n_texts, len(encoder.fitted.words)) == (len(TEXTS), svd.components_.shape[1])


def test_fitting_twice_is_the_same_and_other_texts_are_not() -> None:
    first, again = fit_tfidf(TEXTS, "tfidf+dim=6"), fit_tfidf(TEXTS, "tfidf+dim=6")
    assert first.info == again.info
    np.testing.assert_array_equal(encode(first, TEXTS), encode(again, TEXTS))
    other = fit_tfidf([*TEXTS, "a teapot"], "tfidf+dim=6")
    assert other.info.weights_sha256 != first.info.weights_sha256
    assert first.info.weights_sha256 != describe_tfidf("tfidf+dim=6").weights_sha256


def test_a_vector_does_not_depend_on_its_batch() -> None:
    encoder = fit_tfidf(TEXTS, "tfidf+dim=6")
    together = encode(encoder, [*TEXTS, ""])
    for text, row in zip([*TEXTS, ""], together, strict=True):
        np.testing.assert_allclose(encode(encoder, [text])[0], row, atol=1e-6)


def test_the_tokenizer_can_be_pickled_for_loader_workers() -> None:
    encoder = fit_tfidf(TEXTS, "tfidf+dim=6+ngrams=2")
    again = pickle.loads(pickle.dumps(encoder.tokenizer))  # noqa: S301 - made a moment ago
    assert again(TEXTS) == encoder.token_ids(TEXTS)
    assert encoder.token_ids(["red red bag"]) != encoder.token_ids(["red bag"])


@pytest.mark.parametrize(
    ("texts", "spec", "answer"),
    [
        (["a b", "!"], "tfidf+dim=1", "2 texts hold no word that it could count"),
        (["red bag", "blue mug"], "tfidf+min_df=2", "hold no word .*take a smaller min_df"),
        ([], "tfidf", "0 texts hold no word"),
        (["red bag", "blue mug"], "tfidf", "2 texts with 4 different words give at most 2 .*tfidf.dim=2"),
        (TEXTS, "tfidf:3", "expected tfidf and options"),
        (TEXTS, "tfidf+dims=3", "did you mean 'dim'"),
        (TEXTS, "tfidf+ngrams=9", "option ngrams is '9'"),
    ],
)
def test_what_cannot_be_fitted_says_why(texts: list[str], spec: str, answer: str) -> None:
    with pytest.raises(EncoderError, match=answer):
        fit_tfidf(texts, spec)


def test_the_registry_describes_it_and_says_that_it_needs_a_catalogue() -> None:
    info = describe_encoder("baseline/tfidf+dim=8")
    assert (info.name, info.dims, info.modalities) == ("tfidf-8", {"text": 8}, ("text",))
    assert describe_encoder("tfidf+dim=8+ngrams=2+min_df=3").name == "tfidf-8-2grams-min3"
    assert describe_encoder("shuffled:tfidf").dims == {"text": 256}
    assert plain_spec("baseline/tfidf+l2=yes") == ("tfidf", True)
    with pytest.raises(EncoderError, match="is fitted on the texts of a catalogue"):
        load_encoder("tfidf")
    with pytest.raises(EncoderError, match="did you mean 'tfidf'"):
        describe_encoder("tfdf")
