import contextlib
import errno
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from tiny import assert_ended

from clipcap_jax import pictures
from clipcap_jax.errors import UserError

DATA = Path(__file__).parent / "data" / "clip_preprocess"


def encode(image: Image.Image, file_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def assert_decodes_to(data: bytes, expected: np.ndarray, tolerance: int = 0) -> None:
    image = pictures.decode(data)
    assert image.mode == "RGB"
    pixels = np.asarray(image).astype(int)
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, pixels.shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP", "PPM"])
def test_rgb_is_unchanged(file_format: str) -> None:
    image = noise(7, 5)
    options = {"lossless": True} if file_format == "WEBP" else {}
    assert_decodes_to(encode(image, file_format, **options), np.asarray(image))


def test_cmyk_jpeg() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert_decodes_to(encode(red, "JPEG", quality=100), np.array([255, 0, 0]), tolerance=3)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])  # Pillow reads PPM into 32 bits, the others into 16
def test_16_bit_greyscale_is_scaled(file_format: str) -> None:
    values = np.array([[0, 255, 256, 0x1234], [0x7FFF, 0x8000, 0xFF00, 0xFFFF]], np.uint16)
    expected = np.array([[0, 0, 1, 0x12], [0x7F, 0x80, 0xFF, 0xFF]])
    assert_decodes_to(encode(Image.fromarray(values), file_format), expected[..., None])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),  # 8 bits in 32, and in 16
        (np.array([[0, 7, 255]], np.uint16), [0, 7, 255]),
        (np.array([[0, 256, 0xFFF]], np.uint16), [0, 16, 255]),  # 12 bits in 16
        (np.array([[0, 0x1000, 0xFFFF]], np.int32), [0, 16, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 0.6, 255.0]], np.float32), [0, 1, 255]),
    ],
)
def test_brightness_is_scaled_by_what_the_numbers_are(values: np.ndarray, expected: list[int]) -> None:
    assert_decodes_to(encode(Image.fromarray(values), "TIFF"), np.array(expected)[None, :, None])


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("place", [(0, 0), (4, 6)])
def test_brightness_is_that_of_all_rows(dtype: type, place: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are looked at some at a time."""
    monkeypatch.setattr(pictures, "_STRIP", 14)  # 2 rows
    values: np.ndarray = np.arange(35, dtype=dtype).reshape(5, 7)
    values[place] = 255 if dtype == np.float32 else 0xFFFF
    expected = values if dtype == np.float32 else values // 256
    assert_decodes_to(encode(Image.fromarray(values), "TIFF"), expected[..., None])
    if dtype == np.float32:
        values[place] = np.nan
        with pytest.raises(UserError, match="floating-point pixels from nan to nan"):
            pictures.decode(encode(Image.fromarray(values), "TIFF"))


def test_palette_with_transparency_shows_the_colours() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.putdata([0, 1, 2])
    expected = np.array([[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])
    assert_decodes_to(encode(image, "PNG"), expected)
    assert_decodes_to(encode(image, "PNG", transparency=1), expected)
    assert_decodes_to(encode(image, "PNG", transparency=bytes([0, 128, 255])), expected)


def test_greyscale_and_black_and_white() -> None:
    assert_decodes_to(encode(Image.new("L", (2, 2), 77), "PNG"), np.array([77, 77, 77]))
    assert_decodes_to(encode(Image.new("1", (2, 2), 1), "PNG"), np.array([255, 255, 255]))


def test_transparency_is_dropped_as_in_clip() -> None:
    assert_decodes_to(encode(Image.new("RGBA", (2, 2), (9, 8, 7, 0)), "PNG"), np.array([9, 8, 7]))
    assert_decodes_to(encode(Image.new("LA", (2, 2), (50, 128)), "PNG"), np.array([50, 50, 50]))


# What EXIF 2.3 says of its tag 274: where row 0 and column 0 of the stored picture belong in the shown one.
ORIENTATIONS = {
    1: lambda stored: stored,  # top, left
    2: lambda stored: stored[:, ::-1],  # top, right
    3: lambda stored: stored[::-1, ::-1],  # bottom, right
    4: lambda stored: stored[::-1],  # bottom, left
    5: lambda stored: stored.swapaxes(0, 1),  # left, top
    6: lambda stored: stored.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda stored: stored.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda stored: stored.swapaxes(0, 1)[::-1],  # left, bottom
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_rotation_is_applied(orientation: int) -> None:
    stored = noise(5, 3)
    exif = Image.Exif()
    exif[274] = orientation
    assert_decodes_to(encode(stored, "PNG", exif=exif), ORIENTATIONS[orientation](np.asarray(stored)))


JPEG, PNG, GIF = (encode(noise(40, 30), file_format) for file_format in ("JPEG", "PNG", "GIF"))
BEGINNINGS = (b"Exif\0\0II*\0\x08\0\0\0", b"", b"MPF\0II*\0\x08\0\0\0", b"ICC_PROFILE\0\1\2", b"Photoshop 3.0\08BIM")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(
    "bad",
    [
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8))),  # more text than Pillow takes
        chunk(b"iTXt", b"Comment\0\1\0\0\0no zlib"),
        chunk(b"iCCP", b"profile\0\0no zlib"),
        chunk(b"pHYs", b"short"),
        chunk(b"gAMA", b""),
        chunk(b"tIME", b"")[:-1] + b"!",  # its checksum
        chunk(b"eXIf", b"no EXIF"),
    ],
)
@pytest.mark.parametrize("place", [33, -12])  # behind the header, and before the end
def test_what_stands_beside_the_pixels_of_a_png_does_not_matter(bad: bytes, place: int) -> None:
    image = noise(6, 4)
    whole = encode(image, "PNG")
    assert_decodes_to(whole[:place] + bad + whole[place:], np.asarray(image))


@pytest.mark.parametrize(
    "entry",
    [
        struct.pack("<HHIf", 282, 11, 1, float("nan")),  # resolution
        struct.pack("<HHI4s", 256, 2, 2, b"ab"),  # width
        struct.pack("<HHII", 34665, 4, 1, 2**31),  # where there is more
        struct.pack("<HHII", 282, 5, 1, 2**31),
        struct.pack("<HHII", 306, 99, 2**32 - 1, 0),
    ],
)
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_what_exif_says_beside_the_orientation_does_not_matter(entry: bytes) -> None:
    stored = noise(16, 8)
    orientation = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + orientation + entry + bytes(4)
    turned = pictures.decode(encode(stored, "JPEG", exif=exif, quality=95))
    assert turned.size == (8, 16)
    expected = pictures.decode(encode(stored, "JPEG", quality=95)).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(expected))


@given(st.binary(max_size=300), st.sampled_from([*range(0xE1, 0xEE), 0xEF, 0xFE]), st.sampled_from(BEGINNINGS))
def test_what_stands_beside_the_pixels_of_a_jpeg_does_not_matter(content: bytes, marker: int, start: bytes) -> None:
    content = start + content
    segment = struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content
    image = pictures.decode(JPEG[:2] + segment + JPEG[2:])
    assert sorted(image.size) == [30, 40]
    if start != BEGINNINGS[0]:  # which may turn it
        np.testing.assert_array_equal(np.asarray(image), np.asarray(pictures.decode(JPEG)))


def test_no_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For PostScript, Pillow runs Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is looked for once
    with pytest.raises(UserError, match="it is PostScript"):
        pictures.decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    assert not (tmp_path / "started").exists()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert_decodes_to(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), np.array([255, 0, 0]))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"<html>Not found</html>", "it is a web page"),
        (b"no picture", "Not an image that can be read here: it starts with b'no picture'"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "it is HEIC"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[: len(PNG) // 2], "truncated"),
        (PNG[:50] + b"XXXX" + PNG[54:], "broken"),
        (encode(Image.new("L", (101, 1)), "PNG"), "too thin: 101 x 1"),
        (encode(Image.new("F", (2, 2), 300.0), "TIFF"), "floating-point pixels from 300 to 300"),
        (encode(Image.new("F", (2, 2), float("nan")), "TIFF"), "floating-point pixels from nan"),
        (encode(Image.new("I", (2, 2), 70_000), "TIFF"), "more than 16 bits"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pictures.decode(data)


def test_decompression_bomb() -> None:
    png = encode(Image.new("RGB", (1, 1)), "PNG")
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
    bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    with pytest.raises(UserError, match=r"too large: it has more than 89,478,485 pixels.*CLIPCAP_MAX_PIXELS"):
        pictures.decode(bomb)


@pytest.mark.parametrize(("file_format", "limit"), [("PNG", 600), ("WEBP", 1200), ("AVIF", 1200), ("JPEG2000", 1200)])
def test_the_limit_is_lower_where_decoders_take_more_memory(
    file_format: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(noise(30, 20), file_format)
    monkeypatch.setenv(pictures.MAX_PIXELS, str(limit))
    assert pictures.decode(data).size == (30, 20)
    monkeypatch.setenv(pictures.MAX_PIXELS, str(limit - 1))
    with pytest.raises(UserError, match="it has more than 599 pixels"):
        pictures.decode(data)


def test_a_small_tiff_of_a_huge_tile() -> None:
    """Ten pixels, for which a tile of 134 million would be unpacked."""
    tags = [
        (256, 10),
        (257, 1),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 11584),
        (323, 11584),
        (324, 150),
        (325, 9),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    with pytest.raises(UserError, match=r"too large: it has more than 89,478,485 pixels"):
        pictures.decode(data.ljust(150, b"\0") + zlib.compress(b""))


@pytest.mark.parametrize("mode", ["RGB", "F", "I"])
def test_memory(mode: str, tmp_path: Path) -> None:
    """Pixels of four bytes are there once, with the resized picture or what was made of some rows."""
    Image.new(mode, (4000, 2500)).save(tmp_path / "a.tif", compression="packbits")
    program = f"""
from pathlib import Path
from clipcap_jax import pictures
def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1000
data = Path({str(tmp_path / "a.tif")!r}).read_bytes()
before = peak()
pictures.preprocess(pictures.decode(data), 224)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True)
    assert 40 < float(done.stdout) < 75  # megabytes


