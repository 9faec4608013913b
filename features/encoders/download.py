"""Weights files that are published at a plain address; fetched once, kept in the user's cache."""

from pathlib import Path

from features.errors import EncoderError

_TIMEOUT_S = 30.0


def fetch_file(url: str, *, instead: str) -> Path:
    """The local copy of a published file; downloaded whole or not at all.

    Args:
        url: Where it is published; its last part names the copy.
        instead: What to type once the file was brought here by hand; the end of the error message.

    Raises:
        EncoderError: It is not here and cannot be fetched.
    """
    import pooch  # noqa: PLC0415 - only needed here

    folder = weights_cache()
    name = url.rsplit("/", 1)[-1]
    if (folder / name).is_file():
        return folder / name
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(progressbar=True, timeout=_TIMEOUT_S)
    try:
        return Path(pooch.retrieve(url, known_hash=None, fname=name, path=folder, downloader=downloader))
    except Exception as error:  # requests, urllib3 and the disk raise errors of several libraries
        reason = str(error).strip().split("\n")[0]
        raise EncoderError(
            f"could not fetch {url} ({reason}); fetch it on a machine with network, bring it here and type "
            f"{instead}."
        ) from error


def weights_cache() -> Path:
    """Folder of downloaded weights, in the user's cache."""
    import pooch  # noqa: PLC0415 - only needed here

    return Path(pooch.os_cache("tandem")) / "weights"
