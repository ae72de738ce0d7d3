"""The whole files that fuzz.py damages, by kind of input: for each a few folders, as names and contents.

The first file of a folder is the one that matters.
"""

import functools
import gzip
import io
import itertools
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import save
from shards import jpeg, sample

from clipcap_jax.text import clip_tokenizer

Files = dict[str, bytes]


def _picture(mode: str, width: int = 24, height: int = 16) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[4:12, 4:20] = 90, 140, 200, 128  # so that there are runs to pack
    if mode.startswith("I"):
        return Image.fromarray(pixels[..., 0].astype(np.uint16 if mode == "I;16" else np.int32) * 250)
    if mode == "F":
        return Image.fromarray(pixels[..., 0].astype(np.float32) / 255)
    return Image.fromarray(pixels).convert("RGB" if mode in ("CMYK", "YCbCr", "LAB") else "RGBA").convert(mode)


def _encoded(suffix: str, file_format: str, modes: str, *options: dict[str, Any]) -> list[Files]:
    found = []
    exif = Image.Exif()
    exif[274] = 6
    frames = {"save_all": True, "append_images": [_picture("RGB"), _picture("RGB")]}
    for mode, more in itertools.product(modes.split(), options or ({},)):
        chosen = {key: {"exif": exif, "frames": None}.get(key, value) for key, value in more.items()}
        if "frames" in chosen:
            chosen = {**frames, **{key: value for key, value in chosen.items() if key != "frames"}}
        file = io.BytesIO()
        _picture(mode).save(file, file_format, **chosen)
        found.append({f"a.{suffix}": file.getvalue()})
    return found


def _jpeg() -> list[Files]:
    several = {"progressive": True}, {"exif": 1, "comment": b"!"}, {"subsampling": 0, "restart_marker_rows": 1}
    return [
        *_encoded("jpg", "JPEG", "L RGB CMYK YCbCr", {}, *several, {"progressive": True, "optimize": True}),
        *_encoded("jpg", "MPO", "RGB", {"frames": 1}),
    ]


def _png() -> list[Files]:
    found = _encoded("png", "PNG", "1 L LA P RGB RGBA I;16", {}, {"exif": 1, "dpi": (72, 72)})
    found += _encoded("png", "PNG", "P L", {"transparency": 0}, {"icc_profile": b"none"})
    return found + _encoded("png", "PNG", "RGB P", {"frames": 1})


def _webp() -> list[Files]:
    found = _encoded("webp", "WEBP", "L RGB RGBA", {}, {"lossless": True}, {"exif": 1, "icc_profile": b"none"})
    return found + _encoded("webp", "WEBP", "RGB RGBA", {"frames": 1, "duration": 10})


def _avif() -> list[Files]:
    found = _encoded("avif", "AVIF", "L RGB RGBA", {}, {"subsampling": "4:4:4", "exif": 1}, {"quality": 100})
    return found + _encoded("avif", "AVIF", "RGB", {"frames": 1, "duration": 10})


def _gif() -> list[Files]:
    found = _encoded("gif", "GIF", "1 L P RGB", {}, {"interlace": 1}, {"transparency": 3, "comment": b"!"})
    return found + _encoded("gif", "GIF", "P RGB", {"frames": 1, "disposal": 2, "duration": 10})


def _bmp() -> list[Files]:
    found = _encoded("bmp", "BMP", "1 L P RGB RGBA")
    runs = bytes([24, 7, 0, 0] * 16 + [0, 1])  # of one colour: Pillow reads them, but writes none
    (palette,) = _encoded("bmp", "BMP", "P")
    header = bytearray(palette["a.bmp"])
    del header[int.from_bytes(header[10:14], "little") :]
    header[30:34] = b"\1\0\0\0"
    return [*found, {"a.bmp": bytes(header) + runs}]


def _tiff() -> list[Files]:
    found = _encoded("tif", "TIFF", "1 L LA P RGB RGBA CMYK YCbCr LAB I;16 I F", {}, {"big_tiff": True})
    packed = [{"compression": name} for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "tiff_deflate")]
    found += _encoded("tif", "TIFF", "L RGB RGBA I;16", *packed)
    found += _encoded("tif", "TIFF", "L RGB", {"compression": "jpeg"})
    found += _encoded("tif", "TIFF", "YCbCr", {"compression": "jpeg"})
    found += _encoded("tif", "TIFF", "1", *({"compression": name} for name in ("group3", "group4", "tiff_ccitt")))
    return found + _encoded("tif", "TIFF", "RGB", {"frames": 1}, {"exif": 1, "dpi": (72, 72)})


def _ppm() -> list[Files]:
    found = _encoded("ppm", "PPM", "1 L RGB I;16 F")
    for header, numbers in (b"P1\n#\n8 6\n", 2), (b"P2\n8 6\n255\n", 256), (b"P3 8 2 65535\n", 65536):
        found.append({"a.ppm": header + b" ".join(b"%d" % (index * 997 % numbers) for index in range(48))})
    return found


