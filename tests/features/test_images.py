"""Every kind of picture a web catalogue holds: decoded whole and exactly, or refused with a reason."""

import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from features.images import ImageLimits, UnreadableImage, open_image, read_picture


def encode(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def photo(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """Smooth colours with some texture, so that every codec has work to do."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width * height * 3).reshape(height, width, 3)
    return Image.fromarray((ramp + rng.integers(0, 50, ramp.shape)).astype(np.uint8))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, transparent: bytes = b"") -> bytes:
    """A PNG written by hand: Pillow cannot save 16-bit colour, nor a header that lies."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    key = chunk(b"tRNS", transparent) if transparent else b""
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + body


def pixels(data: bytes) -> np.ndarray:
    image = open_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_rgb_comes_out_bit_for_bit(form: str) -> None:
    np.testing.assert_array_equal(pixels(encode(photo(), form)), np.asarray(photo()))


@pytest.mark.parametrize("form", ["JPEG", "WEBP", "AVIF", "MPO"])
def test_other_formats_come_out_as_pillow_decodes_them(form: str) -> None:
    data = encode(photo(), form)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_grey_and_bilevel_pictures_become_rgb() -> None:
    grey = photo().convert("L")
    np.testing.assert_array_equal(pixels(encode(grey, "PNG"))[..., 0], np.asarray(grey))
    bilevel = photo().convert("1")
    np.testing.assert_array_equal(pixels(encode(bilevel, "PNG"))[..., 0], np.asarray(bilevel) * 255)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    flat = Image.new("RGB", (32, 32), (200, 40, 90))
    decoded = pixels(encode(flat.convert("CMYK"), "JPEG", quality=95))
    np.testing.assert_allclose(decoded.reshape(-1, 3).mean(axis=0), [200, 40, 90], atol=6)


def test_palette_is_resolved_to_its_colours() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 250, 240, 230])
    palette.putdata([0, 1])
    assert pixels(encode(palette, "PNG")).tolist() == [[[10, 20, 30], [250, 240, 230]]]


def test_transparent_palette_entry_turns_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 250, 0, 0])
    palette.putdata([0, 1])
    data = encode(palette, "PNG", transparency=1)
    assert pixels(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_transparent_rgb_key_turns_white() -> None:
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (250, 0, 0))
    data = encode(image, "PNG", transparency=(250, 0, 0))
    assert pixels(data).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_rgba_is_laid_over_white_and_hidden_colours_stay_hidden() -> None:
    image = Image.new("RGBA", (3, 1))
    for x, value in enumerate([(200, 10, 20, 255), (90, 90, 90, 0), (0, 0, 0, 128)]):
        image.putpixel((x, 0), value)
    assert pixels(encode(image, "PNG")).tolist() == [[[200, 10, 20], [255, 255, 255], [127, 127, 127]]]


