"""The presets as tables: for a terminal, and as Markdown for the docs."""

from collections.abc import Mapping

from rich.table import Table

from features.encoders.presets import Preset, presets


def preset_table(cached: Mapping[str, int]) -> Table:
    """All presets, two lines each, with how many feature sets of each there are."""
    made = Table(title="Presets", title_justify="left", box=None, pad_edge=False, header_style="bold")
    made.add_column("preset, and what it stands for", overflow="fold", ratio=5)
    for name in ("encodes", "numbers", "pixels", "tokens", "cached"):
        left = name == "encodes"
        made.add_column(name, justify="left" if left else "right", no_wrap=not left)
    made.add_column("for what; licence; source", overflow="fold", ratio=5)
    for name, preset in presets().items():
        made.add_row(
            f"[bold]{name}[/bold]\n  {preset.spec}",
            "\n".join(preset.modalities),
            str(preset.dim),
            str(preset.image_size_px or ""),
            str(preset.context_length or ""),
            str(cached.get(name, 0) or ""),
            f"{preset.use}\n[dim]{preset.licence}; {preset.source}[/dim]",
        )
    return made


def preset_markdown() -> str:
    """The same as Markdown, without the store's counts."""
    head = (
        "preset",
        "specification",
        "encodes",
        "numbers",
        "pixels",
        "tokens",
        "licence",
        "source",
        "for what",
    )
    lines = [_line(head), _line(["---"] * len(head))]
    lines += [_line(_cells(name, preset)) for name, preset in presets().items()]
    return "\n".join(lines) + "\n"


def _cells(name: str, preset: Preset) -> list[str]:
    numbers = [str(preset.dim), str(preset.image_size_px or ""), str(preset.context_length or "")]
    last = [preset.licence, preset.source, preset.use]
    return [f"`{name}`", f"`{preset.spec}`", ", ".join(preset.modalities), *numbers, *last]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