def _jpeg2000() -> list[Files]:
    more = {"irreversible": True}, {"tile_size": (8, 8), "num_resolutions": 2}, {"quality_layers": [20, 5]}
    found = _encoded("jp2", "JPEG2000", "L LA RGB RGBA I;16 YCbCr", {}, *more)
    return found + _encoded("j2k", "JPEG2000", "L RGB", {"no_jp2": True}, {"progression": "RPCL", "no_jp2": True})


_TEXTS = [["A dog.", "Ein Hund, der läuft."], ["A cat"], ['It says "stop".']]
_PICTURES = {f"pictures/{number}.jpg": jpeg(number) for number in (1, 2, 3)}


def _array(matrix: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, matrix)
    return file.getvalue()


_MATRIX = {"embeddings.npy": _array(np.arange(1, 13, dtype=np.float32).reshape(3, 4))}


def _rows() -> list[dict[str, Any]]:
    return [
        {"image": f"{number}.jpg", "image_id": number, "captions": texts, "split": "train", "embedding_row": number - 1}
        for number, texts in enumerate(_TEXTS, 1)
    ]


def _coco(captions: bool = True, **fields: Any) -> dict[str, Any]:
    images = [{"id": number, "file_name": f"{number}.jpg", **fields} for number in (1, 2, 3)]
    pairs = [(number, text) for number, texts in enumerate(_TEXTS, 1) for text in texts]
    annotations = [{"id": index, "image_id": number, "caption": text} for index, (number, text) in enumerate(pairs)]
    return {"images": images} | ({"annotations": annotations} if captions else {})


def _karpathy(name: str = "COCO_val2014_{:012}.jpg") -> dict[str, Any]:
    images = [
        {
            "filepath": "val2014",
            "filename": name.format(number),
            "split": split,
            "cocoid": number,
            "sentences": [{"raw": text, "tokens": text.split()} for text in texts],
        }
        for number, split, texts in zip((1, 2, 3), ("restval", "val", "test"), _TEXTS, strict=True)
    ]
    return {"images": images, "dataset": "coco"}


def _jsonl() -> list[Files]:
    lines = "".join(json.dumps(row) + "\n" for row in _rows())
    return [{"captions.jsonl": lines.encode(), **_PICTURES, **_MATRIX}, {"captions.jsonl": lines.encode(), **_PICTURES}]


def _json() -> list[Files]:
    joined = {f"{number}.jpg": texts for number, texts in enumerate(_TEXTS, 1)}
    contents = _rows(), joined, _coco(), _karpathy("../{}.jpg") | {"dataset": "mine"}
    return [{"captions.json": json.dumps(content).encode(), **_PICTURES} for content in contents]


def _table(suffix: str, between: str) -> list[Files]:
    rows = [["image", "caption", "split", "embedding_row"]]
    for number, text in enumerate(("A dog.", "Ein Hund; er läuft.", "A cat"), 1):
        rows.append([f"{number}.jpg", f'"{text}"' if number == 2 else text, "train", f"{number - 1}"])
    full, short = ("".join(between.join(row[:width]) + "\n" for row in rows).encode() for width in (4, 2))
    return [{f"captions.{suffix}": full, **_PICTURES, **_MATRIX}, {f"captions.{suffix}": short, **_PICTURES}]


def _npy() -> list[Files]:
    return [{**_MATRIX, **_jsonl()[0]}]


def _zipped(members: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content if isinstance(content, bytes | str) else json.dumps(content))
    return file.getvalue()


def _karpathys_zip() -> list[Files]:
    pictures = {f"val2014/COCO_val2014_{number:012}.jpg": jpeg(number) for number in (1, 2, 3)}
    archive = _zipped({"dataset_coco.json": _karpathy(), "dataset_flickr8k.json": {}})
    return [
        {"caption_datasets.zip": archive, **pictures},
        {"dataset_coco.json": json.dumps(_karpathy()).encode(), **pictures},
    ]


def _owners_zip() -> list[Files]:
    parts: dict[str, Any] = {}
    pictures: Files = {}
    for part, number in (("train2014", 1), ("val2014", 2)):
        name = f"COCO_{part}_{number:012}.jpg"
        pictures[f"{part}/{name}"] = jpeg(number)
        annotations = [{"image_id": number, "caption": text} for text in _TEXTS[number]]
        parts[f"annotations/captions_{part}.json"] = {
            "images": [{"id": number, "file_name": name}],
            "annotations": annotations,
        }
    lists = {"karpathy_val_images.txt": b"val2014/COCO_val2014_000000000002.jpg 2\n", "karpathy_test_images.txt": b""}
    return [{"annotations_trainval2014.zip": _zipped(parts), **lists, **pictures}]


def _flickr_zip() -> list[Files]:
    captions = "".join(
        f"{number}.jpg#{i}\t{text}\n" for number, texts in enumerate(_TEXTS, 1) for i, text in enumerate(texts)
    )
    lists = {
        f"Flickr_8k.{split}Images.txt": f"{number}.jpg\n" for number, split in enumerate(("train", "dev", "test"), 1)
    }
    pictures = {f"Images/{number}.jpg": jpeg(number) for number in (1, 2, 3)}
    return [{"Flickr8k_text.zip": _zipped({"Flickr8k.token.txt": captions, **lists}), **pictures}]


