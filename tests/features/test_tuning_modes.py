"""Tuning: what is trained moves, nothing else does, and what is finished is a plain encoder again."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from features.encoders.base import Encoder
from features.errors import EncoderError
from features.tuning.attention import OpenAttention, close_attention, open_attention
from features.tuning.modes import Tuned, TuningConfig, prepare_tuning
from features.tuning.towers import tower_of, towers_of
from tests.features import small_clip
from tests.features.test_tuning_towers import ENCODERS, inputs_of, vectors_of

NAMES = ["clip", "tiny", "vlmo"]
MANY = [
    *NAMES,
    "clip-siglip",
    "hf-clip",
    "hf-siglip",
    "bert",
    "vit-mean",
    "sentence-dense",
    "timm",
    "vlmo-vl",
]


@pytest.fixture
def make(tmp_path: Path) -> Callable[[str], Encoder]:
    def make_one(name: str) -> Encoder:
        folder = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return ENCODERS[name](folder)

    return make_one


def copy_of(encoder: Encoder) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in encoder.state_dict().items()}


def vectors(encoder: Encoder) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            each: vectors_of(encoder, each, inputs_of(encoder, each))
            for each in encoder.info.modalities
            if each != "fused"
        }


def loss_of(encoder: Encoder) -> Tensor:
    total: Tensor = torch.zeros(())
    for modality in towers_of(encoder):
        out = vectors_of(encoder, modality, inputs_of(encoder, modality))
        total = total + (out * torch.linspace(-1, 1, out.shape[1])).sum()
    for name, value in encoder.named_parameters():
        if "logit" in name:
            total = total + value.sum()
    return total


def step(tuned: Tuned, rate: float = 0.3, *, training: bool = False) -> None:
    if training:
        tuned.train()
    optimizer = torch.optim.SGD(list(tuned.trainable.values()), lr=rate)
    loss_of(tuned.encoder).backward()  # type: ignore[no-untyped-call]  # torch's own signature lacks types
    nn.utils.clip_grad_norm_(tuned.trainable.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    tuned.eval()


def moved(before: dict[str, Tensor], encoder: Encoder) -> set[str]:
    after = encoder.state_dict()
    assert after.keys() == before.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def used(encoder: Encoder) -> set[str]:
    """Parameters that the vectors, or the temperature, depend on."""
    encoder.zero_grad()
    loss_of(encoder).backward()  # type: ignore[no-untyped-call]  # torch's own signature lacks types
    found = {n for n, p in encoder.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    encoder.zero_grad()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_mode_full_moves_all_that_vectors_depend_on(name: str, make: Callable[[str], Encoder]) -> None:
    encoder = make(name)
    before, expected = copy_of(encoder), used(encoder)
    tuned = prepare_tuning(encoder, TuningConfig())
    assert tuned.trainable.keys() == dict(encoder.named_parameters()).keys()
    step(tuned)
    assert moved(before, encoder) == expected
    assert "model.logit_scale" in expected


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_mode_last_n_moves_the_last_blocks_only(
    name: str, head: bool, make: Callable[[str], Encoder]
) -> None:
    encoder = make(name)
    before, reached = copy_of(encoder), used(encoder)
    expected: set[str] = {"model.logit_scale"} | ({"model.logit_vl_scale"} if name == "vlmo" else set())
    for tower in towers_of(encoder).values():
        expected |= tower.block_parameters(tower.n_blocks - 1).keys()
        expected |= tower.head_parameters().keys() if head else set()
    tuned = prepare_tuning(encoder, TuningConfig(mode="last-n", last_n=1, head=head))
    assert tuned.trainable.keys() == expected
    step(tuned)
    assert moved(before, encoder) == expected & reached
    assert len(expected) <= len(before) / 2
    for modality, tower in towers_of(encoder).items():
        assert tuned.frozen_blocks(modality) == tower.n_blocks - 1


@pytest.mark.parametrize("mode", ["full", "last-n"])
def test_batch_normalisation_stays_as_it_was_learnt(mode: Any, make: Callable[[str], Encoder]) -> None:
    encoder = make("tiny")
    before = copy_of(encoder)
    tuned = prepare_tuning(encoder, TuningConfig(mode=mode, last_n=1, temperature=False))
    pixels = inputs_of(encoder, "image")
    plain = vectors_of(encoder, "image", pixels).detach()
    kept = tower_of(encoder, "image")
    tuned.train()
    with torch.no_grad():
        lower = kept.run(kept.stem(pixels), 0, 3)
    assert torch.equal(vectors_of(encoder, "image", pixels), plain)
    alone = vectors_of(encoder, "image", pixels[:1])  # whatever else is in a chunk
    torch.testing.assert_close(alone, plain[:1], rtol=1e-4, atol=1e-4)
    step(tuned, training=True)
    changed = moved(before, encoder)
    scales = [name for name, value in encoder.named_parameters() if ".bn" in name and value.requires_grad]
    assert scales
    assert set(scales) <= changed
    assert "model.logit_scale" not in changed
    assert not any("running" in name or "num_batches" in name for name in changed)
    if mode == "last-n":
        with torch.no_grad():
            assert torch.equal(kept.run(kept.stem(pixels), 0, 3).states, lower.states)


@pytest.mark.parametrize(("mode", "random"), [("full", True), ("last-n", False), ("lora", False)])
def test_a_frozen_stem_leaves_no_patches_out(mode: Any, random: bool) -> None:
    config = {**small_clip.SMALL, "vision_cfg": {**small_clip.VISION, "image_size": 64, "patch_dropout": 0.5}}
    encoder = small_clip.small_encoder(config)
    tuned = prepare_tuning(encoder, TuningConfig(mode=mode, last_n=1))
    tuned.train()
    tower, pixels = tower_of(encoder, "image"), torch.rand(2, 3, 64, 64)
    assert tower.stem(pixels).states.shape[1] == (9 if random else 17)


@pytest.mark.parametrize("name", MANY)
def test_low_rank_updates_start_as_the_identity_and_merge_into_plain_weights(
    name: str, make: Callable[[str], Encoder]
) -> None:
    encoder = make(name)
    plain, before, flags = vectors(encoder), copy_of(encoder), [p.requires_grad for p in encoder.parameters()]
    kinds = [type(module) for module in encoder.modules()]
    reached = {n for n in used(encoder) if "logit" not in n}
    stream = torch.random.get_rng_state()
    tuned = prepare_tuning(encoder, TuningConfig(mode="lora", lora_rank=2), seed=3)
    assert torch.equal(torch.random.get_rng_state(), stream)
    for modality, rows in vectors(encoder).items():
        torch.testing.assert_close(rows, plain[modality], rtol=1e-5, atol=2e-6)
    frozen = {n: p.detach().clone() for n, p in encoder.named_parameters() if n not in tuned.trainable}
    for _ in range(2):  # the first step moves the second matrices, which begin as zeros
        step(tuned)
    assert all(torch.equal(value, dict(encoder.named_parameters())[n]) for n, value in frozen.items())
    assert all(bool(p.abs().sum() > 0) for n, p in tuned.trainable.items() if ".lora_B." in n)
    learnt = vectors(encoder)
    assert all(not torch.allclose(rows, plain[each], atol=1e-4) for each, rows in learnt.items())
    with torch.no_grad():
        tower = towers_of(encoder)["text" if "text" in learnt else "image"]
        torch.testing.assert_close(
            tower.vectors(inputs_of(encoder, tower.modality)), learnt[tower.modality], rtol=1e-5, atol=1e-6
        )
    tuned.finish()
    for modality, rows in vectors(encoder).items():
        torch.testing.assert_close(rows, learnt[modality], rtol=1e-5, atol=1e-5)
    changed = {n for n in moved(before, encoder) if "logit" not in n}
    matrices = {
        n
        for tower in towers_of(encoder).values()
        for number in range(tower.n_blocks)
        for n, value in tower.block_parameters(number).items()
        if value.ndim > 1 and n in reached
    }
    assert changed == matrices
    assert [type(module) for module in encoder.modules()] == kinds
    assert [p.requires_grad for p in encoder.parameters()] == flags
    assert all(p.is_leaf for p in encoder.parameters())


def test_low_rank_updates_are_those_of_the_seed(make: Callable[[str], Encoder]) -> None:
    config = TuningConfig(mode="lora")
    first, again, other = (prepare_tuning(make("clip"), config, seed=seed) for seed in (1, 1, 2))
    torch.manual_seed(99)
    for name, value in first.trainable.items():
        assert torch.equal(value, again.trainable[name])
        if ".lora_A." in name:
            assert not torch.equal(value, other.trainable[name])


def test_dropout_of_updates_acts_in_training_only(make: Callable[[str], Encoder]) -> None:
    dropped = prepare_tuning(make("clip"), TuningConfig(mode="lora", lora_dropout=0.5, temperature=False))
    kept = prepare_tuning(make("clip"), TuningConfig(mode="lora", temperature=False))
    for tuned in (dropped, kept):
        step(tuned)
        tuned.train()
    pixels = inputs_of(dropped.encoder, "image")
    assert not torch.equal(dropped.encoder.encode_images(pixels), dropped.encoder.encode_images(pixels))
    assert torch.equal(kept.encoder.encode_images(pixels), kept.encoder.encode_images(pixels))
    dropped.eval()
    assert torch.equal(dropped.encoder.encode_images(pixels), dropped.encoder.encode_images(pixels))


def test_targets_choose_layers_by_the_end_of_their_names(make: Callable[[str], Encoder]) -> None:
    encoder = make("clip")
    tuned = prepare_tuning(encoder, TuningConfig(mode="lora", lora_targets=("mlp.c_fc", "in_proj")))
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in tuned.trainable if "lora" in name}
    assert layers == {"c_fc", "in_proj"}
    with pytest.raises(EncoderError, match=r"'c_fcc', but no layer .* did you mean c_fc"):
        prepare_tuning(make("clip"), TuningConfig(mode="lora", lora_targets=("c_fcc",)))
    plain = make("clip")
    with pytest.raises(EncoderError, match="'zzz'"):
        prepare_tuning(plain, TuningConfig(mode="lora", lora_targets=("zzz",)))
    assert not any(isinstance(module, OpenAttention) for module in plain.modules())


@pytest.mark.parametrize("mode", ["full", "last-n", "lora"])
@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_tower_keeps_its_vectors_bit_for_bit(
    name: str, mode: Any, make: Callable[[str], Encoder]
) -> None:
    encoder = make(name)
    plain = vectors(encoder)
    tuned = prepare_tuning(encoder, TuningConfig(mode=mode, last_n=1, frozen_towers=("image",)))
    assert tuned.frozen_blocks("image") == tower_of(encoder, "image").n_blocks
    assert (
        tuned.frozen_blocks("text")
        == {"full": None, "last-n": tower_of(encoder, "text").n_blocks - 1, "lora": 0}[mode]
    )
    for _ in range(2):
        step(tuned, training=True)
    tuned.finish()
    after = vectors(encoder)
    assert torch.equal(after["image"], plain["image"])
    assert not torch.allclose(after["text"], plain["text"], atol=1e-5)


@pytest.mark.parametrize("mode", ["full", "last-n", "lora"])
@pytest.mark.parametrize("name", ["clip", "vlmo", "hf-siglip", "bert", "tiny"])
def test_checkpointing_changes_no_gradient(name: str, mode: Any, make: Callable[[str], Encoder]) -> None:
    found = []
    for again in (False, True):
        encoder = make(name)
        tuned = prepare_tuning(encoder, TuningConfig(mode=mode, last_n=1, gradient_checkpointing=again))
        loss_of(encoder).backward()  # type: ignore[no-untyped-call]  # torch's own signature lacks types
        found.append({n: p.grad for n, p in tuned.trainable.items() if p.grad is not None})
        patched = [m for m in encoder.modules() if "forward" in m.__dict__]
        assert bool(patched) == again
        tuned.finish()
        assert not [m for m in encoder.modules() if "forward" in m.__dict__]
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_checkpointed_encoder_runs_on_its_own_weights(make: Callable[[str], Encoder]) -> None:
    tuned = prepare_tuning(make("clip"), TuningConfig(gradient_checkpointing=True))
    copied = deepcopy(tuned.encoder)
    plain = vectors(copied)
    blocks = [value for name, value in tuned.trainable.items() if ".resblocks." in name]
    with torch.no_grad():
        for value in blocks:
            value.mul_(3.0)
    assert all(torch.equal(rows, plain[each]) for each, rows in vectors(copied).items())
    assert all(not torch.allclose(rows, plain[each]) for each, rows in vectors(tuned.encoder).items())


@pytest.mark.parametrize("mode", ["full", "last-n", "lora"])
def test_a_checkpoint_of_what_is_trained_brings_it_back(mode: Any, make: Callable[[str], Encoder]) -> None:
    config = TuningConfig(mode=mode, last_n=1)
    tuned = prepare_tuning(make("tiny"), config, seed=1)
    step(tuned, training=True)
    state, learnt = tuned.state(), vectors(tuned.encoder)
    assert tuned.trainable.keys() <= state.keys()
    step(tuned, training=True)
    assert not torch.equal(vectors(tuned.encoder)["text"], learnt["text"])
    other = prepare_tuning(make("tiny"), config, seed=2)
    other.load_state(state)
    assert all(torch.equal(rows, learnt[each]) for each, rows in vectors(other.encoder).items())
    with pytest.raises(EncoderError, match=r"1 tensors differ, first 'model\.logit_scale'"):
        other.load_state({name: value for name, value in state.items() if name != "model.logit_scale"})


def test_opened_attention_is_the_closed_one() -> None:
    torch.manual_seed(0)
    closed = nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(closed.in_proj_bias)
    root = nn.Sequential(closed)
    states, mask = torch.randn(3, 5, 16), torch.full((5, 5), -torch.inf).triu(1)
    with torch.no_grad():
        expected = closed(states, states, states, need_weights=False, attn_mask=mask)[0]
        open_attention(root)
        opened: Any = root[0]
        assert isinstance(opened, OpenAttention)
        torch.testing.assert_close(opened(states, states, states, attn_mask=mask)[0], expected)
        with pytest.raises(ValueError, match="self-attention"):
            opened(states, states + 1, states)
    close_attention(root)
    assert root[0] is closed
    with pytest.raises(ValueError, match="only packed, batch-first"):
        OpenAttention(nn.MultiheadAttention(16, 4))


def test_what_cannot_be_trained_is_refused(make: Callable[[str], Encoder]) -> None:
    with pytest.raises(ValidationError, match="frozen_towers has both towers"):
        TuningConfig(frozen_towers=("image", "text"))
    with pytest.raises(EncoderError, match=r"last_n is 3, but the image tower .* has 2 blocks"):
        prepare_tuning(make("clip"), TuningConfig(mode="last-n", last_n=3))
    with pytest.raises(EncoderError, match="no tower but the frozen text one"):
        prepare_tuning(make("bert"), TuningConfig(mode="lora", frozen_towers=("text",)))
    hidden = small_clip.small_encoder(
        {**small_clip.SMALL, "custom_text": True, "text_cfg": {**small_clip.TEXT, "embed_cls": True}}
    )
    assert prepare_tuning(hidden, TuningConfig()).trainable
    with pytest.raises(EncoderError, match="shows no text tower of blocks: its text tower appends a token"):
        prepare_tuning(hidden, TuningConfig(mode="last-n"))
