"""The command line's questions: similar items, recommendations, exports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli import app
from pipeline.console import DEFAULT_STORE, JsonOption, Output, StoreOption, open_store, table

QUERIES = "Ask and export"


@app.command(rich_help_panel=QUERIES)
def similar(
    index: Annotated[str, typer.Argument(help="Name, key or folder of an index.")],
    item: Annotated[str, typer.Option(help="Ask by an item's id.")] = "",
    text: Annotated[str, typer.Option(help="Ask by a text; needs an encoder with a text tower.")] = "",
    picture: Annotated[Path | None, typer.Option(help="Ask by a picture file.")] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many items to list.")] = 10,
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Find the items nearest to an item, a text or a picture.

    Examples: `tandem similar tiny-image --item p00012` · `tandem similar tiny-image --text "a red mug"`
    """
    from pipeline.queries import Query, similar_items

    out = Output(as_json=json)
    answer = similar_items(open_store(store, out), index, Query(item=item, text=text, picture=picture), k)
    rows = [(hit.rank, hit.item_id, f"{hit.similarity:.4f}", hit.title) for hit in answer]
    out.show(
        [hit.__dict__ for hit in answer],
        table(f"Nearest in {index}", ("rank", "item", "similarity", "title"), rows),
    )


@app.command(rich_help_panel=QUERIES)
def recommend(
    run: Annotated[str, typer.Argument(help="Name, key or folder of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Parquet file to write.")] = Path(
        "recommendations.parquet"
    ),
    k: Annotated[int, typer.Option("-k", min=1, help="Items a user.")] = 10,
    user: Annotated[list[str] | None, typer.Option(help="Only this user; repeat for more.")] = None,
    exclude: Annotated[
        Literal["train", "all"],
        typer.Option(help="Never recommend what the user has in training, or has at all."),
    ] = "all",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Write the top-k items of each user as Parquet: user_id, rank, item_id, score.

    Example: `tandem recommend best-run -k 20 -o top20.parquet`
    """
    from pipeline.queries import write_recommendations

    out = Output(as_json=json)
    written = write_recommendations(
        open_store(store, out), run, output, k=k, users=user or [], exclude=exclude, reporter=out.reporter
    )
    out.show(written, f"{written['rows']:,} rows for {written['users']:,} users in {output}")


@app.command(rich_help_panel=QUERIES)
def export(
    features: Annotated[str, typer.Argument(help="Name, key or folder of a feature artefact.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File (lists, npy) or folder (mmrec) to write.")
    ],
    layout: Annotated[
        Literal["lists", "npy", "mmrec"],
        typer.Option(
            "--format",
            help="lists: Parquet with a list column; npy: array and ids beside it; "
            "mmrec: <modality>_feat.npy in item order.",
        ),
    ] = "lists",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Write cached features in a layout that other tools read."""
    from pipeline.exporting import export_features

    out = Output(as_json=json)
    written = export_features(open_store(store, out), features, output, layout)
    out.show(
        written, f"{written['rows']:,} rows of {written['dim']} numbers in {', '.join(written['files'])}"
    )