def _nocaps() -> list[Files]:
    content = _coco(domain="in-domain", open_images_id="0a")
    pictures = {f"val/{number}.jpg": jpeg(number) for number in (1, 2, 3)}
    return [{"nocaps_val_4500_captions.json": json.dumps(content).encode(), **pictures}]


def _tar() -> list[Files]:
    found = []
    for tar_format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
            for number in (1, 2):
                long = "é" * 60 * (tar_format != tarfile.USTAR_FORMAT)
                for suffix, data in sample(number).items():
                    info = tarfile.TarInfo(f"{number:09}{long}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        stats = {"count": 2, "successes": 2, "failed_to_download": 0, "failed_to_resize": 0}
        found.append({"00000.tar": file.getvalue(), "00000_stats.json": json.dumps(stats).encode()})
    return found


def _zip() -> list[Files]:
    return [
        {"pictures.zip": _zipped({"val2014/": b"", "val2014/1.jpg": jpeg(1), "val2014/2.jpg": jpeg(2), "a.txt": "a"})}
    ]


def _pkl() -> list[Files]:
    from convert.test_embeddings import ENTRIES, MATRIX, dumps, tensor

    return [{"oscar.pkl": dumps({"clip_embedding": tensor(MATRIX), "captions": ENTRIES})}]


def _pt() -> list[Files]:
    import torch

    state = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.bias": torch.ones(2, dtype=torch.half),
        "n": torch.tensor(7),
    }
    found = []
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=zipped)
        found.append({"model.pt": file.getvalue()})
    return [
        *found,
        {"model.pt": _zipped({"a/data.pkl": pickle.dumps({}), "a/constants.pkl": b"", "a/code/a.py": b"1"})},
    ]


def _safetensors() -> list[Files]:
    arrays: dict[str, np.ndarray] = {
        "a.weight": np.ones((2, 3), np.float32),
        "a.bias": np.zeros(2, np.float16),
        "n": np.array(7),
    }
    whole = save(arrays)
    shards = {"1.safetensors": save({"a.weight": arrays["a.weight"]}), "2.safetensors": save({"n": arrays["n"]})}
    index = json.dumps({"weight_map": {"a.weight": "1.safetensors", "n": "2.safetensors"}}).encode()
    return [{"model.safetensors": whole}, {"model.safetensors.index.json": index, **shards}]


def _tokenizer() -> list[Files]:
    from clipcap_jax.text.tokenizer import Tokenizer

    content = Tokenizer.train(["a dog and a cat", "a dog", "ein Hund"], 270).to_dict()["tokenizer_json"]
    model = json.loads(content)["model"]
    vocabulary = json.dumps(model["vocab"]).encode()
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"]).encode()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "model_max_length": 1024}
    return [
        {"tokenizer.json": content.encode()},
        {"tokenizer_config.json": json.dumps(settings).encode(), "tokenizer.json": content.encode()},
        {"vocab.json": vocabulary, "merges.txt": b"#version: 0.2\n" + merges},
        {"vocab.bpe": b"#version: 0.2\n" + merges, "encoder.json": vocabulary},
    ]


def _clip_tokenizer() -> list[Files]:
    from clip_files import MERGES
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    pieces = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        *map("".join, MERGES),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    merges = "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in MERGES)
    pairs = itertools.islice(itertools.product(letters, letters), clip_tokenizer._OPENAI_MERGES)
    openai = "version\n" + "".join(f"{first} {second}\n" for first, second in pairs)
    vocabulary = json.dumps({piece: index for index, piece in enumerate(pieces)}).encode()
    return [
        {"vocab.json": vocabulary, "merges.txt": merges.encode()},
        {"bpe_simple_vocab_16e6.txt.gz": gzip.compress(openai.encode(), 1, mtime=0)},
    ]


SEEDS: dict[str, Callable[[], list[Files]]] = {
    "jpeg": _jpeg,
    "png": _png,
    "webp": _webp,
    "avif": _avif,
    "gif": _gif,
    "bmp": _bmp,
    "tiff": _tiff,
    "ppm": _ppm,
    "jpeg2000": _jpeg2000,
    "jsonl": _jsonl,
    "json": _json,
    "csv": functools.partial(_table, "csv", ","),
    "tsv": functools.partial(_table, "tsv", "\t"),
    "txt": functools.partial(_table, "txt", ","),
    "npy": _npy,
    "karpathy": _karpathys_zip,
    "coco": _owners_zip,
    "flickr8k": _flickr_zip,
    "nocaps": _nocaps,
    "tar": _tar,
    "zip": _zip,
    "pkl": _pkl,
    "pt": _pt,
    "safetensors": _safetensors,
    "tokenizer": _tokenizer,
    "clip_tokenizer": _clip_tokenizer,
}
