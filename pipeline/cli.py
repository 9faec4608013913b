"""The command line's stages: arguments -> a stage. A command imports what it needs when it runs."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipeline.console import (
    DEFAULT_STORE,
    ForceOption,
    JsonOption,
    NameOption,
    Output,
    SetOption,
    StoreOption,
    open_store,
    run_app,
    table,
)

if TYPE_CHECKING:
    from pipeline.stages.result import StageResult
    from pipeline.store import Artefact, Store

app = typer.Typer(
    name="tandem",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Multimodal recommendation in two stages: encode a catalogue once, index it, train recommenders "
    "on the cached features and compare them honestly.",
)

STAGES = "One stage at a time"


def _finish(out: Output, store: Store, result: StageResult, name: str) -> None:
    """Name a stage's artefact if a name was given, and show it."""
    if name:
        store.name(name, result.artefact)
    out.show(result.to_json(), result.line())


@app.command(rich_help_panel=STAGES)
def dataset(
    config: Annotated[
        Path | None, typer.Argument(help="YAML file of a dataset; without it, the demo catalogue.")
    ] = None,
    set_: SetOption = None,
    name: NameOption = "",
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Import, filter and split a dataset.

    Examples: `tandem dataset shop.yaml --name shop` · `tandem dataset --set demo.n_items=300`
    """
    from pipeline.config import load_config, parse_config, with_overrides
    from pipeline.datasets.config import DatasetConfig
    from pipeline.stages.prepare_dataset import prepare_dataset

    out = Output(as_json=json)
    overrides = set_ or []
    if config is None:
        settings = parse_config(with_overrides({}, overrides), DatasetConfig, "--set")
    else:
        settings = load_config(config, DatasetConfig, overrides)
    opened = open_store(store, out)
    _finish(out, opened, prepare_dataset(opened, settings, reporter=out.reporter, force=force), name)


@app.command(rich_help_panel=STAGES)
def finetune(
    dataset: Annotated[str, typer.Argument(help="Name, key or folder of a dataset artefact.")],
    encoder: Annotated[str, typer.Option(help="What is tuned; `tandem encoders` lists the forms.")] = "tiny",
    epochs: Annotated[int, typer.Option(min=1, help="Most passes over the items.")] = 10,
    batch_size: Annotated[int, typer.Option(min=2, help="Items contrasted with each other.")] = 256,
    mode: Annotated[
        Literal["full", "last-n", "lora"], typer.Option(help="Which parameters are trained.")
    ] = "full",
    seed: Annotated[int, typer.Option(min=0, help="Of held-out items, order and augmentation.")] = 0,
    name: NameOption = "",
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune an encoder on a dataset's pictures and texts, the epoch chosen on held-out items.

    Stopped or killed, the same command goes on from its last checkpoint.

    Examples: `tandem finetune shop --encoder open_clip/ViT-B-32:openai --epochs 5 --name tuned-clip`, then
    `tandem extract shop --encoder store/tuned-clip --modality image` · `tandem finetune shop --mode lora
    --set finetuning.objectives.co_purchase=0.5 --set finetuning.optimizer.learning_rate=1e-4`
    """
    from pipeline.config import parse_config, with_overrides
    from pipeline.stages.finetune_encoder import FinetuneSettings, finetune_encoder

    out = Output(as_json=json)
    raw = {
        "encoder": encoder,
        "seed": seed,
        "finetuning": {"epochs": epochs, "batch_size": batch_size, "tuning": {"mode": mode}},
    }
    settings = parse_config(with_overrides(raw, set_ or []), FinetuneSettings, "--set")
    opened = open_store(store, out)
    result = finetune_encoder(opened, dataset, settings, reporter=out.reporter, force=force)
    _finish(out, opened, result, name)


@app.command(rich_help_panel=STAGES)
def extract(
    dataset: Annotated[str, typer.Argument(help="Name, key or folder of a dataset artefact.")],
    encoder: Annotated[str, typer.Option(help="What encodes; `tandem encoders` lists the forms.")] = "tiny",
    modality: Annotated[Literal["image", "text", "fused"], typer.Option(help="What is encoded.")] = "image",
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Try the unreadable rows of these features again, and only those."
        ),
    ] = False,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Encode this share only, counted from 0; the last worker of all puts the features together.",
        ),
    ] = "",
    name: NameOption = "",
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Encode a dataset's pictures or texts once and cache the embeddings.

    Examples: `tandem extract shop --encoder open_clip/ViT-B-32:openai --modality image` ·
    `tandem extract shop --encoder tiny --modality text --set 'text.fields=[title]'`

    On two machines that share a store: `tandem extract shop --store s3://bucket/tandem --shard 0/2` on one,
    the same with `--shard 1/2` on the other.
    """
    from pipeline.config import parse_config, with_overrides
    from pipeline.stages.extract_features import FeaturesConfig, extract_features

    out = Output(as_json=json)
    raw = with_overrides({"encoder": encoder, "modality": modality}, set_ or [])
    config = parse_config(raw, FeaturesConfig, "--set")
    if shard:
        from features.sharding import Shard
        from pipeline.stages.extract_shards import ShardsMissing, extract_shard

        share = Shard.parse(shard)
        opened = open_store(store, out)
        outcome = extract_shard(
            opened,
            dataset,
            config,
            share,
            reporter=out.reporter,
            force=force,
            retry_failed=retry_failed,
        )
        if isinstance(outcome, ShardsMissing):
            out.show(outcome.to_json(), outcome.line())
        else:
            _finish(out, opened, outcome, name)
        return
    opened = open_store(store, out)
    result = extract_features(
        opened, dataset, config, reporter=out.reporter, force=force, retry_failed=retry_failed
    )
    _finish(out, opened, result, name)


@app.command(rich_help_panel=STAGES)
def index(
    source: Annotated[str, typer.Argument(help="Feature artefact, or a run (its item embeddings).")],
    name: NameOption = "",
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Build a FAISS index and measure its recall against exact search.

    Example: `tandem index tiny-image --set kind=hnsw`
    """
    from features.indexing import IndexConfig
    from pipeline.config import parse_config, with_overrides
    from pipeline.stages.build_index import build_index

    out = Output(as_json=json)
    settings = parse_config(with_overrides({}, set_ or []), IndexConfig, "--set")
    opened = open_store(store, out)
    _finish(out, opened, build_index(opened, source, settings, reporter=out.reporter, force=force), name)


