"""The presets as people see them."""

from pathlib import Path

from rich.console import Console

from features.encoders.presets import presets
from pipeline.encoder_tables import preset_markdown, preset_table

DOCS = Path(__file__).parents[2] / "docs" / "encoders" / "README.md"


def test_the_docs_show_the_presets_of_the_file() -> None:
    text = DOCS.read_text(encoding="utf-8")
    shown = text.split("<!-- presets: begin -->\n")[1].split("<!-- presets: end -->")[0]
    assert shown == preset_markdown()


def test_the_terminal_shows_each_preset_whole_at_100_columns() -> None:
    console = Console(width=100, record=True, force_terminal=False)
    console.print(preset_table({"clip": 3}))
    text = console.export_text()
    assert all(name in text for name in presets())
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
