"""Reading data: clipcap_jax against plain ways to do the same, in one run.

    python benchmarks/data.py --photos FOLDER [--folder SCRATCH]

It prepares synthetic embeddings (640 wide, captions as long as COCO's) and the JPEG files of FOLDER in SCRATCH, then
measures

    embeddings   batches of 256 pairs, against a data set that pads one pair at a time and a loader that stacks them,
                 as the original does
    pictures     batches of decoded JPEG files, against Pillow alone with as many threads; and what decoding them at a
                 smaller scale (`Image.draft`) would gain and change; and the pictures that an evaluation reads, of
                 five captions each: by threads and once, against in turn and anew for each caption
    shards       an example read at random from few and from many shards, against TFDS's own reader
    opening      a data set, after preparing it, for the first and the second time, and the memory that an epoch takes
"""

import argparse
import collections
import itertools
import json
import multiprocessing
import tempfile
import time
import unittest.mock
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from clipcap_jax.datasets import RecordsSource, open_split, prepare_records, source
from clipcap_jax.inputs import batches as data_lib
from clipcap_jax.inputs.batches import CaptionData, Pairs, training_batches
from clipcap_jax.text.tokenizer import Tokenizer

WIDTH, BATCH, POOL_BATCHES, MAX_TOKENS, SIZE = 640, 256, 50, 68, 224
WORDS = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]


def prepare_embeddings(folder: Path, count: int) -> None:
    """The data set records/<count>: a caption each, of words that are a token each."""
    random = np.random.default_rng(0)
    np.save(folder / "e.npy", random.normal(size=(count, WIDTH)).astype(np.float16))
    # As GPT-2's tokens in COCO's captions, the end not included: mean 12, 5% below 9 and above 17.
    lengths = np.clip(np.rint(np.exp(random.normal(2.45, 0.22, count))).astype(int), 7, MAX_TOKENS - 1)
    with (folder / "c.jsonl").open("w") as file:
        for i, length in enumerate(lengths):
            record = {"image_id": str(i), "image": str(i), "split": "train"}
            file.write(json.dumps(record | {"captions": [" ".join(random.choice(WORDS, length))]}) + "\n")
    made = RecordsSource(str(count), str(folder / "c.jsonl"), embeddings=str(folder / "e.npy"))
    start = time.perf_counter()
    prepare_records(made, str(folder))
    print(f"preparing {count} records: {time.perf_counter() - start:.1f} s")


def words() -> Tokenizer:
    """A tokenizer for which each of the words is a token."""
    return Tokenizer.train([" ".join(WORDS), "".join(f" {word}" for word in WORDS)], 257 + 4 * len(WORDS))


def rate(batches: Iterable[object], batch_size: int, seconds: float) -> float:
    """Pairs a second, after the first batch."""
    batches = iter(batches)
    next(batches)
    start, count = time.perf_counter(), 0
    for _ in batches:
        count += batch_size
        if time.perf_counter() - start > seconds:
            break
    return count / (time.perf_counter() - start)


class PaddedPairs:
    """The original's data set, without PyTorch: one padded pair at a time."""

    def __init__(self, embeddings: np.ndarray, pairs: Pairs):
        self.embeddings, self.pairs = embeddings, pairs
        self.tokens = [
            pairs.tokens[start : start + length].astype(np.int64)
            for start, length in zip(pairs.starts, pairs.lengths, strict=True)
        ]

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = self.tokens[i]
        padded = np.concatenate([tokens, np.zeros(MAX_TOKENS - len(tokens), np.int64) - 1])
        mask = padded >= 0
        padded[~mask] = 0
        return padded, mask.astype(np.float32), self.embeddings[self.pairs.examples[i]]


def stacked(pairs: PaddedPairs, count: int) -> Iterable[tuple[np.ndarray, ...]]:
    while True:
        order = np.random.default_rng(0).permutation(count)
        for start in range(0, count - BATCH + 1, BATCH):
            items = [pairs[int(i)] for i in order[start : start + BATCH]]
            yield tuple(np.stack(parts) for parts in zip(*items, strict=True))


