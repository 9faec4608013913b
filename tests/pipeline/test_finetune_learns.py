"""Fine-tuning teaches `tiny` a shop's own words for looks that it knows by others."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.catalogue import Catalogue, TextConfig
from features.encoders.base import digest_file
from features.encoders.registry import load_encoder
from features.finetuning.config import FinetuningConfig
from features.finetuning.loop import finetune
from pipeline.datasets.demo import DemoConfig, demo_traits, import_demo

DEMO = DemoConfig(n_items=320, n_users=1, fewest_choices=1, most_choices=1, missing_image_share=0.0)
WORDS = {
    "colour": ("brick", "amber", "corn", "moss", "reef", "denim", "plum", "blush"),
    "background": ("snowy", "dune", "evening", "fading", "mosaic", "ledge"),
    "pattern": ("bare", "lined", "speckled", "gridded", "jagged", "haloed"),
}
"""Of a shop that describes looks, which the demo's own texts never do."""


def shop(folder: Path) -> Catalogue:
    items = import_demo(DEMO, folder).items
    traits = demo_traits(DEMO)
    titles = [
        " ".join(words[value] for words, value in zip(WORDS.values(), row, strict=True))
        for row in np.stack([traits.values[name] for name in WORDS], axis=1)
    ]
    hashes = [digest_file(folder / name) for name in items["image"]]
    return Catalogue(
        items.with_columns(pl.Series("title", titles), pl.Series("image_hash", hashes)), str(folder)
    )


@pytest.mark.slow
def test_a_short_fine_tuning_finds_more_held_out_items_than_before(tmp_path: Path) -> None:
    settings = FinetuningConfig.model_validate(
        {
            "epochs": 3,
            "batch_size": 60,
            "chunk_size": 50,
            "held_out_share": 0.25,
            "patience": 0,
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    result = finetune(
        load_encoder("tiny"),
        shop(tmp_path),
        settings,
        rng=np.random.default_rng(0),
        text=TextConfig(fields=("title",)),
    )
    retrieval = result.history_frame()["retrieval"]
    assert result.counts["held_out"] > 60
    assert retrieval[0] < 0.25  # the words mean little to it
    assert retrieval[-1] > 0.5  # in the last epoch, which nobody chose
