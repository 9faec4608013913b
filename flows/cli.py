"""The command `tandem`: all of ``pipeline.cli``, and what runs whole configurations, under Prefect or not."""

from __future__ import annotations

import logging
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows import cli_deploy  # noqa: F401 - it adds its command to the app
from pipeline import cli_queries, cli_store  # noqa: F401 - they add theirs
from pipeline.cli import app, show_comparison
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
)

if TYPE_CHECKING:
    from pipeline.config import RunConfig

WHOLE = "The whole pipeline"

PrefectOption = Annotated[
    bool,
    typer.Option(
        "--prefect/--no-prefect",
        help="Run as Prefect flows (on the server of `tandem up` if it is there), or as plain functions.",
    ),
]


@app.command(rich_help_panel=WHOLE)
def demo(
    set_: SetOption = None,
    prefect: PrefectOption = False,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Run the two-stage pipeline on a rendered catalogue whose right answer is known.

    Examples: `tandem demo` · `tandem demo --prefect` · `tandem demo --set dataset.demo.n_items=300`
    """
    from pipeline.config import RunConfig, load_config

    config = load_config(Path(str(files("pipeline") / "configs" / "demo.yaml")), RunConfig, set_ or [])
    _run(config, prefect=prefect, store=store, force=force, json=json)


@app.command(rich_help_panel=WHOLE)
def run(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a whole run; docs/configuration.md explains it.")
    ],
    set_: SetOption = None,
    prefect: PrefectOption = True,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Run a whole configuration; stages whose artefacts exist are reused.

    Examples: `tandem run shop.yaml` · `tandem run shop.yaml --no-prefect --set seeds='[0, 1]'`
    """
    from pipeline.config import RunConfig, load_config

    _run(load_config(config, RunConfig, set_ or []), prefect=prefect, store=store, force=force, json=json)


@app.command(rich_help_panel=WHOLE)
def knockout(
    config: Annotated[
        Path, typer.Argument(help="YAML file of a whole run with one feature set; see docs/knockout.md.")
    ],
    out_file: Annotated[
        Path | None, typer.Option("--out", "-o", help="Also write the table as Markdown to this file.")
    ] = None,
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Replace each modality by noise, shuffled or constant features, or leave it out; show what is lost.

    Examples: `tandem knockout shop.yaml` · `tandem knockout shop.yaml --set seeds='[0, 1]' -o table.md`
    """
    from pipeline.config import RunConfig, load_config
    from pipeline.encoder_specs import resolve_encoder
    from pipeline.knockout import knockout_config, knockout_results, to_json, to_markdown, to_table
    from pipeline.two_stage import PlainStages, run_two_stage

    out = Output(as_json=json)
    opened = open_store(store, out)
    wanted, found = knockout_config(
        load_config(config, RunConfig, set_ or []), lambda spec: resolve_encoder(opened, spec).describe()
    )
    stages = PlainStages(opened, out.reporter, force=force)
    result = run_two_stage(wanted, stages, lambda stage: out.reporter.say(stage.line()))
    assert result.comparison is not None  # noqa: S101 - a finished run has one
    opened.name(wanted.name, result.comparison.artefact)
    results = knockout_results(wanted, found, result)
    if out_file is not None:
        out_file.write_text(to_markdown(results, wanted), encoding="utf-8")
    document = {"knockouts": to_json(results), "comparison": result.comparison.artefact.ref}
    out.show(document, to_table(results, wanted))


@app.command(rich_help_panel=WHOLE)
def paradigms(
    config: Annotated[Path, typer.Argument(help="YAML file of a study; docs/paradigms.md explains it.")],
    out_file: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write answers and table as Markdown to this file."),
    ] = None,
    set_: SetOption = None,
    prefect: PrefectOption = False,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Compare specific, pre-trained, fine-tuned and jointly trained encoders under the same recommenders.

    Stopped or killed, the same command goes on with what is missing.

    Examples: `tandem paradigms study.yaml -o table.md` ·
    `tandem paradigms study.yaml --set 'paradigms=[pretrained, finetuned]' --set seeds='[0]'`
    """
    from pipeline.config import load_config
    from pipeline.paradigms.config import ParadigmsConfig
    from pipeline.paradigms.render import answer_lines, notes, to_json, to_markdown, to_table
    from pipeline.paradigms.table import make_table, measure
    from pipeline.paradigms.way import PlainParadigmStages, run_paradigms

    out = Output(as_json=json)
    opened = open_store(store, out)
    wanted = load_config(config, ParadigmsConfig, set_ or [])
    if prefect:
        from flows.running import run_paradigms_with_prefect

        result = run_paradigms_with_prefect(wanted, opened, force=force, reporter=out.reporter)
    else:
        stages = PlainParadigmStages(opened, out.reporter, force=force)
        result = run_paradigms(wanted, stages, lambda stage: out.reporter.say(stage.line()))
    assert result.comparison is not None  # noqa: S101 - a finished study has one
    opened.name(wanted.name, result.comparison.artefact)
    metric = wanted.comparison.metric
    table = make_table([measure(one, metric) for one in result.contenders], wanted.comparison)
    if out_file is not None:
        out_file.write_text(to_markdown(table), encoding="utf-8")
    n_reused = sum(stage.reused for stage in result.stages)
    document = {
        **to_json(table),
        "comparison": result.comparison.artefact.ref,
        "stages": len(result.stages),
        "reused": n_reused,
    }
    out.show(document, to_table(table))
    if not json:
        out.show({}, "\n".join(["", *answer_lines(table), "", *notes(table)]))


@app.command(rich_help_panel=WHOLE)
def joint(
    dataset: Annotated[str, typer.Argument(help="Name, key or folder of a dataset artefact.")],
    encoder: Annotated[
        str, typer.Option(help="What is trained; `tandem encoders` lists the forms.")
    ] = "tiny",
    model: Annotated[str, typer.Option(help="`tandem recommenders` lists them.")] = "freedom",
    mode: Annotated[
        Literal["full", "last-n", "lora", "side"],
        typer.Option(help="Which of the encoder's parameters are trained; side: small networks beside it."),
    ] = "full",
    features: Annotated[
        list[str] | None,
        typer.Option("--features", "-f", help="A feature artefact to read, too, that stays as it is."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    name: NameOption = "",
    set_: SetOption = None,
    prefect: PrefectOption = False,
    store: StoreOption = DEFAULT_STORE,
    force: ForceOption = False,
    json: JsonOption = False,
) -> None:
    """Train an encoder and a recommender together: trained encoder, its features, a measured run, an index.

    Stopped or killed, the same command goes on from the last whole epoch.

    Examples: `tandem joint shop --encoder open_clip/ViT-B-32:openai --mode lora --name joint-clip` ·
    `tandem joint shop --model lattice --set joint.warmup_epochs=10 --set 'modalities=[text]'`
    """
    from pipeline.config import parse_config, with_overrides
    from pipeline.joint_way import JointWayConfig, PlainJointStages, run_joint

    out = Output(as_json=json)
    opened = open_store(store, out)
    how = {"trained": "side"} if mode == "side" else {"tuning": {"mode": mode}}
    raw = {"encoder": encoder, "model": model, "seed": seed, **how}
    wanted = parse_config(with_overrides(raw, set_ or []), JointWayConfig, "--set")
    say = out.reporter.say
    if prefect:
        from flows.running import run_joint_with_prefect

        result = run_joint_with_prefect(
            wanted, opened, dataset, beside=features or [], name=name, force=force, reporter=out.reporter
        )
    else:
        stages = PlainJointStages(opened, out.reporter, force=force)
        result = run_joint(
            wanted, stages, dataset, beside=features or [], done=lambda stage: say(stage.line())
        )
    assert result.encoder is not None  # noqa: S101 - a finished run has them
    assert result.run is not None  # noqa: S101
    if name:
        opened.name(name, result.encoder.artefact)
    from pipeline.encoder_specs import stored_spec

    spec = f"store/{name}" if name else stored_spec(result.encoder.artefact)
    figures = ", ".join(f"{key} {value}" for key, value in result.run.summary.items())
    out.show(
        {"encoder": spec, "stages": [stage.to_json() for stage in result.all()]},
        f"{result.run.artefact.ref}: {figures}\nThe encoder is {spec}.",
    )


@app.command(rich_help_panel=WHOLE)
def config(
    set_: SetOption = None,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Print a whole run's configuration with every setting, its default and its meaning.

    Example: `tandem config > shop.yaml`, then keep what you change.
    """
    from pipeline.config import RunConfig, parse_config, with_overrides
    from pipeline.config_template import template

    chosen = parse_config(with_overrides({}, set_ or []), RunConfig, "--set")
    head = f"# A run of the store {store}; every line that holds a default may go.\n"
    Output(as_json=json).show(chosen.model_dump(mode="json"), head + template(chosen).rstrip())


def _run(config: RunConfig, *, prefect: bool, store: str, force: bool, json: bool) -> None:
    from pipeline.two_stage import PlainStages, run_two_stage

    out = Output(as_json=json)
    opened = open_store(store, out)
    say = out.reporter.say
    if prefect:
        from flows.running import run_two_stage_with_prefect

        result = run_two_stage_with_prefect(config, opened, force=force, reporter=out.reporter)
    else:
        stages = PlainStages(opened, out.reporter, force=force)
        result = run_two_stage(config, stages, lambda stage: say(stage.line()))
    assert result.comparison is not None  # noqa: S101 - a finished run has one
    comparison = result.comparison.artefact
    opened.name(config.name, comparison)
    every = result.all()
    n_reused = sum(stage.reused for stage in every)
    say(f"{len(every)} stages, {n_reused} reused; the comparison is {config.name!r} in {opened.url}")
    document = {
        "stages": [stage.to_json() for stage in every],
        "reused": n_reused,
        "comparison": comparison.ref,
    }
    show_comparison(out, comparison, document)


@app.command(rich_help_panel=WHOLE)
def up(
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than 127.0.0.1 needs a login, see docs.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the UI and the API.")] = 4200,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Start the Prefect server with its UI, the deployments and a worker; Ctrl-C stops all of them."""
    from flows.server.up import ServerConfig, serve

    out = Output(as_json=json)
    opened = open_store(store, out)
    config = ServerConfig(host=host, port=port, store=opened.url)
    if json:  # one document once runs can be started; what happens besides goes to standard error
        serve(config, on_ready=lambda record: out.show(record.model_dump(mode="json")))
    else:
        serve(config, out.reporter.say)


@app.command(rich_help_panel=WHOLE)
def doctor(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Say what this machine can do: device, FAISS backend, versions, store, Prefect."""
    from flows.server.up import prefect_status
    from pipeline.doctor import examine

    out = Output(as_json=json)
    findings = examine(store)
    findings["prefect"] = prefect_status(store)
    lines = [f"{topic:<10} {finding}" for topic, finding in findings.items()]
    out.show(findings, "\n".join(lines))


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.WARNING, format="tandem: %(message)s")
    raise SystemExit(run_app(app))