def measure_embeddings(folder: Path, name: str, seconds: float) -> None:
    data = CaptionData(open_split(name, "train", str(folder)), None)
    pairs = data.pairs(words(), MAX_TOKENS)
    theirs = rate(stacked(PaddedPairs(data.inputs(np.arange(len(data))), pairs), len(pairs)), BATCH, seconds)
    print(f"embeddings: {len(pairs)} pairs, {WIDTH} wide, batches of {BATCH}, mean length {pairs.lengths.mean():.1f}")
    for workers in (0, 1, 4):
        batches = training_batches(
            data, pairs, batch_size=BATCH, pool_batches=POOL_BATCHES, seed=0, steps=10**9, workers=workers
        )
        ours = rate(batches, BATCH, seconds)
        print(f"  {workers} workers: {ours:,.0f} pairs/s, stacked one by one {theirs:,.0f}, ratio {ours / theirs:.1f}")


def consume(batches: Iterable[object]) -> None:
    collections.deque(batches, maxlen=0)


def pillow(file: Path, draft: bool) -> np.ndarray:
    """Decode, resize and crop as CLIP does, with nothing around."""
    image: Image.Image = Image.open(file)
    if draft:
        image.draft("RGB", (SIZE, SIZE))  # the smallest of 1, 1/2, 1/4, 1/8 of the size that is not below this
    image = image.convert("RGB")
    short, long = sorted(image.size)
    resized = int(SIZE * long / short)
    width, height = (SIZE, resized) if image.width <= image.height else (resized, SIZE)
    left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


