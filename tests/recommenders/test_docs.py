"""The docs name every recommender, and its paper as the registry and the model's own module do."""

import inspect
import re
from pathlib import Path

import pytest

from recommenders.models.registry import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "recommenders.md"


def listed() -> dict[str, tuple[str, str]]:
    """Return name -> paper and what is read, as the page has them."""
    text = PAGE.read_text(encoding="utf-8")
    lines = re.findall(r"^\| (`[^|]*) \|([^|]*)\| ([^|]*) \|", text, re.MULTILINE)
    return {
        name: (paper.strip(), reads)
        for names, paper, reads in lines
        for name in re.findall(r"`(\w+)`", names)
    }


def test_the_page_of_recommenders_lists_all_and_what_they_read() -> None:
    assert set(listed()) >= set(MODELS)
    for name, entry in MODELS.items():
        assert (listed()[name][1] == "features") == entry.model.needs_features, name


def test_the_page_names_the_papers_of_the_registry() -> None:
    papers = {name: entry.paper.short if entry.paper else "" for name, entry in MODELS.items()}
    assert {name: listed()[name][0] for name in MODELS} == papers
    assert [name for name, paper in papers.items() if not paper] == ["popularity", "random"]


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.paper])
def test_a_model_s_module_names_the_same_paper(name: str) -> None:
    entry = MODELS[name]
    assert entry.paper is not None
    source = " ".join((inspect.getmodule(entry.model).__doc__ or "").split())
    assert entry.paper.title in source
    assert str(entry.paper.year) in source
    for author in re.findall(r"[A-Z]\w+", entry.paper.authors):
        assert author in source
