"""Files of a model hub's repository; cached ones come first, so that what was fetched needs no network."""

import os
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from features.errors import EncoderError

_PROBE_TIMEOUT_S = 5.0


def fetch_from_hub(
    repository: str, filenames: Sequence[str], *, instead: str, revision: str | None = None
) -> Path:
    """The first of ``filenames`` that a repository has, as a path in the hub's local cache.

    Args:
        repository: `<owner>/<name>`.
        filenames: Names that would do, the preferred one first.
        instead: What to type once the file was brought here by hand; the end of the error message.
        revision: A branch, tag or commit; the repository's main branch if left out.

    Raises:
        EncoderError: Not cached and no network, no such repository, or none of the files in it.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 - seconds of imports
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415 - seconds of imports

    cached = _cached(repository, filenames, revision)
    if cached is not None:
        return cached
    with _explained(repository, filenames, instead):
        for filename in filenames:
            try:
                return Path(hf_hub_download(repository, filename, revision=revision))
            except EntryNotFoundError:
                continue
    raise EncoderError(
        f"the hub's repository {repository} has none of {', '.join(filenames)}; check its name."
    )


def fetch_folder_from_hub(
    repository: str,
    patterns: Sequence[str],
    *,
    needed: Sequence[str],
    instead: str,
    revision: str | None = None,
) -> Path:
    """The cached folder of a repository's files that match ``patterns``, one of ``needed`` among them.

    Raises:
        EncoderError: As for `fetch_from_hub`.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - seconds of imports

    cached = _cached(repository, needed, revision)
    if cached is not None:
        return cached.parent
    with _explained(repository, needed, instead):
        folder = Path(snapshot_download(repository, allow_patterns=list(patterns), revision=revision))
    if any((folder / name).is_file() for name in needed):
        return folder
    raise EncoderError(f"the hub's repository {repository} has none of {', '.join(needed)}; check its name.")


def _cached(repository: str, filenames: Sequence[str], revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - seconds of imports

    for filename in filenames:
        path = try_to_load_from_cache(repository, filename, revision=revision)
        if isinstance(path, str):
            return Path(path)
    return None


@contextmanager
def _explained(repository: str, filenames: Sequence[str], instead: str) -> Iterator[None]:
    """Say what could not be fetched and how to bring it here by hand."""
    from huggingface_hub.errors import GatedRepoError  # noqa: PLC0415 - seconds of imports

    wanted = f"{filenames[0]} of the hub's repository {repository}"
    by_hand = f"fetch it on a machine with network, bring it here and type {instead}"
    if not _hub_answers():
        raise EncoderError(f"no network to fetch {wanted}; {by_hand}.")
    try:
        yield
    except GatedRepoError as error:
        raise EncoderError(
            f"could not fetch {wanted}: its owner asks for consent first; accept the terms on the "
            f"repository's page, then log in with `hf auth login`; or {by_hand}."
        ) from error
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).strip().split("\n")[0]
        raise EncoderError(f"could not fetch {wanted} ({reason}); {by_hand}.") from error


def _hub_answers() -> bool:
    """Whether a connection to the hub opens; its own client would go on trying for most of a minute."""
    from huggingface_hub import constants  # noqa: PLC0415 - seconds of imports

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(os.environ.get("HF_ENDPOINT", constants.ENDPOINT))
    if urllib.request.getproxies().get(address.scheme):
        return True  # the proxy resolves names; asking for them here would say nothing
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=_PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False
