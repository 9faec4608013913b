"""Curves in Mermaid: what is drawn, and what is left out."""

from __future__ import annotations

from flows.charts import MOST_POINTS, curves


def test_each_column_with_two_numbers_or_more_is_a_chart() -> None:
    rows = [
        {"epoch": 1, "loss": 0.5, "gradient_norm_image": None, "joint": False},
        {"epoch": 2, "loss": 0.25, "gradient_norm_image": 0.1, "joint": True},
        {"epoch": 3, "loss": 0.125, "gradient_norm_image": 0.3, "joint": True},
    ]
    text = curves(rows, ["loss", "gradient_norm_image", "joint", "absent"])
    assert text.count("```mermaid") == 2
    loss, norm = text.split("\n\n")
    assert 'x-axis "epoch" [1, 2, 3]' in loss
    assert "line [0.5, 0.25, 0.125]" in loss
    assert 'title "gradient norm image"' in norm
    assert 'x-axis "epoch" [2, 3]' in norm
    assert "line [0.1, 0.3]" in norm


def test_a_flat_curve_has_an_axis_and_one_point_is_no_curve() -> None:
    flat = curves([{"epoch": n, "loss": 2.0} for n in (1, 2)], ["loss"])
    assert '"" 1.9 --> 2.1' in flat
    assert not curves([{"epoch": 1, "loss": 2.0}], ["loss"])
    assert not curves([{"epoch": n, "norm": 0.0} for n in (1, 2)], ["norm"])


def test_long_trainings_keep_first_and_last_of_few_points() -> None:
    rows = [{"epoch": n, "loss": 1.0 / n} for n in range(1, 1001)]
    axis = next(line for line in curves(rows, ["loss"]).splitlines() if "x-axis" in line)
    epochs = [int(part) for part in axis.split("[")[1].rstrip("]").split(",")]
    assert epochs[0] == 1
    assert epochs[-1] == 1000
    assert len(epochs) <= MOST_POINTS + 1
