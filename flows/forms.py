"""The forms of the flows: a title, a line and an example for each input, and choices where there are some.

A flow's signature says what it takes; this file says how that looks. Inputs are text, numbers, switches and
choices, never lists or nested objects: the page's dialogs lose those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from features.encoders.presets import presets
from pipeline.kept import configurations
from pipeline.manifest import KINDS
from recommenders.models.registry import MODELS

if TYPE_CHECKING:
    from prefect import Flow

    from pipeline.store import Store

NEWEST = 8
"""Artefacts of a kind that are offered beside those with a name."""
ENCODERS, RECOMMENDERS, CONFIGURATIONS = "encoders", "recommenders", "configurations"


@dataclass(frozen=True)
class Input:
    """How one input of a flow looks in its form."""

    title: str
    help: str
    example: str = ""
    choices: tuple[str, ...] = ()
    """What can be chosen, and nothing else."""
    offers: tuple[str, ...] = ()
    """Lists of `Choices` to choose from; anything else can be typed."""

    @property
    def description(self) -> str:
        """The line below the title."""
        return f"{self.help} Example: {self.example}" if self.example else self.help


@dataclass(frozen=True)
class Choices:
    """What a store and the registries offer at a moment."""

    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, offers: tuple[str, ...]) -> list[str]:
        """Return the lists of these names, one after the other, each entry once."""
        return list(dict.fromkeys(entry for name in offers for entry in self.lists.get(name, ())))


DATASET = Input(
    "Dataset", "Name or reference of a dataset; prepare-dataset makes one.", "shop", offers=("dataset",)
)
FEATURES = Input(
    "Features",
    "Features to read, several with commas; empty where the recommender reads none.",
    "shop-clip, shop-texts",
    offers=("features",),
)
ENCODER = Input(
    "Encoder",
    "A preset, a specification, or store/<name> for one that was trained here.",
    "open_clip/ViT-B-32:openai",
    offers=(ENCODERS,),
)
MODEL = Input("Recommender", "What is trained.", "vbpr", offers=(RECOMMENDERS,))
SEED = Input("Seed", "Of everything that is drawn; another seed is another run.")
NAME = Input("Name", "Keep the result under this name, for later stages to ask for.", "shop-clip")
FORCE = Input("Make it again", "Compute although the store has the result.")
STORE = Input(
    "Store", "Folder or address; empty for the store that the server was started with.", "s3://shop/tandem"
)


def _last(example: str) -> dict[str, Input]:
    """The inputs that end each form; settings with an example of the flow's own."""
    settings = Input("Settings", "Everything deeper, as YAML; the documentation lists the keys.", example)
    return {"settings": settings, "force": FORCE, "store": STORE}


CONFIGURATION = Input(
    "Configuration",
    "One that the store keeps, to start from; the fields below change it.",
    "nightly-shop",
    offers=(CONFIGURATIONS,),
)
STUDY = {
    "configuration": CONFIGURATION,
    "name": Input("Name of the comparison", "Where to find it in the store; empty: as configured.", "shop"),
    "items": Input(
        "Table of items", "Parquet, CSV or JSON Lines; empty: the demo catalogue.", "data/items.csv"
    ),
    "interactions": Input("Table of interactions", "A row for each user and item.", "data/orders.csv"),
    "pictures": Input("Folder of pictures", "Empty: the folder of the items.", "data/photos"),
    "encoders": Input(
        "Encoders to compare",
        "For pictures and texts, each a feature set; several with commas. Settings can set them apart.",
        "clip, random",
        offers=(ENCODERS,),
    ),
    "recommenders": Input(
        "Recommenders",
        "Trained on each feature set; several with commas.",
        "popularity, itemknn_content, vbpr",
    ),
    "seeds": Input("Number of seeds", "Runs of each recommender; 0: as configured (3).", "5"),
}
KEEP_AS = Input(
    "Keep as",
    "Also keep this form, filled in, as a deployment of this name, to be scheduled by a click.",
    "nightly-shop",
)