@app.command(rich_help_panel=STAGES)
def train(
    dataset: Annotated[str, typer.Argument(help="Name, key or folder of a dataset artefact.")],
    features: Annotated[
        list[str] | None,
        typer.Option("--features", "-f", help="A feature artefact to read; repeat for more of them."),
    ] = None,
    model: Annotated[str, typer.Option(help="`tandem recommenders` lists them.")] = "vbpr",
    seed: Annotated[int, typer.Option(help="Of initial parameters, sampling and order.")] = 0,
    search: Annotated[
        str, typer.Option(help="Search whose choice is trained, with its model and settings.")
    ] = "",
    name: NameOption = "",
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Train one recommender on cached features and measure it.

    Examples: `tandem train shop -f tiny-image -f tiny-text --model vbpr --set training.epochs=50` ·
    `tandem train shop -f tiny-image --search tuned-vbpr --seed 1`
    """
    from pipeline.config import parse_config, with_overrides
    from pipeline.stages.train_recommender import RunSettings, searched_settings, train_recommender

    out = Output(as_json=json)
    opened = open_store(store, out)
    raw: dict[str, Any] = {"model": model}
    if search:
        raw = searched_settings(opened.get(search, "search")).model_dump(mode="json")
    settings = parse_config(with_overrides(raw | {"seed": seed}, set_ or []), RunSettings, "--set")
    result = train_recommender(
        opened, dataset, features or [], settings, search=search, reporter=out.reporter, force=force
    )
    _finish(out, opened, result, name)


@app.command(rich_help_panel=STAGES)
def search(
    dataset: Annotated[str, typer.Argument(help="Name, key or folder of a dataset artefact.")],
    features: Annotated[
        list[str] | None,
        typer.Option("--features", "-f", help="A feature artefact to read; repeat for more of them."),
    ] = None,
    model: Annotated[str, typer.Option(help="`tandem recommenders` lists them.")] = "vbpr",
    trials: Annotated[int, typer.Option(min=1, help="Settings to try.")] = 20,
    method: Annotated[Literal["grid", "random", "tpe"], typer.Option(help="How they are drawn.")] = "tpe",
    seed: Annotated[int, typer.Option(help="Of training, the same in every trial.")] = 0,
    name: NameOption = "",
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Search one recommender's settings on validation; the test part is never read.

    Stopped or killed, the same command goes on with the finished trials.

    Examples: `tandem search shop -f tiny-image -f tiny-text --model vbpr --trials 20 --name tuned-vbpr` ·
    `tandem search shop --model bpr --method grid --set 'search.ranges.bpr.l2=[0.1, 0.01]'`, then
    `tandem train shop -f tiny-image -f tiny-text --search tuned-vbpr`
    """
    from pipeline.config import parse_config, with_overrides
    from pipeline.searching import search_document, search_table
    from pipeline.stages.search_recommender import SearchSettings, search_recommender

    out = Output(as_json=json)
    raw = {"model": model, "seed": seed, "search": {"n_trials": trials, "method": method}}
    settings = parse_config(with_overrides(raw, set_ or []), SearchSettings, "--set")
    opened = open_store(store, out)
    result = search_recommender(opened, dataset, features or [], settings, reporter=out.reporter, force=force)
    if name:
        opened.name(name, result.artefact)
    if out.as_json:
        out.show({**result.to_json(), **search_document(result.artefact)})
    else:
        out.console.print(search_table(result.artefact))
        out.show({}, result.line())


@app.command(rich_help_panel=STAGES)
def compare(
    runs: Annotated[list[str], typer.Argument(help="Runs to compare: names, keys or folders.")],
    name: NameOption = "",
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Compare runs: mean and spread over seeds, intervals, paired tests, floors, costs."""
    from pipeline.comparison.config import ComparisonConfig
    from pipeline.config import parse_config, with_overrides
    from pipeline.stages.compare_features import compare_features

    out = Output(as_json=json)
    settings = parse_config(with_overrides({}, set_ or []), ComparisonConfig, "--set")
    opened = open_store(store, out)
    result = compare_features(opened, runs, settings, reporter=out.reporter, force=force)
    if name:
        opened.name(name, result.artefact)
    show_comparison(out, result.artefact, result.to_json())


def show_comparison(out: Output, comparison: Artefact, document: dict[str, Any]) -> None:
    """Print a comparison's tables to a person, or a document to a program."""
    from pipeline.comparison.render import to_terminal
    from pipeline.stages.compare_features import restore_comparison

    if out.as_json:
        out.show(document)
    else:
        out.console.print(to_terminal(restore_comparison(comparison)))


@app.command(rich_help_panel=STAGES)
def encoders(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """List the presets and the forms of an encoder's specification, with the feature sets in the store.

    A preset's name stands for its specification wherever an encoder is asked for.
    """
    from features.encoders.presets import presets
    from features.encoders.registry import FAMILIES, OF_A_CATALOGUE
    from pipeline.encoder_specs import stored_spec
    from pipeline.encoder_tables import preset_table

    out = Output(as_json=json)
    opened = open_store(store, out)
    cached = Counter(str(a.manifest.parameters["encoder"]) for a in opened.list("features"))
    named = {name: cached.pop(name, 0) for name in presets()}
    families = [*FAMILIES.values(), *OF_A_CATALOGUE.values()]
    examples = [family.example for family in families] + ["shuffled:tiny", "given"]
    examples += [stored_spec(artefact) for artefact in opened.list("encoder")] or ["store/<encoder artefact>"]
    forms = [{"spec": spec, "cached": cached.pop(spec, 0)} for spec in examples]
    forms += [{"spec": spec, "cached": count} for spec, count in sorted(cached.items())]
    if out.as_json:
        listed = [
            {"preset": name, **preset.model_dump(mode="json"), "cached": named[name]}
            for name, preset in presets().items()
        ]
        out.show({"presets": listed, "forms": forms})
        return
    out.console.print(preset_table(named))
    rows = [(form["spec"], form["cached"] or "") for form in forms]
    out.console.print()
    out.console.print(table("Forms of a specification", ("for example", "feature sets in the store"), rows))


@app.command(rich_help_panel=STAGES)
def recommenders(
    name: Annotated[str, typer.Argument(help="Show the settings of this one; all are listed without.")] = "",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """List the recommenders with paper, settings and how many runs the store holds; or one, in full.

    Examples: `tandem recommenders` · `tandem recommenders vbpr`
    """
    from pipeline.recommender_tables import described, every_setting, listed

    out = Output(as_json=json)
    if name:
        document = described(name)
        columns = ("setting", "default", "meaning")
        out.show(document, table(str(document["title"] or name), columns, every_setting(document)))
        return
    runs = Counter(str(a.manifest.parameters["model"]) for a in open_store(store, out).list("run"))
    documents = listed(runs)
    rows = [
        (
            document["model"],
            document["paper"],
            document["reads"],
            document["runs"] or "",
            ", ".join(f"{key} {value}" for key, value in document["settings"].items()),
        )
        for document in documents
    ]
    out.show(documents, table("Recommenders", ("model", "paper", "reads", "runs", "settings"), rows))


@app.command("train-tiny", rich_help_panel=STAGES)
def train_tiny_(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the encoder's files into this folder.")
    ] = None,
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Train the shipped encoder `tiny` again, on rendered pairs of seeds that no demo catalogue uses.

    Example: `tandem train-tiny -o features/encoders/tiny` makes the files that are shipped.
    """
    from pipeline.config import parse_config, with_overrides
    from pipeline.stages.train_tiny import TrainTinyConfig, keep_tiny

    out = Output(as_json=json)
    settings = parse_config(with_overrides({}, set_ or []), TrainTinyConfig, "--set")
    result = keep_tiny(open_store(store, out), settings, reporter=out.reporter, force=force)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        for path in result.artefact.paths():
            shutil.copyfile(path, output / path.name)
    out.show(result.to_json(), result.line())


def main() -> None:
    """Run the command line without flows."""
    raise SystemExit(run_app(app))