def test_grey_with_alpha_is_laid_over_white() -> None:
    image = Image.new("LA", (2, 1))
    image.putpixel((0, 0), (40, 255))
    image.putpixel((1, 0), (40, 0))
    assert pixels(encode(image, "PNG")).tolist() == [[[40] * 3, [255] * 3]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    values = np.array([[0, 1, 128, 129, 256, 32_768, 65_406, 65_407, 65_535]], dtype=np.uint16)
    decoded = pixels(encode(Image.fromarray(values), form))[0, :, 0]
    np.testing.assert_array_equal(decoded, np.rint(values[0] / 65_535 * 255))


def test_16_bit_colour_is_scaled_not_clipped() -> None:
    row = b"\0" + struct.pack(">6H", 0, 32_768, 65_535, 300, 40_000, 257)
    decoded = pixels(png(2, 1, 16, 2, row))
    np.testing.assert_allclose(
        decoded[0].ravel(), np.array([0, 32_768, 65_535, 300, 40_000, 257]) / 257, atol=1
    )


def test_16_bit_colour_with_alpha_is_laid_over_white() -> None:
    row = b"\0" + struct.pack(">8H", 65_535, 0, 0, 65_535, 0, 0, 0, 0)
    assert pixels(png(2, 1, 16, 6, row)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_transparent_16_bit_grey_turns_white() -> None:
    row = b"\0" + struct.pack(">3H", 300, 0, 65_535)
    assert pixels(png(3, 1, 16, 0, row, struct.pack(">H", 300)))[0, :, 0].tolist() == [255, 0, 255]


def test_a_mode_without_a_conversion_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(photo().convert("YCbCr"), "TIFF")
    assert open_image(data).mode == "RGB"

    def convert(image: Image.Image, mode: str) -> Image.Image:
        raise ValueError(f"conversion from {image.mode} to {mode} not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(UnreadableImage, match=r"colours of mode YCbCr are not converted: conversion from"):
        open_image(data)


def test_float_grey_of_0_to_1_is_scaled_and_other_ranges_are_refused() -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    assert pixels(encode(Image.fromarray(values), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    for wrong in (values * 300, values * np.nan):
        with pytest.raises(UnreadableImage, match="float grey outside 0 to 1"):
            open_image(encode(Image.fromarray(wrong), "TIFF"))


def test_grey_of_32_bits_is_refused() -> None:
    deep = Image.fromarray(np.array([[0, 2**24]], dtype=np.int32))
    with pytest.raises(UnreadableImage, match="more than 16 bits"):
        open_image(encode(deep, "TIFF"))


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:])
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    np.testing.assert_allclose(pixels(data).reshape(-1, 3).mean(axis=0), [255, 0, 0], atol=3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels(data), np.asarray(expected.convert("RGB")))


def test_a_damaged_exif_block_does_not_cost_the_picture() -> None:
    data = encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\x01\x12" * 20)
    assert pixels(data).shape == (32, 48, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF"])
def test_a_truncated_picture_is_refused_never_half_decoded(form: str) -> None:
    data = encode(photo(), form)
    whole = pixels(data)
    refused = 0
    for cut in np.linspace(1, len(data) - 1, 40).astype(int):
        try:
            decoded = pixels(data[:cut])
        except UnreadableImage:
            refused += 1
        else:  # only what follows the pixels is missing
            np.testing.assert_array_equal(decoded, whole)
    assert refused >= 35


def test_jpeg_2000_is_refused_as_its_decoder_fills_what_is_missing() -> None:
    with pytest.raises(UnreadableImage, match="no picture format that is read"):
        open_image(encode(photo(), "JPEG2000"))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the EXIF blocks that are hit
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(form: str) -> None:
    data, rng = encode(photo(), form), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for place in rng.integers(0, rng.choice([60, len(data)]), rng.integers(1, 8)):
            damaged[place] = rng.integers(256)
        try:
            image = open_image(bytes(damaged))
        except UnreadableImage:
            continue
        assert image.mode == "RGB"


def test_lab_colours_are_converted() -> None:
    white = encode(Image.new("LAB", (2, 2), (255, 128, 128)), "TIFF")
    assert pixels(white).min() >= 250


def test_a_progressive_jpeg_without_its_later_scans_is_refused() -> None:
    data = encode(photo(256, 256), "JPEG", progressive=True, quality=95)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(UnreadableImage, match="truncated or damaged"):
            open_image(data[: int(len(data) * share)])


def test_a_damaged_middle_is_refused() -> None:
    data = bytearray(encode(photo(), "PNG"))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UnreadableImage, match="truncated or damaged"):
        open_image(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf\n  <HTML><head>", "an HTML page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML file"),
        (b'{"error": "not found"}', "JSON text"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "a Git LFS pointer"),
        (b"\xff\xd8\xff", "truncated or damaged"),
        (b"just words", "no picture format that is read"),
        (bytes(range(256)), "no picture format that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "no picture format that is read"),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImage, match=reason):
        open_image(data)


def test_a_decompression_bomb_is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(image: ImageFile.ImageFile) -> None:
        pytest.fail(f"{image.size} was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    bomb = png(8_000, 8_000, 1, 0, bytes(8_000 * 1_001))
    assert len(bomb) < 20_000
    with pytest.raises(UnreadableImage, match="8000 x 8000 = 64,000,000 pixels; at most 50,000,000"):
        open_image(bomb)


@pytest.mark.parametrize("side", [10_500, 60_000])  # Pillow warns from 9,460 on and raises from 13,378 on
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_that_pillow_itself_minds_is_refused_without_memory(side: int) -> None:
    bomb = png(side, side, 8, 2, b"")
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=r"pixels"):
        open_image(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_limits_are_the_caller_s() -> None:
    data = encode(photo(), "PNG")
    assert open_image(data, ImageLimits(max_pixels=48 * 32)).size == (48, 32)
    with pytest.raises(UnreadableImage, match="at most 1,535 are decoded"):
        open_image(data, ImageLimits(max_pixels=48 * 32 - 1))
    with pytest.raises(UnreadableImage, match=f"{len(data):,} bytes; at most 100"):
        open_image(data, ImageLimits(max_bytes=100))
    with pytest.raises(ValueError, match="max_pixels"):
        ImageLimits(max_pixels=10**9)


def test_bytes_are_read_from_below_the_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.png").write_bytes(b"content")
    assert read_picture(str(tmp_path), "a/b/x.png") == b"content"
    assert read_picture(str(tmp_path / "a"), "b/x.png") == b"content"


def test_bytes_are_read_from_a_remote_folder() -> None:
    with fsspec.open("memory://pictures/a/x.png", "wb") as file:
        file.write(b"content")
    assert read_picture("memory://pictures", "a/x.png") == b"content"
    assert read_picture("memory://pictures/", "a/x.png") == b"content"
    with pytest.raises(UnreadableImage, match=r"there is no file 'b\.png'"):
        read_picture("memory://pictures", "b.png")
    with pytest.raises(UnreadableImage, match="more than the 3 bytes"):
        read_picture("memory://pictures", "a/x.png", ImageLimits(max_bytes=3))


def test_a_path_is_never_read_as_a_url_or_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write(b"content")
    for path in (f"x::file://{tmp_path}/secret", f"file://{tmp_path}/secret", "*.png"):
        with pytest.raises(UnreadableImage, match="there is no file"):
            read_picture("memory://pictures", path)


def test_a_file_url_is_the_local_folder_links_that_leave_it_included(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root" / "x.png").write_bytes(b"content")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "secret")
    assert read_picture(f"file://{tmp_path}/root", "x.png") == b"content"
    with pytest.raises(UnreadableImage, match="leads out of the folder"):
        read_picture(f"file://{tmp_path}/root", "link.png")


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc/passwd", "", "a\0b", "..\\secret"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root").mkdir()
    with pytest.raises(UnreadableImage, match="not a path inside"):
        read_picture(str(tmp_path / "root"), path)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "secret")
    with pytest.raises(UnreadableImage, match="leads out of the folder"):
        read_picture(str(root), "link.png")
    (root / "real.png").write_bytes(b"content")
    (root / "inside.png").symlink_to(root / "real.png")
    assert read_picture(str(root), "inside.png") == b"content"


def test_what_is_no_plain_file_is_refused_and_a_pipe_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("folder.png", "pipe.png"):
        with pytest.raises(UnreadableImage, match=r"is not a file|cannot be read"):
            read_picture(str(tmp_path), name)
    with pytest.raises(UnreadableImage, match=r"there is no file 'x\.png'"):
        read_picture(str(tmp_path), "x.png")


def test_a_file_is_not_read_past_the_limit(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"0123456789")
    assert read_picture(str(tmp_path), "x.png", ImageLimits(max_bytes=10)) == b"0123456789"
    with pytest.raises(UnreadableImage, match="more than the 9 bytes"):
        read_picture(str(tmp_path), "x.png", ImageLimits(max_bytes=9))


def test_a_large_jpeg_may_be_decoded_smaller_but_never_below_twice_the_size() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8))
    data = io.BytesIO()
    picture.resize((1800, 1200), Image.Resampling.BICUBIC).save(data, "JPEG", quality=92)
    exact, drafted = open_image(data.getvalue()), open_image(data.getvalue(), draft_px=448)
    assert exact.size == (1800, 1200)
    assert drafted.size == (900, 600)
    assert open_image(data.getvalue(), draft_px=1300).size == (1800, 1200)
    target = (224, 224)
    difference = np.abs(
        np.asarray(exact.resize(target, Image.Resampling.BICUBIC), np.int16)
        - np.asarray(drafted.resize(target, Image.Resampling.BICUBIC), np.int16)
    )
    assert 0 < difference.max() <= 8  # noise of sharp edges; see the next test for its size on photographs
    assert difference.mean() < 0.5


def test_drafting_changes_nothing_but_large_jpegs() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (600, 600, 3), np.uint8))
    for kind in ("PNG", "WEBP"):
        data = io.BytesIO()
        picture.save(data, kind)
        assert open_image(data.getvalue(), draft_px=64).tobytes() == open_image(data.getvalue()).tobytes()