FORMS: dict[str, dict[str, Input]] = {
    "prepare-dataset": {
        "importer": Input(
            "Kind of source",
            "auto: tables where a table is named, else the demo catalogue.",
            choices=("auto", "demo", "tables", "mmrec", "lattice"),
        ),
        "items": Input(
            "Table of items",
            "Parquet, CSV or JSON Lines; for mmrec and lattice the data set's folder.",
            "data/items.csv",
        ),
        "interactions": Input("Table of interactions", "A row for each user and item.", "data/orders.csv"),
        "item_id": Input("Column of the item", "In both tables.", "sku"),
        "user_id": Input("Column of the user", "In the interactions.", "customer"),
        "pictures": Input("Folder of pictures", "Empty: the folder of the items.", "data/photos"),
        "name": NAME,
        **_last("split: {rule: leave_last_out}"),
    },
    "extract-features": {
        "dataset": DATASET,
        "encoder": ENCODER,
        "modality": Input(
            "Modality", "What is encoded: picture, text, or both as one.", choices=("image", "text", "fused")
        ),
        "name": NAME,
        "retry_failed": Input("Retry failed rows", "Encode the rows that failed before; the others stay."),
        **_last("extraction: {dtype: float32}"),
    },
    "build-index": {
        "source": Input(
            "Features or run",
            "What is indexed: features, or a run's items.",
            "shop-clip",
            offers=("features", "run"),
        ),
        "kind": Input(
            "Kind of index",
            "auto is exact up to a million rows, where memory suffices.",
            choices=("auto", "flat", "hnsw", "ivf_flat", "ivf_pq"),
        ),
        "metric": Input(
            "Similarity", "Cosine, or the plain inner product.", choices=("cosine", "inner_product")
        ),
        "name": NAME,
        **_last("recall_k: 10"),
    },
    "train-recommender": {
        "dataset": DATASET,
        "features": FEATURES,
        "model": MODEL,
        "seed": SEED,
        "search": Input("Search", "Settings that a search has chosen.", "shop-search", offers=("search",)),
        "name": NAME,
        **_last("training: {epochs: 20}"),
    },
    "search-recommender": {
        "dataset": DATASET,
        "features": FEATURES,
        "model": MODEL,
        "trials": Input("Settings to try", "At most so many.", "20"),
        "workers": Input("Processes", "That try settings beside each other, on this machine.", "2"),
        "name": NAME,
        **_last("search: {method: random}"),
    },
    "compare-features": {
        "runs": Input(
            "Runs",
            "Names or references, several with commas; shop-* for all such names; a dataset for its runs.",
            "shop-*",
            offers=("dataset",),
        ),
        "metric": Input("Metric", "What decides.", "recall@20"),
        "name": NAME,
        **_last("more_metrics: [ndcg@10]"),
    },
    "finetune-encoder": {
        "dataset": DATASET,
        "encoder": ENCODER,
        "seed": SEED,
        "name": NAME,
        **_last("finetuning: {epochs: 5}"),
    },
    "joint-training": {
        "dataset": DATASET,
        "encoder": ENCODER,
        "model": MODEL,
        "mode": Input(
            "What is trained",
            "The whole encoder, its last blocks, low-rank changes, or small networks beside it.",
            choices=("full", "last-n", "lora", "side"),
        ),
        "features": Input(
            "Features beside it",
            "Read, too, and left as they are; several with commas.",
            "shop-clip",
            offers=("features",),
        ),
        "seed": SEED,
        "name": Input(
            "Name", "Keep the encoder under this name, to be asked for as store/<name>.", "shop-joint"
        ),
        **_last("joint: {warmup_epochs: 10}"),
    },
    "paradigms": {**STUDY, "keep_as": KEEP_AS, **_last("finetuning: {epochs: 5}")},
    "two-stage": {**STUDY, "keep_as": KEEP_AS, **_last("dataset: {tables: {item_id: sku}}")},
}
"""Flow -> input -> how it looks, in the order of the form."""


def choices(store: Store) -> Choices:
    """Read what can be chosen now: names and newest artefacts, presets, recommenders, configurations."""
    names = store.names()
    newest = store.survey()[0][::-1]
    lists: dict[str, tuple[str, ...]] = {
        kind: (
            *(name for name, pointer in names.items() if pointer.kind == kind),
            *[artefact.ref for artefact in newest if artefact.kind == kind][:NEWEST],
        )
        for kind in KINDS
    }
    trained = [f"store/{name}" for name, pointer in names.items() if pointer.kind == "encoder"]
    lists[ENCODERS] = ("tiny", *trained, *presets(), "random", "constant", "shuffled:tiny")
    lists[RECOMMENDERS] = tuple(MODELS)
    lists[CONFIGURATIONS] = tuple(configurations(store).names())
    return Choices(lists)


_KEPT = ("type", "minimum", "exclusiveMinimum", "maximum", "default")


def form_schema(flow: Flow[..., Any], offered: Choices) -> dict[str, Any]:
    """Return the form of a flow as the page draws it: text, numbers, switches and choices."""
    taken = flow.parameters.model_dump()
    properties = {}
    for position, (name, how) in enumerate(FORMS[flow.name].items()):
        typed = taken["properties"][name]
        kept = {key: typed[key] for key in _KEPT if key in typed}
        shown = {"title": how.title, "description": how.description, "position": position}
        properties[name] = _with_choices({**shown, **kept}, how, offered)
    return {
        "type": "object",
        "title": "Parameters",
        "properties": properties,
        "required": taken.get("required", []),
    }


def with_offers(shown: Mapping[str, Any], how: Input, offered: Choices) -> dict[str, Any]:
    """Return one input of a form with what can be chosen now."""
    kept = {key: shown[key] for key in ("title", "description", "position", "default") if key in shown}
    return _with_choices({**kept, "type": "string"}, how, offered)


def _with_choices(typed: dict[str, Any], how: Input, offered: Choices) -> dict[str, Any]:
    if how.choices:
        return {**typed, "enum": list(how.choices)}
    listed = offered.of(how.offers)
    if not how.offers or not listed:
        return typed
    either = [
        {"title": "Choose", "type": "string", "enum": listed},
        {"title": "Type", "type": "string"},
    ]
    # Without a default the page opens the list; an empty text would open the field to type in.
    unused = ("type", "default") if typed.get("default") in (None, "") else ("type",)
    return {"anyOf": either, **{key: value for key, value in typed.items() if key not in unused}}