def test_the_limit_of_pixels_can_be_set() -> None:
    program = "import sys; from clipcap_jax import pictures; print(pictures.decode(sys.stdin.buffer.read()).size)"
    for limit, status in (("1199", 1), ("1200", 0)):
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=PNG,
            capture_output=True,
            env=os.environ | {"CLIPCAP_MAX_PIXELS": limit},
        )
        assert done.returncode == status, done.stderr


@pytest.mark.parametrize("given", ["", "many", "-1"])
def test_a_limit_that_is_no_number(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(pictures.MAX_PIXELS, given)
    with pytest.raises(UserError, match=rf"CLIPCAP_MAX_PIXELS has to be a whole number, not '{given}'"):
        pictures.decode(PNG)


def test_a_file_system_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(PNG)
    assert pictures.read(path) == PNG

    answers = threading.Event()
    monkeypatch.setattr(Path, "read_bytes", lambda _: PNG * answers.wait())
    monkeypatch.setenv(pictures.MAX_SECONDS, "0")
    try:
        with pytest.raises(TimeoutError, match=r"has not answered for 0 seconds.*CLIPCAP_MAX_SECONDS.*photo\.png"):
            pictures.read(path)
    finally:
        answers.set()

    def refused(_: Path) -> bytes:
        raise TimeoutError(errno.ETIMEDOUT, "the file system's own")

    monkeypatch.setattr(Path, "read_bytes", refused)
    monkeypatch.delenv(pictures.MAX_SECONDS)
    with pytest.raises(TimeoutError, match="the file system's own"):
        pictures.read(path)


@given(st.sampled_from([JPEG, PNG, GIF]), st.data())
def test_damage_gives_a_picture_or_a_user_error(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for position in draw.draw(st.lists(st.integers(0, len(data) - 1), max_size=5)):
        damaged[position] = draw.draw(st.integers(0, 255))
    end = draw.draw(st.integers(0, len(data)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(pictures.MAX_PIXELS, "100000")  # a damaged size must not take memory
        with contextlib.suppress(UserError):
            assert pictures.decode(bytes(damaged[:end])).mode == "RGB"


CASES = [name.removeprefix("image_") for name in np.load(DATA / "reference.npz") if name.startswith("image_")]


@pytest.mark.parametrize("case", CASES)
def test_preprocess_equals_clips(case: str) -> None:
    reference = np.load(DATA / "reference.npz")
    image, expected = Image.fromarray(reference[f"image_{case}"]), reference[f"expected_{case}"]
    np.testing.assert_array_equal(pictures.preprocess(image, len(expected)), expected)


sides = st.integers(1, 60)


@given(sides, sides, sides, st.tuples(*[st.integers(0, 255)] * 3))
def test_preprocess_keeps_a_plain_colour(width: int, height: int, size: int, colour: tuple[int, int, int]) -> None:
    pixels = pictures.preprocess(Image.new("RGB", (width, height), colour), size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (size, size, 3)
    assert (pixels == colour).all()


@given(sides, sides)
def test_preprocess_only_crops_where_the_short_side_fits(width: int, height: int) -> None:
    image, size = noise(width, height), min(width, height)
    left, top = round((width - size) / 2), round((height - size) / 2)
    expected = np.asarray(image)[top : top + size, left : left + size]
    np.testing.assert_array_equal(pictures.preprocess(image, size), expected)


@given(sides, sides, sides)
def test_preprocess_treats_both_directions_alike(width: int, height: int, size: int) -> None:
    image = noise(width, height).point(lambda value: 96 + value // 4)  # bicubic overshoot stays within 0 to 255
    turned = image.transpose(Image.Transpose.TRANSPOSE)
    difference = pictures.preprocess(image, size).astype(int) - pictures.preprocess(turned, size).swapaxes(0, 1)
    assert abs(difference).max() <= 2  # Pillow rounds to whole numbers between its two passes


def test_preprocess_equals_transformers_on_photos(shared: Path) -> None:
    """transformers' Pillow-based processor, to one 8-bit level, wherever it crops where OpenAI's code does.

    It crops at `(side - size) // 2`, torchvision at `round((side - size) / 2)`: of odd differences, those differ that
    round up.
    """
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size=224, do_normalize=False, do_rescale=False)
    compared = 0
    paths = sorted((shared / "data" / "coco_photos").rglob("*.jpg"))
    assert len(paths) == 100
    for path in paths:
        image = pictures.decode(path.read_bytes())
        short, long = sorted(image.size)
        difference = int(224 * long / short) - 224
        if round(difference / 2) != difference // 2:
            continue
        expected = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        ours = pictures.preprocess(image, 224)
        assert expected.shape == ours.shape
        assert np.abs(expected.astype(int) - ours).max() <= 1, path.name
        compared += 1
    assert compared >= 60


@pytest.mark.parametrize(("workers", "begun_first"), [(0, 1), (1, 5), (3, 5)])
def test_loading_ahead(workers: int, begun_first: int) -> None:
    """In order, and not further ahead than told; without threads, not at all."""
    begun: list[int] = []

    def load(item: int) -> int:
        begun.append(item)
        time.sleep(0.01 * (item % 3))
        return -item

    for taken, loaded in enumerate(pictures.load_ahead(load, range(20), workers=workers, ahead=4)):
        assert loaded == -taken
        assert len(begun) <= taken + begun_first
    assert sorted(begun) == list(range(20))
    assert list(pictures.load_ahead(load, [], workers=workers, ahead=4)) == []


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_what_is_closed_early_leaves_no_threads(workers: int) -> None:
    before = set(threading.enumerate())
    loaded = pictures.load_ahead(abs, range(1000), workers=workers, ahead=20)
    assert [next(loaded) for _ in range(3)] == [0, 1, 2]
    assert bool(set(threading.enumerate()) - before) == (workers > 0)
    loaded.close()
    assert_ended(before)


def test_an_error_ends_loading_ahead() -> None:
    begun: list[int] = []

    def load(item: int) -> int:
        begun.append(item)
        time.sleep(0.01)
        if item == 2:
            raise UserError("broken")
        return item

    with pytest.raises(UserError, match="broken"):
        list(pictures.load_ahead(load, range(1000), workers=1, ahead=100))
    assert len(begun) < 500  # and not all 1000, however busy the machine is