def measure_pictures(folder: Path, photos: Path, workers: int, seconds: float) -> None:
    files = sorted(photos.glob("*.jpg"))
    lines = [{"image": file.name, "captions": list("abcde"), "split": "train"} for file in files]
    (folder / "photos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare_records(RecordsSource("photos", str(folder / "photos.jsonl"), images=str(photos)), str(folder))
    data_lib._CACHED_BYTES = 0  # or they would be decoded once
    data = CaptionData(open_split("records/photos", "train", str(folder)), SIZE)
    pairs = data.pairs(words(), MAX_TOKENS)
    size = len(files) // 5

    def batches() -> Iterable[object]:
        return training_batches(data, pairs, batch_size=size, pool_batches=1, seed=0, steps=10**9, workers=workers)

    def evaluation() -> float:
        """Seconds, as it is."""
        start = time.perf_counter()
        consume(data_lib.input_batches(data, np.arange(len(data)), size, workers))
        return time.perf_counter() - start

    def evaluation_anew() -> float:
        """Seconds, if nothing were kept or read ahead: to caption, for the loss and for that with other pictures."""
        start = time.perf_counter()
        consume(data_lib.input_batches(data, np.arange(len(data)), size))
        consume(data_lib.validation_batches(data, pairs, size))
        consume(data_lib.validation_batches(data, pairs, size, permuted=True))
        return time.perf_counter() - start

    def bare(draft: bool) -> float:
        start, count = time.perf_counter(), 0
        with ThreadPoolExecutor(workers) as pool:
            while time.perf_counter() - start < seconds:
                count += len(list(pool.map(lambda file: pillow(file, draft), files)))
            return count / (time.perf_counter() - start)

    # In turns, and the best of each: what others on the machine cost is not ours to measure.
    rates = [(rate(batches(), size, seconds), bare(draft=False), bare(draft=True)) for _ in range(3)]
    ours, theirs, drafted = map(max, zip(*rates, strict=True))
    print(f"pictures: {len(files)} JPEG files, {SIZE} pixels, batches of {size}, {workers} threads")
    print(f"  {ours:,.0f} pictures/s, Pillow alone {theirs:,.0f}, ratio {ours / theirs:.2f}")
    ours, anew = map(min, zip(*[(evaluation(), evaluation_anew()) for _ in range(3)], strict=True))
    print(
        f"  evaluation of {len(files)} pictures with {len(pairs)} captions: {ours:.2f} s, one after the other and anew "
        f"for each caption {anew:.2f} s, ratio {anew / ours:.1f}"
    )
    differences = [np.abs(pillow(file, True).astype(int) - pillow(file, False)) for file in files]
    mean, largest = np.mean([each.mean() for each in differences]), max(each.max() for each in differences)
    print(
        f"  decoded at a smaller scale: {drafted:,.0f} pictures/s, ratio {drafted / theirs:.2f}; of 255, pixels differ "
        f"by {mean:.2f} on average, {largest} at most"
    )


def memory() -> tuple[float, float]:
    """Of this process in MB: its own, and mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile"))
    return own, mapped


def open_and_read(folder: Path, name: str, read: bool) -> str:
    """Open a data set, in a process of its own, and read an epoch."""
    tokenizer, before, start = words(), memory(), time.perf_counter()
    data = CaptionData(open_split(name, "train", str(folder)), None)
    opened = time.perf_counter()
    pairs = data.pairs(tokenizer, MAX_TOKENS)
    tokenised = time.perf_counter()
    steps = data_lib.steps_per_epoch(len(pairs), BATCH)
    batches = training_batches(data, pairs, batch_size=BATCH, pool_batches=POOL_BATCHES, seed=0, steps=steps, workers=1)
    next(batches)
    first = time.perf_counter()
    found = f"columns {opened - start:.3f} s, tokens {tokenised - opened:.3f} s, first batch {first - tokenised:.3f} s"
    if read:
        for _ in batches:
            pass
        own, mapped = (after - then for after, then in zip(memory(), before, strict=True))
        held = (len(data) * WIDTH * 2 + pairs.tokens.nbytes) / 1e6
        found += f"; after an epoch {own:.0f} MB, and {mapped:.0f} MB mapped; embeddings and tokens are {held:.0f} MB"
    return found


def measure_opening(folder: Path, counts: list[int]) -> None:
    for count, times in itertools.product(counts, ("first", "second")):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(open_and_read, folder, f"records/{count}", times == "second").result()
        print(f"opening {count} for the {times} time: {found}")


def measure_shards(folder: Path, counts: list[int], reads: int = 5000) -> None:
    random = np.random.default_rng(0)
    for count in counts:
        name = f"shards-{count}"
        width, size = 512, 16
        np.save(folder / "e.npy", random.normal(size=(count * size, width)).astype(np.float16))
        with (folder / "c.jsonl").open("w") as file:
            for i in range(count * size):
                file.write(json.dumps({"image_id": str(i), "split": "train", "caption": "a caption"}) + "\n")
        with unittest.mock.patch.object(source, "EMBEDDINGS_PER_SHARD", size):
            prepare_records(RecordsSource(name, str(folder / "c.jsonl"), embeddings=str(folder / "e.npy")), str(folder))
        split = open_split(f"records/{name}", "train", str(folder))
        theirs = tfds.builder_from_directory(folder / "records" / name / "1.0.0").as_data_source("train")
        places = random.integers(len(split), size=reads)
        times = []
        for read in (split, theirs):
            for place in range(0, len(split), size):
                read[place]  # open every shard
            start = time.process_time()
            for place in places:
                read[int(place)]
            times.append((time.process_time() - start) / reads * 1e6)
        ours, tfds_own = times
        print(f"{count} shards: {ours:.0f} us of CPU a read, TFDS's own {tfds_own:.0f}, ratio {tfds_own / ours:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files")
    parser.add_argument("--folder", type=Path, help="for what is prepared; a temporary one by default")
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--shards", type=int, nargs="*", default=[100, 640, 1200])
    parser.add_argument("--workers", type=int, default=2, help="threads that decode pictures")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each figure")
    arguments = parser.parse_args()
    if arguments.photos is not None and not any(arguments.photos.glob("*.jpg")):
        parser.error(f"there are no .jpg files in {arguments.photos}")
    if arguments.folder is not None:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for count in arguments.records:
            prepare_embeddings(folder, count)
        measure_opening(folder, arguments.records)
        measure_shards(folder, arguments.shards)
        measure_embeddings(folder, f"records/{arguments.records[-1]}", arguments.seconds)
        if arguments.photos is not None:
            measure_pictures(folder, arguments.photos, arguments.workers, arguments.seconds)


if __name__ == "__main__":
    main()
