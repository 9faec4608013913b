"""From what a person types to the folder of one artefact."""

from dataclasses import dataclass
from difflib import get_close_matches

from pipeline.errors import StoreError
from pipeline.manifest import KINDS, SHORT_KEY_LENGTH, Kind, decode_manifest
from pipeline.naming import MIN_PREFIX_LENGTH, read_name, read_names
from pipeline.shelf import Shelf

KEY_LENGTH = 64
MAX_NEAR_MATCHES = 5


@dataclass(frozen=True)
class Location:
    """A folder of the store, and what is known of the key of the artefact in it."""

    kind: Kind
    folder: str
    key_prefix: str = ""

    @property
    def ref(self) -> str:
        """The artefact's reference."""
        return f"{self.kind}/{self.folder}"


def folders_with_key(shelf: Shelf, kind: Kind, key: str) -> list[str]:
    """Return the folders of a kind that may hold this key, by the part of it in their names."""
    return [folder for folder in shelf.folders(kind) if folder.endswith(f"-{key[:SHORT_KEY_LENGTH]}")]


def locate(shelf: Shelf, ref: str, kind: Kind | None) -> Location:
    """Find what a reference means, without reading a manifest where the names of folders can tell.

    Args:
        shelf: Where to look.
        ref: A name, a folder ("tiny-image-0123456789ab"), a key or the first hex digits of one, each as it
            is or after its kind ("features/clip-baby"), or a path that ends so (".tandem/features/...").
        kind: The kind that is wanted; None for any.

    Raises:
        StoreError: It means nothing here, several artefacts, or one of another kind.
    """
    prefix, slash, word = ref.strip().rstrip("/").rpartition("/")
    prefix = prefix.rpartition("/")[2]  # a path into the store; what it ends with says all, as keys are in it
    if slash and prefix not in KINDS:
        raise StoreError(
            f"{ref!r} names no artefact: {prefix!r} is no kind; known kinds: {', '.join(KINDS)}."
        )
    typed: Kind | None = next((each for each in KINDS if each == prefix), None)
    found = _by_name(shelf, word) or _by_folder_or_key(shelf, word, typed)
    fitting = [each for each in found if typed in (None, each.kind) and kind in (None, each.kind)]
    if len(fitting) > 1:  # the name of a folder holds the beginning of a key only
        fitting = [each for each in fitting if _may_hold(shelf, each)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        listed = ", ".join(each.ref for each in fitting)
        raise StoreError(f"{ref!r} could be {listed}; type more of the key, or the whole reference.")
    if found:
        wanted = kind or typed
        raise StoreError(f"{ref!r} is {found[0].ref}; a {wanted} artefact was expected. {_listing(wanted)}")
    near = _near(shelf, word, kind or typed)
    raise StoreError(f"{ref!r} is not in the store {shelf.url}{near} {_listing(kind or typed)}")


def _by_name(shelf: Shelf, word: str) -> list[Location]:
    pointer = read_name(shelf, word)
    if pointer is None:
        return []
    folders = folders_with_key(shelf, pointer.kind, pointer.key)
    if not folders:
        raise StoreError(
            f"The name {word!r} stands for {pointer.ref}, which is no longer in the store {shelf.url}; "
            "make it again, or point the name at another artefact."
        )
    return [Location(pointer.kind, folder, pointer.key) for folder in folders]


def _by_folder_or_key(shelf: Shelf, word: str, typed: Kind | None) -> list[Location]:
    is_prefix = MIN_PREFIX_LENGTH <= len(word) <= KEY_LENGTH and set(word) <= set("0123456789abcdef")
    found = []
    for kind in KINDS if typed is None else (typed,):
        for folder in shelf.folders(kind):
            short_key = folder[-SHORT_KEY_LENGTH:]
            if folder == word:
                found.append(Location(kind, folder))
            elif is_prefix and short_key.startswith(word[:SHORT_KEY_LENGTH]):
                found.append(Location(kind, folder, word))
    return found


def _may_hold(shelf: Shelf, place: Location) -> bool:
    """Say whether a folder's manifest agrees with the key that was asked for; a damaged one may."""
    data = shelf.read_manifest(place.kind, place.folder)
    if data is None:
        return False
    try:
        manifest = decode_manifest(data, shelf.address(place.kind, place.folder), place.kind, place.folder)
    except StoreError:
        return True
    return manifest.key.startswith(place.key_prefix)


def _near(shelf: Shelf, word: str, kind: Kind | None) -> str:
    names = [name for name, pointer in read_names(shelf).items() if kind in (None, pointer.kind)]
    folders = [folder for each in (KINDS if kind is None else (kind,)) for folder in shelf.folders(each)]
    slugs = {folder[: -SHORT_KEY_LENGTH - 1]: folder for folder in folders}
    matches = get_close_matches(word, [*names, *slugs, *folders], n=MAX_NEAR_MATCHES, cutoff=0.5)
    # A slug alone names no artefact; the folder that it begins does.
    near = list(dict.fromkeys(slugs.get(match, match) if match not in names else match for match in matches))
    return f"; did you mean {' or '.join(near)}?" if near else "."


def _listing(kind: Kind | None) -> str:
    return f"`tandem ls{f' {kind}' if kind else ''}` lists what there is."
