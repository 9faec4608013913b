"""What an artefact was made from, down to its first inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.artefact import Artefact
from pipeline.manifest import InputRef, folder_name

Node = TypeVar("Node")


@dataclass(frozen=True)
class Lineage:
    """An artefact and, below it, what it was made from."""

    source: InputRef
    """Kind, key and the role it played in the artefact above."""
    artefact: Artefact | None
    """None where the store no longer has it."""
    inputs: tuple["Lineage", ...] = ()

    @property
    def ref(self) -> str:
        """Its reference, or what is known of it where the store no longer has it."""
        if self.artefact is not None:
            return self.artefact.ref
        return f"{self.source.kind}/{folder_name('?', self.source.key)}"

    def lines(self) -> list[str]:
        """Draw the tree with a line for each artefact; one drawn before is not opened again."""
        return _lines(self, "", "", set())


def trace(source: InputRef, find: Callable[[InputRef], Artefact | None]) -> Lineage:
    """Follow the inputs of an artefact; one that several were made from is looked up once."""
    known: dict[tuple[str, str], Lineage] = {}

    def follow(wanted: InputRef) -> Lineage:
        identity = (wanted.kind, wanted.key)
        if identity not in known:
            known[identity] = Lineage(wanted, None)  # ends the walk if a forged manifest names itself
            artefact = find(wanted)
            inputs = () if artefact is None else tuple(follow(each) for each in artefact.manifest.inputs)
            known[identity] = Lineage(wanted, artefact, inputs)
        before = known[identity]
        return Lineage(wanted, before.artefact, before.inputs)

    return follow(source)


def with_ancestors(roots: Iterable[Node], parents: Mapping[Node, Sequence[Node]]) -> set[Node]:
    """Return the roots and all they were made from, directly or not."""
    reached: set[Node] = set()
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting.extend(parents.get(node, ()))
    return reached


def _lines(node: Lineage, lead: str, indent: str, drawn: set[str]) -> list[str]:
    role = f"  ({node.source.role})" if node.source.role else ""
    gone = "" if node.artefact is not None else "  (no longer in this store)"
    again = node.source.key in drawn and bool(node.inputs)
    lines = [f"{lead}{node.ref}{role}{gone}{'  (as above)' if again else ''}"]
    drawn.add(node.source.key)
    if not again:
        for number, child in enumerate(node.inputs, start=1):
            last = number == len(node.inputs)
            branch, trunk = ("└─ ", "   ") if last else ("├─ ", "│  ")
            lines += _lines(child, indent + branch, indent + trunk, drawn)
    return lines
