"""What every registered recommender must do, whatever its paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from recommenders.errors import RecommenderError
from recommenders.evaluation import EvaluationConfig, evaluate
from recommenders.feature_input import FeatureTable
from recommenders.interactions import Interactions
from recommenders.models.base import Recommender
from recommenders.models.registry import MODELS, Setting, build_model, model_config
from recommenders.sampling import Batch
from recommenders.settings import left_out
from recommenders.training import TrainingConfig, train
from tests.worlds import World, random_world, two_clubs

N_USERS, N_ITEMS = 11, 17  # unlike each other and every width, so that a mixed-up axis shows
SMALL: dict[str, dict[str, int]] = {
    "popularity": {},
    "random": {},
    "itemknn": {"k": 16},
    "ease": {"l2": 2},
    "itemknn_content": {"k": 3},
    "bpr": {"dim": 4},
    "lightgcn": {"dim": 4},
    "layergcn": {"dim": 4},
    "vbpr": {"dim": 4, "content_dim": 3},
    "bm3": {"dim": 4, "dropout": 0},
    "selfcf": {"dim": 4},
    "pgl": {"dim": 4, "k": 4},
    "grcn": {"dim": 4, "content_dim": 3},
    "damrs": {"dim": 4, "n_positives": 3},
    "dragon": {"dim": 4, "hidden_dim": 5, "k": 4},
    "dualgnn": {"dim": 4, "hidden_dim": 5},
    "lgmrec": {"dim": 4, "n_hyperedges": 3, "dropout": 0},
    "smore": {"dim": 4, "k": 4},
    "mgcn": {"dim": 4, "k": 4},
    "mmgcn": {"dim": 4, "latent_dim": 5},
    "mmgcf": {"dim": 4},
    "mvgae": {"dim": 4, "latent_dim": 5, "dropout": 0},
    "mmgcl": {"dim": 4},
    "slmrec": {"dim": 4},
    "lattice": {"dim": 4, "feature_dim": 3, "k": 4},
    "freedom": {"dim": 4, "k": 4},
}
ONLY_RANKING: dict[str, dict[str, Setting]] = {
    "damrs": {"denoise": False, "preference_weight": 0, "relation_weight": 0},
    "freedom": {"feature_weight": 0},
    "mmgcl": {"ssl_weight": 0},
    "mvgae": {"expert_weight": 0},
    "slmrec": {"ssl_weight": 0, "main_loss": "bpr"},
}
"""Settings without which the loss is more than BPR on the scores."""
NAMES = sorted(MODELS)
READERS = [name for name in NAMES if MODELS[name].model.needs_features]
OTHERS = [name for name in NAMES if name not in READERS]
NOTHING = FeatureTable()
WITHOUT_NEGATIVES = {"bm3", "selfcf"}
"""Models whose loss is no BPR and touches no negative."""
NEGATIVES_UNTOUCHED = WITHOUT_NEGATIVES | {"slmrec"}
"""The same, and models whose default is to tell the positives of a batch apart."""
READ_WHILE_TRAINING = {"bm3"}
"""Models that learn from features, and compute no score from them."""


@pytest.fixture
def world() -> World:
    return random_world(N_USERS, N_ITEMS)


def build(name: str, train: Interactions, features: FeatureTable, seed: int = 0) -> Recommender:
    return build_model(name, SMALL[name], train, features, np.random.default_rng(seed))


def batch_of(world: World, n_negatives: int = 2) -> Batch:
    """Eight training pairs with (arbitrary) negatives."""
    pairs = world.split.train.take(np.arange(8))
    negatives = np.random.default_rng(1).integers(N_ITEMS, size=(8, n_negatives))
    return Batch(*(torch.from_numpy(rows) for rows in (pairs.user_rows, pairs.item_rows, negatives)))


def all_scores(model: Recommender, features: FeatureTable) -> Tensor:
    return model.scorer(features)(torch.arange(model.n_users))


def is_trainable(name: str) -> bool:
    world = random_world(N_USERS, N_ITEMS)
    return build(name, world.split.train, world.features).is_trainable


TRAINABLE = [name for name in NAMES if is_trainable(name)]


def test_the_suite_covers_every_registered_model() -> None:
    assert sorted(SMALL) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_one_finite_row_of_all_items_per_user(name: str, world: World) -> None:
    scorer = build(name, world.split.train, world.features).scorer(world.features)
    scores = scorer(torch.tensor([3, 0, 3]))
    assert scores.shape == (3, N_ITEMS)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert not scores.requires_grad
    assert torch.equal(scores[0], scores[2])


@pytest.mark.parametrize("name", NAMES)
def test_scores_in_blocks_equal_scores_at_once(name: str, world: World) -> None:
    scorer = build(name, world.split.train, world.features).scorer(world.features)
    blocks = [scorer(rows) for rows in torch.arange(N_USERS).chunk(4)]
    torch.testing.assert_close(torch.cat(blocks), scorer(torch.arange(N_USERS)))


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_inner_products_of_the_embeddings(name: str, world: World) -> None:
    model = build(name, world.split.train, world.features)
    if model.scoring == "neighbours":
        with pytest.raises(TypeError, match="scorer"):
            model(world.features)
        return
    users, items = model(world.features)
    assert users.shape[0] == N_USERS
    assert items.shape == (N_ITEMS, users.shape[1])
    torch.testing.assert_close(all_scores(model, world.features), (users @ items.T).detach())


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_reaches_every_parameter(name: str, world: World) -> None:
    model = build(name, world.split.train, world.features)
    if not model.is_trainable:
        with pytest.raises(TypeError, match="no loss"):
            model.loss(batch_of(world), world.features)
        return
    loss = model.loss(batch_of(world), world.features)
    assert loss.shape == ()
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", [name for name in TRAINABLE if name not in WITHOUT_NEGATIVES])
def test_the_loss_agrees_with_the_embeddings(name: str, world: World) -> None:
    """The loss is computed on the batch alone; its scores are those of the embeddings of all."""
    settings = SMALL[name] | {"l2": 0} | ONLY_RANKING.get(name, {})
    model = build_model(name, settings, world.split.train, world.features, np.random.default_rng(0))
    model.eval()  # nothing is drawn at random
    scores = all_scores(model, world.features)
    losses, margins = [], []
    for item in range(1, N_ITEMS):
        batch = Batch(torch.tensor([2]), torch.tensor([item]), torch.tensor([[0]]))
        # An item against itself costs ln 2 and the penalties that no batch changes, such as that of E.
        tied = model.loss(replace(batch, negatives=batch.positives[:, None]), world.features)
        losses.append(float(model.loss(batch, world.features).detach() - tied.detach()))
        margins.append(float(scores[2, item] - scores[2, 0]))
    expected = np.log1p(np.exp(-np.array(margins))) - np.log(2)
    np.testing.assert_allclose(losses, expected, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in READERS if name in TRAINABLE])
def test_gradient_flows_from_the_loss_to_the_features_of_the_batch(name: str, world: World) -> None:
    model = build(name, world.split.train, world.features)
    live = {name: table.clone().requires_grad_() for name, table in world.features.vectors.items()}
    batch = batch_of(world)
    model.loss(batch, FeatureTable(live, world.features.present)).backward()
    negatives = batch.negatives[:, : 0 if name in NEGATIVES_UNTOUCHED else None]
    in_batch = torch.cat([batch.positives, negatives.flatten()]).unique()
    for modality, table in live.items():
        assert table.grad is not None
        reached = table.grad.abs().sum(dim=1) > 0
        present = world.features.present[modality]  # a model may leave out what an absent row holds
        assert reached[in_batch[present[in_batch]]].all()


@pytest.mark.parametrize("name", TRAINABLE)
def test_negatives_change_the_loss_of_models_that_say_they_read_them(name: str, world: World) -> None:
    model = build(name, world.split.train, world.features)
    losses = []
    for negatives in ([[3], [4]], [[9], [12]]):
        torch.manual_seed(0)
        batch = Batch(torch.tensor([1, 2]), torch.tensor([5, 6]), torch.tensor(negatives))
        losses.append(float(model.loss(batch, world.features).detach()))
    assert model.reads_negatives == (name not in NEGATIVES_UNTOUCHED)
    assert (losses[0] != losses[1]) == model.reads_negatives


@pytest.mark.parametrize("name", [name for name in READERS if name not in READ_WHILE_TRAINING])
def test_other_features_give_other_scores(name: str, world: World) -> None:
    model = build(name, world.split.train, world.features)
    others = random_world(N_USERS, N_ITEMS, seed=1).features
    assert not torch.allclose(all_scores(model, world.features), all_scores(model, others))


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_read_no_features_need_none_and_ignore_them(name: str, world: World) -> None:
    without = build(name, world.split.train, NOTHING)
    given = build(name, world.split.train, world.features)
    assert torch.equal(all_scores(without, NOTHING), all_scores(given, world.features))


@pytest.mark.parametrize("name", READERS)
def test_models_that_read_features_say_so_when_there_are_none(name: str, world: World) -> None:
    with pytest.raises(RecommenderError, match=r"given none.*name a feature set"):
        build(name, world.split.train, NOTHING)


@pytest.mark.parametrize("name", READERS)
def test_features_of_another_number_of_items_are_refused(name: str, world: World) -> None:
    fewer = random_world(N_USERS, N_ITEMS - 1).features
    with pytest.raises(RecommenderError, match="features of 16 items, interactions of 17"):
        build(name, world.split.train, fewer)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("modalities", [("text",), ("image", "text", "fused")])
def test_any_number_of_modalities_will_do(name: str, modalities: tuple[str, ...], world: World) -> None:
    generator = torch.Generator().manual_seed(0)
    tables = {
        modality: torch.randn(N_ITEMS, width, generator=generator)
        for modality, width in zip(modalities, (5, 6, 7), strict=False)
    }
    everywhere = {modality: torch.ones(N_ITEMS, dtype=torch.bool) for modality in modalities}
    features = FeatureTable(tables, everywhere)
    model = build(name, world.split.train, features)
    assert all_scores(model, features).isfinite().all()
    if model.is_trainable:
        assert model.loss(batch_of(world), features).isfinite()


@pytest.mark.parametrize("name", READERS)
def test_absent_rows_of_zeros_leave_scores_and_loss_finite(name: str, world: World) -> None:
    vectors = {modality: table.clone() for modality, table in world.features.vectors.items()}
    present = {modality: mask.clone() for modality, mask in world.features.present.items()}
    for modality, rows in (("image", [0, 3, 5]), ("text", [3, 4])):  # item 3 has neither
        vectors[modality][rows] = 0
        present[modality][rows] = False
    features = FeatureTable(vectors, present)
    model = build(name, world.split.train, features)
    assert all_scores(model, features).isfinite().all()
    if model.is_trainable:
        model.loss(batch_of(world), features).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", READERS)
def test_float16_features_score_like_float32_ones(name: str, world: World) -> None:
    halves = {modality: table.half() for modality, table in world.features.vectors.items()}
    floats = {modality: table.float() for modality, table in halves.items()}
    present = world.features.present
    model = build(name, world.split.train, world.features)
    in_half = all_scores(model, FeatureTable(halves, present))
    torch.testing.assert_close(in_half, all_scores(model, FeatureTable(floats, present)))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_permuted_items_get_permuted_scores(name: str, world: World) -> None:
    order = np.random.default_rng(2).permutation(N_ITEMS)  # new row r holds what was item order[r]
    new_row = np.argsort(order)
    train = world.split.train
    moved_train = Interactions(train.user_rows, new_row[train.item_rows], N_USERS, N_ITEMS)
    moved_features = FeatureTable(
        {modality: table[order] for modality, table in world.features.vectors.items()},
        {modality: mask[order] for modality, mask in world.features.present.items()},
    )
    model = build(name, train, world.features)
    moved = build(name, moved_train, moved_features)
    with torch.no_grad():
        for parameter, source in zip(moved.parameters(), model.parameters(), strict=True):
            nodes = {N_ITEMS: order, N_USERS + N_ITEMS: np.concatenate([np.arange(N_USERS), N_USERS + order])}
            rows = nodes.get(len(source), np.arange(len(source)))
            parameter.copy_(source[torch.from_numpy(rows)])
    torch.testing.assert_close(
        all_scores(moved, moved_features), all_scores(model, world.features)[:, torch.from_numpy(order)]
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_first_parameters(name: str, world: World) -> None:
    first, again, other = (build(name, world.split.train, world.features, seed) for seed in (0, 0, 1))
    assert torch.equal(all_scores(first, world.features), all_scores(again, world.features))
    if first.is_trainable:
        assert not torch.equal(all_scores(first, world.features), all_scores(other, world.features))


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_is_saved_and_loaded_gives_equal_scores(name: str, world: World, tmp_path: Path) -> None:
    model = build(name, world.split.train, world.features)
    if model.is_trainable:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        model.loss(batch_of(world), world.features).backward()
        optimizer.step()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = build(name, world.split.train, world.features, seed=1)
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(all_scores(other, world.features), all_scores(model, world.features))


@pytest.mark.parametrize("name", NAMES)
def test_users_and_items_without_training_pairs_are_scored(name: str, world: World) -> None:
    full = world.split.train
    train = full.take((full.user_rows != 1) & (full.item_rows != 2))
    scores = all_scores(build(name, train, world.features), world.features)
    assert scores.shape == (N_USERS, N_ITEMS)
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"popularity", "random"}])
def test_in_two_clubs_the_held_out_items_rank_first(name: str) -> None:
    world = two_clubs(n_users=32, n_items=16)
    settings = SMALL[name] | ({"k": 7} if name.startswith("itemknn") else {"l2": 0.3})
    model = build_model(name, settings, world.split.train, world.features, np.random.default_rng(0))
    evaluation = EvaluationConfig(ks=(2,))
    config = TrainingConfig(epochs=30, batch_size=32, learning_rate=0.03, monitor="ndcg@2", patience=0)
    rng = np.random.default_rng(1)
    train(model, world.split.train, world.split.valid, world.features, config, evaluation=evaluation, rng=rng)
    for part in (world.split.valid, world.split.test):
        # Two items of a user's club are unseen, this one and the other part's: they precede the other club's.
        found = evaluate(model.scorer(world.features), part, world.split.train, evaluation)
        assert found.metrics["recall@2"] == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_scores_and_gradients_of_the_cpu(name: str, world: World) -> None:
    on_cpu = build(name, world.split.train, world.features)
    on_gpu = build(name, world.split.train, world.features).to("cuda")
    table = world.features.to("cuda")
    scores = on_gpu.scorer(table)(torch.arange(N_USERS, device="cuda")).cpu()
    torch.testing.assert_close(scores, all_scores(on_cpu, world.features), rtol=1e-4, atol=1e-5)
    if not on_cpu.is_trainable:
        return
    batch = batch_of(world)
    on_cpu.loss(batch, world.features).backward()
    moved = Batch(batch.users.cuda(), batch.positives.cuda(), batch.negatives.cuda())
    on_gpu.loss(moved, table).backward()
    for cpu, gpu in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        assert cpu.grad is not None
        assert gpu.grad is not None
        torch.testing.assert_close(gpu.grad.cpu(), cpu.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_says_what_it_means(name: str) -> None:
    for setting, field in MODELS[name].config.model_fields.items():
        assert field.description, setting
        assert not field.is_required(), setting


@pytest.mark.parametrize("name", [name for name in NAMES if MODELS[name].config.model_fields])
def test_a_misspelt_setting_is_refused_with_the_nearest_name(name: str) -> None:
    setting = next(iter(MODELS[name].config.model_fields))
    with pytest.raises(RecommenderError, match=f"no setting '{setting}s'.*Did you mean '{setting}'"):
        model_config(name, {f"{setting}s": 3})


def test_a_setting_of_a_model_without_settings_is_refused() -> None:
    with pytest.raises(RecommenderError, match="popularity has no setting 'dim'; its settings: none"):
        model_config("popularity", {"dim": 3})


def test_every_wrong_setting_is_named_with_what_it_means() -> None:
    with pytest.raises(RecommenderError) as caught:
        model_config("bpr", {"dim": 0, "l2": "much", "learning_rate": 1})
    for part in ("bpr: dim: Input should be greater than 0", "bpr: l2:", "Weight of", "'learning_rate'"):
        assert part in str(caught.value)


def test_settings_as_typed_on_a_command_line_are_numbers() -> None:
    config = model_config("bpr", {"dim": "16", "l2": "1e-3", "item_bias": "true"})
    assert isinstance(config, BaseModel)
    assert config.model_dump(exclude=left_out(config)) == {"dim": 16, "l2": 1e-3, "item_bias": True}


def test_an_unknown_model_is_refused_with_what_exists() -> None:
    with pytest.raises(RecommenderError, match=r"known models: popularity, .*Did you mean 'lightgcn'"):
        model_config("light_gcn", {})
