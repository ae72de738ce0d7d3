"""Preparing and embedding pictures: clipcap_jax against plain ways to do the same, in one run.

    python benchmarks/prepare.py --photos FOLDER [--pictures 8000] [--embedded 1000] [--folder SCRATCH]

The photos are shrunk to a short side of 256 pixels and repeated, in tars as img2dataset writes them. Measured are

    preparing    pictures/s of `clipcap prepare cc12m` in one process and in one per core, against TFDS's own writer
    embedding    pictures/s of `clipcap embed` with ViT-B/32 (random weights), against one picture at a time, as the
                 original does
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from clipcap_jax import pictures
from clipcap_jax.datasets import open_split, prepare, schema
from clipcap_jax.datasets.conceptual import conceptual_source
from clipcap_jax.inputs.embed import Encoder, embed
from clipcap_jax.models import clip_vit
from clipcap_jax.models.clip_vit import normalize_pixels
from clipcap_jax.models.clipcap import tower

PER_TAR = 500


def write_tars(folder: Path, photos: Path, count: int) -> None:
    pictures = []
    for path in sorted(photos.glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        buffer = io.BytesIO()
        image.resize((round(scale * image.width), round(scale * image.height))).save(buffer, "JPEG", quality=95)
        pictures.append(buffer.getvalue())
    print(f"{count} pictures, {np.mean([len(data) for data in pictures]) / 1e3:.0f} kB on average")
    folder.mkdir()
    for number in range(-(-count // PER_TAR)):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for i in range(number * PER_TAR, min((number + 1) * PER_TAR, count)):
                key = f"{number:05}{i:04}"
                url = json.dumps({"url": f"http://example.com/{i}.jpg", "status": "success"}).encode()
                for suffix, data in (("jpg", pictures[i % len(pictures)]), ("txt", b"a photo"), ("json", url)):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


class Plain(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The same examples, checked in the same way, through TFDS's own writer."""

    VERSION = tfds.core.Version("1.0.0")
    name = "plain"

    def __init__(self, source: Any, data_dir: str) -> None:
        self.source = source
        super().__init__(data_dir=data_dir, file_format=schema.FILE_FORMAT)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=schema.features(has_images=True, embedding_width=None))

    def _split_generators(self, dl_manager: Any) -> Any:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for part in self.source.parts:
            for example in part.read():
                yield example.image_id, schema.to_fields(example, "train")


def seconds(work: Callable[..., object], *arguments: Any, **options: Any) -> float:
    start = time.perf_counter()
    work(*arguments, **options)
    return time.perf_counter() - start


def measure_preparing(folder: Path, count: int) -> None:
    source = conceptual_source("cc12m", folder / "tars")
    tfds.disable_progress_bar()
    theirs = count / seconds(Plain(source, str(folder / "plain")).download_and_prepare)
    for processes in (1, os.cpu_count() or 1):
        data_dir = str(folder / f"data{processes}")
        ours = count / seconds(prepare.prepare, source, data_dir, processes=processes)
        print(
            f"preparing, {processes} processes: {ours:,.0f} pictures/s, TFDS {theirs:,.0f}, ratio {ours / theirs:.2f}"
        )


def measure_embedding(folder: Path, count: int) -> None:
    config = clip_vit.PRESETS["ViT-B/32"]
    model = tower(config, jnp.dtype("float32"))
    pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
    params = jax.jit(model.init)(jax.random.key(0), pixels)["params"]
    one = jax.jit(lambda params, pixels: model.apply({"params": params}, normalize_pixels(pixels)))
    prepare.prepare(conceptual_source("cc12m", folder / "few"), str(folder / "few"))
    split = open_split("cc12m", "train", str(folder / "few"))

    def alone(index: int) -> np.ndarray:
        image = split[index].image
        assert image is not None
        return np.asarray(one(params, pictures.preprocess(pictures.decode(image), config.image_size)[None]))

    alone(0)
    some = min(count, 100)
    theirs = some / seconds(lambda: [alone(i) for i in range(some)])
    encoder = Encoder(config, params)
    options: dict[str, Any] = {"batch_size": 64, "workers": os.cpu_count() or 1}
    taken = seconds(embed, encoder, "cc12m", "mine", str(folder / "few"), **options)  # compiling included
    print(
        f"embedding: {count / taken:,.1f} pictures/s, one at a time {theirs:,.1f}, ratio {count / taken / theirs:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="a folder of JPEG files")
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--embedded", type=int, default=1000)
    parser.add_argument("--folder", type=Path, help="for what is prepared; a temporary one by default")
    arguments = parser.parse_args()
    if not any(arguments.photos.glob("*.jpg")):
        parser.error(f"there are no .jpg files in {arguments.photos}")
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_tars(folder / "tars", arguments.photos, arguments.pictures)
        measure_preparing(folder, arguments.pictures)
        write_tars(folder / "few", arguments.photos, arguments.embedded)
        measure_embedding(folder, arguments.embedded)


if __name__ == "__main__":
    main()
