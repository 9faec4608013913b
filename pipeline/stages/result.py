"""What every stage hands back: the artefact, whether it was there before, and its headline numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.manifest import JsonValue
    from pipeline.store import Artefact, Outcome


@dataclass(frozen=True)
class StageResult:
    """One stage's artefact and what a person wants to know of it first."""

    artefact: Artefact
    reused: bool
    """True where the store had it already and nothing was computed."""
    summary: dict[str, JsonValue] = field(default_factory=dict)
    """Headline numbers, the same whether computed or reused."""

    @classmethod
    def of(cls, outcome: Outcome) -> StageResult:
        """Take the headline numbers from the manifest, so that a reused artefact shows the same ones."""
        return cls._of(outcome.artefact, reused=outcome.reused)

    @classmethod
    def reusing(cls, artefact: Artefact) -> StageResult:
        """Say that the store had an artefact already."""
        return cls._of(artefact, reused=True)

    @classmethod
    def _of(cls, artefact: Artefact, *, reused: bool) -> StageResult:
        summary = artefact.manifest.facts.get("summary", {})
        return cls(artefact, reused, dict(summary) if isinstance(summary, dict) else {})

    def to_json(self) -> dict[str, JsonValue]:
        """What ``--json`` prints of a stage."""
        return {
            "kind": self.artefact.kind,
            "ref": self.artefact.ref,
            "key": self.artefact.key,
            "reused": self.reused,
            "summary": self.summary,
        }

    def line(self) -> str:
        """One line for a person."""
        numbers = ", ".join(f"{name} {_short(value)}" for name, value in self.summary.items())
        state = "reused" if self.reused else f"{self.artefact.manifest.seconds:6.1f} s"
        return f"{state:>8}  {self.artefact.ref}" + (f"  ({numbers})" if numbers else "")


def _short(value: JsonValue) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
