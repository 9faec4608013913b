"""Garbage collection: what nobody keeps goes; what a kept artefact was made from never does."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from pydantic import AwareDatetime, BaseModel, ValidationError

from pipeline.artefact import Artefact
from pipeline.lineage import with_ancestors
from pipeline.manifest import SHORT_KEY_LENGTH, InputRef, Kind, Sha256
from pipeline.shelf import Leftover, Shelf

DRAFTS = ".drafts"
LOCK = "collection"
"""Held while artefacts are taken away, while a draft announces its inputs, and while a name is given."""

Node = tuple[Kind, str]
"""Kind and key of an artefact."""


def draft_name(kind: Kind, key: str) -> str:
    """Return what the folder, the lock and the note of a draft are called."""
    return f"{kind}-{key}"


class DraftNote(BaseModel, frozen=True, extra="forbid"):
    """Says, while an artefact is being made, what it is made from, so that its inputs stay."""

    kind: Kind
    key: Sha256
    inputs: tuple[InputRef, ...]
    started_at: AwareDatetime

    @property
    def name(self) -> str:
        """What the draft's folder and lock are called."""
        return draft_name(self.kind, self.key)


@dataclass(frozen=True)
class Collected:
    """What a collection took away, or would take away."""

    dry_run: bool
    """Nothing was deleted; the lists say what would be."""
    artefacts: tuple[Artefact, ...]
    leftovers: tuple[Leftover, ...]
    kept: Mapping[str, str] = field(default_factory=dict)
    """Reference of each artefact that stays -> why."""

    @property
    def bytes(self) -> int:
        """The space this frees."""
        artefacts = sum(artefact.manifest.bytes for artefact in self.artefacts)
        return artefacts + sum(leftover.bytes for leftover in self.leftovers)


def collect(
    shelf: Shelf,
    survey: Callable[[], Sequence[Artefact]],
    *,
    named: Mapping[Node, str],
    asked: Collection[Node],
    older_than: timedelta,
    dry_run: bool,
) -> Collected:
    """Decide what goes and, unless this is a dry run, delete it; called with ``LOCK`` held.

    Args:
        shelf: The store's place.
        survey: Lists all artefacts of the store.
        named: Artefacts that have a name -> the name.
        asked: Artefacts that the caller wants kept.
        older_than: What was made or used within this time stays; so do drafts written to within it.
        dry_run: Decide only.
    """
    now = datetime.now(UTC)
    leftovers_before = now - max(older_than, shelf.leftover_grace)
    # Drafts before artefacts: one that is finished between the two looks is then seen twice, never missed.
    notes = {note.name: note for note in _notes(shelf)}
    stale = {
        name
        for name, note in notes.items()
        if note.started_at < leftovers_before and shelf.is_abandoned(name)
    }
    drafts = _read_by([note for name, note in notes.items() if name not in stale])
    artefacts = survey()
    by_node: dict[Node, Artefact] = {(artefact.kind, artefact.key): artefact for artefact in artefacts}
    parents = {node: [(i.kind, i.key) for i in each.manifest.inputs] for node, each in by_node.items()}

    reasons: dict[Node, str] = {}
    for node, artefact in by_node.items():
        if node in named:
            reasons[node] = f"named {named[node]}"
        elif node in asked:
            reasons[node] = "asked to be kept"
        elif node in drafts:
            reasons[node] = f"used by {drafts[node]}, which is being written"
        elif shelf.last_used(artefact.manifest) > now - older_than:
            reasons[node] = "made or used recently"
    kept = with_ancestors(reasons, parents)

    doomed = tuple(by_node[node] for node in descendants_first(by_node.keys() - kept, parents))
    leftovers = tuple(leftover for leftover in shelf.leftovers() if leftover.since < leftovers_before)
    if not dry_run:
        for artefact in doomed:
            shelf.remove(artefact.kind, artefact.manifest.folder)
        for leftover in leftovers:
            shelf.delete_leftover(leftover)
        for name in stale:
            delete_note(shelf, name)
    because = "a kept artefact was made from it"
    why = {by_node[node].ref: reasons.get(node, because) for node in kept & by_node.keys()}
    return Collected(dry_run, doomed, leftovers, dict(sorted(why.items())))


def descendants_first(nodes: Collection[Node], parents: Mapping[Node, Sequence[Node]]) -> list[Node]:
    """Order artefacts so that each goes before what it was made from.

    Killed between two deletions, a collection then leaves no artefact whose inputs are gone.
    """
    order: list[Node] = []
    done: set[Node] = set()
    for start in sorted(nodes):
        stack = [(start, False)]
        while stack:
            node, expanded = stack.pop()
            if expanded:
                order.append(node)
            elif node not in done:
                done.add(node)
                stack.append((node, True))
                stack += [(parent, False) for parent in parents.get(node, ()) if parent in nodes]
    return order[::-1]  # parents were finished first


def write_note(shelf: Shelf, kind: Kind, key: str, inputs: tuple[InputRef, ...]) -> None:
    """Announce a draft."""
    note = DraftNote(kind=kind, key=key, inputs=inputs, started_at=datetime.now(UTC))
    shelf.write_document(_note_path(note.name), (note.model_dump_json(indent=2) + "\n").encode())


def delete_note(shelf: Shelf, name: str) -> None:
    """Withdraw the announcement: the draft is an artefact, or given up."""
    shelf.delete_document(_note_path(name))


def _note_path(name: str) -> str:
    return f"{DRAFTS}/{name}.json"


def _notes(shelf: Shelf) -> list[DraftNote]:
    found = []
    for file in shelf.documents(DRAFTS):
        with suppress(ValidationError):  # finished this moment, or not a note of ours
            found.append(DraftNote.model_validate_json(shelf.read_document(f"{DRAFTS}/{file}") or b""))
    return found


def _read_by(notes: Sequence[DraftNote]) -> dict[Node, str]:
    """Return what drafts are being made from, and the drafts themselves -> the draft."""
    found: dict[Node, str] = {}
    for note in notes:
        for node in [(note.kind, note.key), *((each.kind, each.key) for each in note.inputs)]:
            found.setdefault(node, f"{note.kind}-{note.key[:SHORT_KEY_LENGTH]}")
    return found
