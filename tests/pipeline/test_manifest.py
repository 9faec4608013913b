"""Keys, file names and the manifest's text."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import StoreError
from pipeline.hardware import describe_hardware
from pipeline.manifest import (
    FORMAT_VERSIONS,
    FileEntry,
    InputRef,
    Manifest,
    artefact_key,
    decode_manifest,
    encode_manifest,
    plain_json,
    safe_file_name,
    slugify,
)

IDENTITY: dict[str, Any] = {"encoder": "tiny", "size_px": 64, "fields": ["title", "description"]}


def manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "kind": "features",
        "key": artefact_key("features", IDENTITY),
        "slug": "tiny-image",
        "format": FORMAT_VERSIONS["features"],
        "inputs": (InputRef(kind="dataset", key="a" * 64, role="items"),),
        "identity": IDENTITY,
        "facts": {"items_per_s": 12.5, "größe": "ß"},
        "hardware": describe_hardware(),
        "seconds": 1.25,
        "bytes": 3,
        "files": {"parts/part-00000.parquet": FileEntry(sha256="b" * 64, bytes=3)},
        "created_at": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    }
    return Manifest(**{**fields, **changes})


def decode(data: bytes) -> Manifest:
    return decode_manifest(data, "/store/features/x", "features", manifest().folder)


def test_the_key_is_that_of_the_published_recipe() -> None:
    """Anyone can compute a key: SHA-256 of the canonical JSON of kind, format and identity."""
    import hashlib

    text = '{"format":1,"identity":{"a":1,"b":["x",2.5,null,true]},"kind":"run"}'
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert artefact_key("run", {"b": ["x", 2.5, None, True], "a": 1}) == expected


def test_the_key_ignores_the_order_of_settings_and_tells_lists_from_their_order() -> None:
    assert artefact_key("run", {"a": 1, "b": 2}) == artefact_key("run", {"b": 2, "a": 1})
    assert artefact_key("run", {"a": [1, 2]}) == artefact_key("run", {"a": (1, 2)})  # type: ignore[dict-item]  # a tuple
    assert artefact_key("run", {"a": [1, 2]}) != artefact_key("run", {"a": [2, 1]})


def test_the_key_changes_with_kind_format_and_every_value() -> None:
    keys = {
        artefact_key("run", IDENTITY),
        artefact_key("features", IDENTITY),
        artefact_key("run", IDENTITY, version=2),
        artefact_key("run", {**IDENTITY, "size_px": 65}),
        artefact_key("run", {**IDENTITY, "size_px": "64"}),
        artefact_key("run", {**IDENTITY, "size_px": None}),
    }
    assert len(keys) == 6


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=3))
def test_the_key_survives_writing_and_reading_the_identity(identity: dict[str, Any]) -> None:
    assert artefact_key("run", json.loads(json.dumps(identity))) == artefact_key("run", identity)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), {1: "a"}, {"x": {True: 1}}, {1, 2}, b"x", object()]
)
def test_the_key_refuses_what_json_cannot_tell_apart(value: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        artefact_key("run", {"a": value})


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(StoreError, match=r"kind is 'model'; known kinds: dataset, encoder"):
        artefact_key("model", {})  # type: ignore[arg-type]  # the mistake under test


def test_plain_json_names_what_is_not_json() -> None:
    assert plain_json({"a": (1, 2)}, "The identity") == {"a": [1, 2]}  # type: ignore[dict-item]  # a tuple
    with pytest.raises(TypeError, match=r"The fact 'n' is not JSON"):
        plain_json({"n": object()}, "The fact 'n'")  # type: ignore[dict-item]  # the mistake under test


@pytest.mark.parametrize(
    ("label", "slug"),
    [
        ("open_clip/ViT-B-32:openai image", "open-clip-vit-b-32-openai-image"),
        ("  Ünïcode & more!  ", "n-code-more"),
        ("x" * 80, "x" * 60),
        ("a" * 59 + "/b", "a" * 59),
    ],
)
def test_any_label_becomes_a_readable_slug(label: str, slug: str) -> None:
    assert slugify(label) == slug


def test_a_label_without_letters_is_refused() -> None:
    with pytest.raises(StoreError, match=r"at least one ASCII letter or digit"):
        slugify("///")


@pytest.mark.parametrize("name", ["a", "a/b.txt", "part-00000.parquet", "ünï.txt", "a b"])
def test_plain_file_names_pass(name: str) -> None:
    assert safe_file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "/etc/passwd",
        "../x",
        "a/../../x",
        "a/./b",
        "a//b",
        "a/",
        ".hidden",
        "a/.b",
        "a\\b",
        "C:x",
        "a\0b",
    ],
)
def test_file_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"not a plain file name"):
        safe_file_name(name)


def test_a_manifest_survives_writing_and_reading() -> None:
    written = manifest()
    assert decode(encode_manifest(written)) == written
    document = json.loads(encode_manifest(written))
    assert document["created_at"] == "2026-01-02T03:04:05Z"
    assert document["manifest_version"] == 1


def test_every_flipped_byte_of_a_manifest_is_noticed() -> None:
    data = encode_manifest(manifest())
    unnoticed = []
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 0x01
        try:
            read = decode(bytes(damaged))
        except StoreError:
            continue
        if read != manifest():
            unnoticed.append(position)
    assert unnoticed == []


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_a_manifest_that_is_cut_or_not_ours_says_which_folder_and_what_to_do(data: bytes) -> None:
    with pytest.raises(StoreError, match=r"manifest of /store/features/x is damaged: .*--force"):
        decode(data)


def test_a_manifest_of_another_folder_is_refused() -> None:
    data = encode_manifest(manifest())
    with pytest.raises(StoreError, match=r"it describes features/tiny-image-"):
        decode_manifest(data, "/store/features/x", "features", "other-000000000000")
    with pytest.raises(StoreError, match=r"it describes features/tiny-image-"):
        decode_manifest(data, "/store/run/x", "run", manifest().folder)


def test_a_manifest_of_a_newer_tandem_asks_for_an_upgrade() -> None:
    document = json.loads(encode_manifest(manifest()))
    document["manifest_version"] = 99
    with pytest.raises(StoreError, match=r"manifest version 99, this Tandem reads 1.*upgrade"):
        decode(json.dumps(document).encode())


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../etc/passwd": {"sha256": "b" * 64, "bytes": 3}}},
        {"files": {"/etc/passwd": {"sha256": "b" * 64, "bytes": 3}}},
        {"data_folder": "../../other"},
        {"key": "short"},
        {"kind": "virus"},
        {"surprise": 1},
    ],
)
def test_a_forged_manifest_cannot_name_files_outside_its_folder(change: dict[str, Any]) -> None:
    """The checksum is right here: a forger can compute it. The names must still be refused."""
    from pipeline import manifest as module

    fields = {"manifest_version": 1, **manifest().model_dump(mode="json"), **change}
    document = {**fields, "manifest_sha256": module._sha256(fields)}
    with pytest.raises(StoreError, match=r"is damaged"):
        decode(json.dumps(document).encode())
