"""The docs name every recommender."""

import re
from pathlib import Path

from recommenders.models.registry import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "recommenders.md"


def test_the_page_of_recommenders_lists_all_and_what_they_read() -> None:
    lines = re.findall(r"^\| (`[^|]*) \|[^|]*\| ([^|]*) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {name: reads for names, reads in lines for name in re.findall(r"`(\w+)`", names)}
    assert set(listed) == set(MODELS)
    for name, entry in MODELS.items():
        assert (listed[name] == "features") == entry.model.needs_features, name
