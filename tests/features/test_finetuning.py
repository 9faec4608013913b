"""Fine-tuning on a small catalogue: what is learnt, chosen, skipped, kept and gone on with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from features.catalogue import Catalogue
from features.errors import FeatureError
from features.finetuning.checkpoints import FILE_NAME
from features.finetuning.co_purchases import CoPurchases
from features.finetuning.config import FinetuningConfig
from features.finetuning.loop import FinetuningResult, finetune
from tests.features.small_encoder import SmallEncoder, small_catalogue

SEED = 5


def config(**changes: Any) -> FinetuningConfig:
    raw = {
        "epochs": 3,
        "batch_size": 8,
        "chunk_size": 3,
        "held_out_share": 0.2,
        "patience": 0,
        "optimizer": {"learning_rate": 0.02},
        **changes,
    }
    return FinetuningConfig.model_validate(raw)


def tune(
    catalogue: Catalogue, settings: FinetuningConfig | None = None, **more: Any
) -> tuple[SmallEncoder, FinetuningResult]:
    encoder = more.pop("encoder", None) or SmallEncoder()
    rng = np.random.default_rng(more.pop("seed", SEED))
    return encoder, finetune(encoder, catalogue, settings or config(), rng=rng, **more)


def weights(encoder: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in encoder.state_dict().items()}


def pairs_of(n_items: int) -> CoPurchases:
    """Users who each interacted with three items in a row."""
    users = np.repeat(np.arange(n_items - 2), 3)
    items = (np.arange(n_items - 2)[:, None] + np.arange(3)).ravel()
    pairs = np.stack([np.arange(n_items - 1), np.arange(1, n_items)], axis=1)
    return CoPurchases(pairs, np.ones(len(pairs)), users, items, n_items)


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    return small_catalogue(tmp_path_factory.mktemp("pictures"), 60)


class KilledError(Exception):
    """What a test ends a fine-tuning with."""


def killed_after(n_updates: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done == n_updates:
            raise KilledError

    return progress


def test_the_history_says_what_was_done(catalogue: Catalogue) -> None:
    _, result = tune(catalogue)
    assert result.counts["train"] + result.counts["held_out"] == 60
    frame = result.history_frame()
    assert frame["epoch"].to_list() == [0, 1, 2, 3]
    assert frame["loss"][0] is None  # epoch 0 is the encoder as it came
    assert frame["loss"][3] < frame["loss"][1]
    assert (frame["loss"][1:] == frame["loss_image_text"][1:]).all()
    assert (frame["gradient_norm"][1:] > 0).all()
    assert (frame["gradient_norm_image_text"][1:] > 0).all()
    assert frame["learning_rate"][3] < frame["learning_rate"][2] < 0.02
    measured = frame.select("image_to_text_recall@1", "image_to_text_recall@10").mean_horizontal()
    both = (
        measured + frame.select("text_to_image_recall@1", "text_to_image_recall@10").mean_horizontal()
    ) / 2
    np.testing.assert_allclose(frame["retrieval"], both)


def test_the_encoder_is_left_at_its_best_epoch(catalogue: Catalogue) -> None:
    """A rate that soon does harm: what comes out finds as much as the best epoch did, not the last."""
    harmful = config(optimizer={"learning_rate": 0.1, "warmup_share": 0.0}, held_out_share=0.5, epochs=6)
    encoder, result = tune(catalogue, harmful)
    scores = result.history_frame()["retrieval"]
    assert scores[-1] < scores.max()
    assert result.best_epoch == scores.arg_max()
    assert not encoder.training
    _, again = tune(catalogue, config(held_out_share=0.5, epochs=1), encoder=encoder)
    assert again.history[0]["retrieval"] == scores.max()


def test_patience_stops_and_zero_goes_on(catalogue: Catalogue) -> None:
    tiny_steps = {"learning_rate": 1e-12}
    _, result = tune(catalogue, config(epochs=6, patience=2, optimizer=tiny_steps))
    assert result.stopped_early
    assert [row["epoch"] for row in result.history] == [0, 1, 2]
    assert result.best_epoch == 0


@pytest.mark.parametrize("kill_at", [1, 8, 12, 13])
@pytest.mark.parametrize("objectives", [{}, {"image_text": 1.0, "co_purchase": 0.5}])
def test_killed_and_resumed_equals_uninterrupted(
    catalogue: Catalogue, tmp_path: Path, kill_at: int, objectives: dict[str, float]
) -> None:
    settings = config(
        checkpoint_steps=2, objectives=objectives, augment={"flip": 0.5, "crop_least_area": 0.6}
    )
    pairs = pairs_of(60)
    whole, expected = tune(catalogue, settings, co_purchases=pairs)
    assert len(expected.history) == 4
    with pytest.raises(KilledError):
        tune(
            catalogue,
            settings,
            co_purchases=pairs,
            checkpoint_folder=tmp_path,
            progress=killed_after(kill_at),
        )
    resumed, found = tune(catalogue, settings, co_purchases=pairs, checkpoint_folder=tmp_path)
    assert found.resumed_after == kill_at - kill_at % 2
    for name, value in weights(whole).items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    drop = "seconds"
    assert found.history_frame().drop(drop).equals(expected.history_frame().drop(drop))
    assert found.best_epoch == expected.best_epoch


def test_a_finished_one_is_not_done_again(catalogue: Catalogue, tmp_path: Path) -> None:
    first, _ = tune(catalogue, checkpoint_folder=tmp_path)
    again, result = tune(catalogue, checkpoint_folder=tmp_path, progress=killed_after(1))
    assert result.resumed_after > 0
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights(first).items())


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"settings": config(batch_size=9)}, "settings"),
        ({"seed": 6}, "random seeds"),
        ({"encoder": SmallEncoder(seed=1)}, "encoder"),
    ],
)
def test_a_checkpoint_of_another_one_is_refused(
    catalogue: Catalogue, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    with pytest.raises(KilledError):
        tune(catalogue, config(), checkpoint_folder=tmp_path, progress=killed_after(8))
    with pytest.raises(FeatureError, match=f"other .*{what}"):
        tune(catalogue, checkpoint_folder=tmp_path, **changes)


def test_a_damaged_checkpoint_is_refused(catalogue: Catalogue, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        tune(catalogue, checkpoint_folder=tmp_path, progress=killed_after(8))
    path = tmp_path / FILE_NAME
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FeatureError, match="do not match their checksum"):
        tune(catalogue, checkpoint_folder=tmp_path)


def test_chunks_change_nothing_and_neither_does_accumulation_of_one(catalogue: Catalogue) -> None:
    """Dropout off, so that a chunk draws what a whole batch would: nothing."""

    def run(chunk_size: int) -> SmallEncoder:
        encoder = SmallEncoder()
        encoder.dropout.p = 0.0
        return tune(catalogue, config(epochs=1, chunk_size=chunk_size), encoder=encoder)[0]

    whole, chunked = run(64), run(3)
    start = SmallEncoder()
    for name, value in chunked.named_parameters():
        assert not torch.equal(value, start.get_parameter(name))
        torch.testing.assert_close(value, whole.get_parameter(name), atol=1e-5, rtol=1e-5)


def test_accumulation_averages_batches_into_fewer_updates(catalogue: Catalogue) -> None:
    seen: list[int] = []
    tune(catalogue, config(epochs=1), progress=lambda done, total: seen.append(total))
    assert len(seen) == seen[0]
    accumulated: list[int] = []
    settings = config(epochs=1, accumulate=4)
    tune(catalogue, settings, progress=lambda done, total: accumulated.append(total))
    assert accumulated == [-(-seen[0] // 4)] * -(-seen[0] // 4)


def test_unreadable_and_missing_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    catalogue = small_catalogue(tmp_path, 30)
    (tmp_path / "3.png").write_bytes(b"no picture")
    (tmp_path / "4.png").unlink()
    items = catalogue.items.with_columns(
        title=catalogue.items["title"].scatter(7, None),  # type: ignore[arg-type]  # null is a value, too
    )
    _, result = tune(Catalogue(items, str(tmp_path)), config(epochs=1))
    assert result.counts["missing"] == 1
    assert result.counts["unreadable"] == 2
    assert sum(result.reasons.values()) == 2


def test_a_loss_that_is_no_number_stops_with_norms_and_advice(catalogue: Catalogue) -> None:
    encoder = SmallEncoder()
    with torch.no_grad():
        encoder.letters[:] = torch.nan
    message = r"the loss.* is nan in update 1 of \d+; .*letters nan.*Lower optimizer.learning_rate \(0.02\)"
    with pytest.raises(FeatureError, match=message):
        tune(catalogue, encoder=encoder)


def test_held_out_items_stay_held_out_when_the_catalogue_grows(tmp_path: Path) -> None:
    from features.catalogue import TextConfig
    from features.finetuning.items import TrainingItems

    def held_out(n_items: int) -> set[str]:
        grown = small_catalogue(tmp_path / str(n_items), n_items)
        items = TrainingItems(grown, SmallEncoder(), "fused", TextConfig(), config(), seed=1)
        assert not set(items.train) & set(items.held_out)
        return {grown.item_ids[row] for row in items.held_out}

    few, many = held_out(30), held_out(60)
    assert few == {name for name in many if int(name.removeprefix("item-")) < 30}
    assert 0 < len(few) < 15


def test_no_held_out_item_is_ever_in_a_batch(catalogue: Catalogue) -> None:
    from features.catalogue import TextConfig
    from features.finetuning.items import TrainingItems

    items = TrainingItems(catalogue, SmallEncoder(), "fused", TextConfig(), config(), seed=1)
    pairs = pairs_of(60).among(items.train)
    steps = items.steps(8, 4, pairs, (1,))
    assert sorted(np.concatenate([step.rows[: step.n_own] for step in steps])) == sorted(items.train)
    for step in steps:
        assert not set(step.rows) & set(items.held_out)
        assert set(step.pairs.ravel()) <= set(step.rows)


def test_pairs_alone_train_an_encoder_of_one_modality(catalogue: Catalogue) -> None:
    """Items that users share come closer; without texts, the last epoch is kept."""
    encoder = SmallEncoder()
    encoder.dropout.p = 0.0
    encoder.info = encoder.info.model_copy(update={"modalities": ("image",), "dims": {"image": 16}})
    before = weights(encoder)
    objectives = {"image_text": 0.0, "co_purchase": 1.0, "pairs": {"of": "image"}}
    pairs = pairs_of(60)
    _, result = tune(catalogue, config(objectives=objectives, epochs=9), encoder=encoder, co_purchases=pairs)
    assert result.best_epoch == 9
    assert "retrieval" not in result.history[-1]
    losses = [row["loss_co_purchase"] for row in result.history[1:]]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert torch.equal(before["letters"], encoder.letters)  # nobody asked for texts
    assert not torch.equal(before["image_weight"], encoder.image_weight)


def test_retrieval_chooses_nothing_where_pictures_and_texts_are_not_contrasted(catalogue: Catalogue) -> None:
    objectives = {"image_text": 0.0, "co_purchase": 1.0}
    settings = config(objectives=objectives, epochs=4, patience=1)
    _, result = tune(catalogue, settings, co_purchases=pairs_of(60))
    scores = [row["retrieval"] for row in result.history]
    assert len(scores) == 5  # measured, and patience is not asked
    assert scores.index(max(scores)) < 4
    assert result.best_epoch == 4


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"matching": 1.0}, "is no VLMo"),
        ({"co_purchase": 1.0}, "no training interactions were handed in"),
    ],
)
def test_objectives_that_cannot_be_served_are_refused(
    catalogue: Catalogue, objectives: dict[str, float], message: str
) -> None:
    with pytest.raises(FeatureError, match=message):
        tune(catalogue, config(objectives=objectives))


def test_bfloat16_learns_and_keeps_weights_of_float32(catalogue: Catalogue) -> None:
    def run(precision: str) -> tuple[SmallEncoder, FinetuningResult]:
        encoder = SmallEncoder()
        encoder.dropout.p = 0.0
        return tune(catalogue, config(epochs=1, precision=precision), encoder=encoder)

    (reduced, result), (_, expected) = run("bfloat16"), run("float32")
    assert (result.precision, expected.precision) == ("bfloat16", "float32")
    assert reduced.image_weight.dtype == torch.float32
    assert not torch.equal(reduced.image_weight, SmallEncoder().image_weight)
    loss, whole = result.history[1]["loss"], expected.history[1]["loss"]
    assert loss != whole
    assert loss == pytest.approx(whole, rel=0.02)


def test_half_precision_needs_a_gpu(catalogue: Catalogue) -> None:
    with pytest.raises(FeatureError, match="float16, which needs a GPU"):
        tune(catalogue, config(precision="float16"))
