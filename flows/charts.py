"""Curves of a training as a page of the UI, which draws Mermaid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST_POINTS = 60
"""More are not told apart at the width of a page; every so many epochs is shown then, and the last."""

_COLOUR = '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#1860f2"}}}}%%'
"""Mermaid's own first colour can hardly be seen on a light page."""


def curves(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """Markdown with a chart for each column that has at least two numbers, not all of them 0.

    Args:
        rows: An epoch each, in order, with ``epoch``; a column that is missing or null has no point there.
        columns: What to draw, in this order.

    Returns:
        Empty where there is nothing to draw.
    """
    drawn = [_chart(name, points) for name in columns if _is_curve(points := _points(rows, name))]
    return "\n\n".join(drawn)


def _is_curve(points: Sequence[tuple[int, float]]) -> bool:
    return len(points) > 1 and any(value for _, value in points)


def _points(rows: Sequence[Mapping[str, object]], column: str) -> list[tuple[int, float]]:
    found = [
        (int(str(row["epoch"])), float(value))
        for row in rows
        if isinstance(value := row.get(column), int | float) and not isinstance(value, bool)
    ]
    step = -(-len(found) // MOST_POINTS)
    return found if step <= 1 else [*found[:-1:step], found[-1]]


def _chart(column: str, points: Sequence[tuple[int, float]]) -> str:
    name = column.replace("_", " ").replace('"', "")
    values = [value for _, value in points]
    low, high = min(values), max(values)
    margin = (high - low) / 20 or abs(high) / 20 or 1.0  # a flat line still needs an axis
    return "\n".join(
        [
            "```mermaid",
            _COLOUR,
            "xychart-beta",
            f'    title "{name}"',
            f'    x-axis "epoch" [{", ".join(str(epoch) for epoch, _ in points)}]',
            f'    y-axis "" {low - margin:.6g} --> {high + margin:.6g}',
            f"    line [{', '.join(f'{value:.6g}' for value in values)}]",
            "```",
        ]
    )
