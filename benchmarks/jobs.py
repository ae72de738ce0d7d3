"""Whole jobs, each in a process of its own as its user starts it, beside the parts that they cannot do without.

    python benchmarks/jobs.py [--photos FOLDER] [--only start demo caption embed train] [--rounds 3]

Prints a JSON object a line. Weights are random, of the paper's sizes: ViT-B/32, an MLP mapper, GPT-2 124M; float32 on
CPUs, bfloat16 elsewhere. Compiled programs are kept from one process to the next.

    start     seconds of `clipcap caption` of one photo: the first process compiles, the second does not
    demo      seconds to the first step of `train.py` with the config `shapes`, from nothing: no data, no programs
    caption   pictures/s of `clipcap caption FOLDER`, beams of 5, 20 tokens, without its start: more pictures less fewer
    embed     the same of `embed`, with ViT-B/32
    train     pairs/s of `train.py`, between two of its lines in metrics.jsonl

`parts` are, at the same batch and in as many threads, decoding alone and the programs alone, whose input is there;
`share` is the job's rate over that of the slower part. Photos are repeated until there are enough; without --photos,
pictures of noise, of 640 x 480 pixels, take their place.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import programs
from PIL import Image

from clipcap_jax import config as config_lib
from clipcap_jax import parallel, pictures
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.checkpoints.metadata import Metadata
from clipcap_jax.checkpoints.store import Checkpoints
from clipcap_jax.datasets import RecordsSource, prepare_records
from clipcap_jax.inputs.embed import Encoder, embed
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer

Line = dict[str, Any]

ROOT = Path(__file__).parents[1]
CAPTION = "a man rides a brown horse along the beach at low tide"  # of every picture: one length, so one program
TOKENS = 14  # to which it is padded
PAIRS = 40  # a batch of training
BATCH = {"gpt2": 32, "tiny": 8}
STEPS = {"gpt2": (3, 9), "tiny": (20, 60)}  # of a training: between the lines of these the rate is taken
CLIPS = {"gpt2": "ViT-B/32", "tiny": "tiny ViT"}


@dataclasses.dataclass(frozen=True)
class Bench:
    """Where it all lies. The process that works is given the same, so all paths are strings."""

    folder: str
    sizes: str
    workers: int

    @property
    def run(self) -> Path:
        return Path(self.folder, "run")

    @property
    def batch(self) -> int:
        return BATCH[self.sizes]

    def photos(self, count: int) -> list[Path]:
        return sorted(Path(self.folder, "photos").iterdir())[:count]

    def environment(self, programs: str = "programs") -> dict[str, str]:
        """`programs`: the name of the folder that compiled ones are kept in."""
        return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path(self.folder, programs)), "PYTHONPATH": str(ROOT)}

    def seconds(self, *command: str | Path) -> float:
        """Of a process, from its start to its end."""
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command], env=self.environment(), cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
        return time.perf_counter() - start

    def work(self, name: str, arguments: Any) -> Any:
        """What a function of this file says, in a process of its own."""
        command = [sys.executable, __file__, "--work", json.dumps([name, arguments, dataclasses.asdict(self)])]
        done = subprocess.run(command, env=self.environment(), stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, help="a folder of JPEG files [noise]")
    parser.add_argument("--only", nargs="+", default=list(JOBS), choices=JOBS)
    parser.add_argument("--sizes", default="gpt2", choices=BATCH, help="tiny: for a test")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help=argparse.SUPPRESS)  # this process is one that works
    arguments = parser.parse_args()
    if arguments.work:
        name, given, bench = json.loads(arguments.work)
        print(json.dumps(WORK[name](Bench(**bench), given)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.photos:
            arguments.photos = Path(folder)
            Image.effect_noise((640, 480), 20).convert("RGB").save(Path(folder, "noise.jpg"))
        photos = sorted(arguments.photos.glob("*.jpg"))
        if not photos:
            parser.error(f"there are no .jpg files in {arguments.photos}")
        bench = Bench(folder, arguments.sizes, workers=os.cpu_count() or 1)
        Path(folder, "photos").mkdir()
        for number, photo in zip(range(6 * bench.batch), itertools.cycle(photos), strict=False):
            Path(folder, "photos", f"{number:06}.jpg").symlink_to(photo.absolute())
        subprocess.run([sys.executable, ROOT / "benchmarks" / "device.py", "--only", "device"], check=True)
        bench.work("make", 0)
        for name in arguments.only:
            for line in JOBS[name](bench, arguments.rounds):
                print(json.dumps({"sizes": bench.sizes, **line}), flush=True)


def start(bench: Bench, _: int) -> Iterator[Line]:
    """Of a second process too, which finds the programs of the first."""
    for name in ("first", "second"):
        output = Path(bench.folder, f"{name}.jsonl")
        taken = bench.seconds("-m", "clipcap_jax", "caption", bench.run, *bench.photos(1), "--output", output)
        yield {"case": f"start/{name}", "seconds": taken}


def demo(bench: Bench, rounds: int) -> Iterator[Line]:
    seconds = []
    for number in range(rounds):
        folder = Path(bench.folder, f"demo{number}")
        settings = {"data.data_dir": folder, "train.epochs": 1e-3, "train.log_every": 1}
        start = time.perf_counter()
        lines = logged("shapes", folder / "run", settings, bench.environment(f"demo_programs{number}"))
        seconds.append(lines[1] - start)
    yield {"case": "start/demo", "seconds": statistics.median(seconds), "spread": [min(seconds), max(seconds)]}


def caption(bench: Bench, rounds: int) -> Iterator[Line]:
    numbers = itertools.count()

    def job(count: int) -> float:
        output = Path(bench.folder, f"captions{next(numbers)}.jsonl")
        options = ["--batch-size", str(bench.batch), "--workers", str(bench.workers), "--output", str(output)]
        return bench.seconds("-m", "clipcap_jax", "caption", bench.run, *bench.photos(count), *options)

    yield compared(bench, "caption", job, "search", rounds)


def embedding(bench: Bench, rounds: int) -> Iterator[Line]:
    numbers = itertools.count()

    def job(count: int) -> float:
        arguments = [count, next(numbers)]
        bench.work("photos", arguments)  # which looks at each picture once, too
        return bench.seconds(__file__, "--work", json.dumps(["embed", arguments, dataclasses.asdict(bench)]))

    yield compared(bench, "embed", job, "tower", rounds)


def compared(bench: Bench, name: str, job: Callable[[int], float], program: str, rounds: int) -> Line:
    """A job of 6 batches, without what one of one batch takes, beside its parts; one after the other, in turn."""
    few, many = bench.batch, 6 * bench.batch
    job(few)  # compiles
    rates: dict[str, list[float]] = {name: [], "decoding": [], program: []}
    for _ in range(rounds):
        rates[name].append((many - few) / (job(many) - job(few)))
        for part in ("decoding", program):
            rates[part].append(bench.work(part, many))
    medians = {part: statistics.median(found) for part, found in rates.items()}
    rate = medians.pop(name)
    spread = [min(rates[name]), max(rates[name])]
    return {"case": name, "rate": rate, "spread": spread, "parts": medians, "share": rate / min(medians.values())}


def training(bench: Bench, rounds: int) -> Iterator[Line]:
    rates: dict[str, list[float]] = {"train": [], "step": []}
    first, last = STEPS[bench.sizes]
    for number in range(rounds):
        run = Path(bench.folder, f"training{number}")
        lines = logged("coco_mlp", run, training_settings(bench, last), bench.environment())
        rates["train"].append((last - first) * PAIRS / (lines[last] - lines[first]))
        rates["step"].append(bench.work("step", 0))
    medians = {part: statistics.median(found) for part, found in rates.items()}
    rate, spread = medians["train"], [min(rates["train"]), max(rates["train"])]
    parts = {"step": medians["step"]}
    yield {
        "case": "train",
        "batch": PAIRS,
        "rate": rate,
        "spread": spread,
        "parts": parts,
        "share": rate / parts["step"],
    }


def logged(config: str, run: Path, settings: Line, environment: dict[str, str]) -> dict[int, float]:
    """When a training's steps were logged, by `time.perf_counter`."""
    lines: dict[int, float] = {}
    command = [sys.executable, "train.py", f"--config={config}", f"--workdir={run}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        time.sleep(0.01)
        text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
        for line in text.splitlines():
            lines.setdefault(json.loads(line)["step"], time.perf_counter())
    if process.returncode:
        raise RuntimeError("train.py has failed: see above")
    return lines


JOBS = {"start": start, "demo": demo, "caption": caption, "embed": embedding, "train": training}


def dtype() -> Any:
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def captioner(bench: Bench) -> ClipCap:
    return programs.captioner("mlp", bench.sizes, CLIPS[bench.sizes], dtype())


def training_settings(bench: Bench, steps: int) -> Line:
    gpt2 = programs.GPT2S[bench.sizes]
    return {
        "data.name": "records/bench",
        "data.data_dir": str(Path(bench.folder, "data")),
        "tokenizer.source": "captions",
        "model.clip": "none",
        "model.dtype": dtype(),
        **{
            f"model.gpt2.{name}": getattr(gpt2, name)
            for name in ("vocab_size", "positions", "width", "layers", "heads")
        },
        "data.max_tokens": 20,
        "train.epochs": float(steps),
        "train.pretrained.clip": "",
        "train.pretrained.gpt2": "",
        "train.log_every": 1,
        "evaluate.images": 0,
        "evaluate.decode.max_tokens": 20,
    }


# What follows runs in a process of its own.


def make(bench: Bench, _: Any) -> None:
    """A run with random weights, and a data set of one batch of embeddings."""
    folder = Path(bench.folder)
    model = captioner(bench)
    with contextlib.closing(Checkpoints(bench.run, keep=1)) as checkpoints:
        checkpoints.save_weights(programs.random_params(programs.param_shapes(model)), metadata(bench, model))
    table = folder / "captions.jsonl"
    lines = [{"image_id": str(number), "caption": CAPTION, "split": "train"} for number in range(PAIRS)]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.save(folder / "embeddings.npy", programs.random_embeddings(PAIRS))
    source = RecordsSource("bench", str(table), embeddings=str(folder / "embeddings.npy"), encoder="none")
    prepare_records(source, str(folder / "data"))


def metadata(bench: Bench, model: ClipCap) -> Metadata:
    """As of a run of configs/coco_mlp.py."""
    values = runpy.run_path(str(ROOT / "configs" / "coco_mlp.py"))["get_config"]()
    values.update_from_flattened_dict(training_settings(bench, 1))
    config = config_lib.from_dict(values.to_dict())
    data = dataclasses.replace(config.data, input="image")
    config = dataclasses.replace(config, data=data, model=model.config)
    tokenizer = Tokenizer.train([CAPTION], model.config.gpt2.vocab_size)
    return Metadata(config, tokenizer, encoder="", embedding_width=programs.embedding_width(model))


def decoding(bench: Bench, count: int) -> float:
    size = programs.TOWERS[CLIPS[bench.sizes]].image_size

    def load(path: Path) -> np.ndarray:
        return pictures.preprocess(pictures.decode(pictures.read(path)), size)

    start = time.perf_counter()
    for _ in pictures.load_ahead(load, bench.photos(count), workers=bench.workers, ahead=bench.batch):
        pass
    return count / (time.perf_counter() - start)


def search(bench: Bench, count: int) -> float:
    captioner = Captioner.load(bench.run)
    return rate(lambda batch: captioner.generate(captioner.params, batch), bench, count)


def encoder_of(bench: Bench) -> Encoder:
    clip = programs.TOWERS[CLIPS[bench.sizes]]
    return Encoder(clip, programs.random_params(programs.tower_shapes(clip)), dtype())


def prepare_photos(bench: Bench, arguments: Any) -> None:
    count, number = arguments
    folder = Path(bench.folder, f"embedded{number}")
    folder.mkdir()
    lines = [{"image": path.name, "caption": CAPTION, "split": "train"} for path in bench.photos(count)]
    (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    photos = RecordsSource("photos", str(folder / "captions.jsonl"), images=str(Path(bench.folder, "photos")))
    prepare_records(photos, str(folder))


def embed_photos(bench: Bench, arguments: Any) -> None:
    folder = str(Path(bench.folder, f"embedded{arguments[1]}"))
    embed(encoder_of(bench), "records/photos", "new", folder, batch_size=bench.batch, workers=bench.workers)


def tower(bench: Bench, count: int) -> float:
    encoder = encoder_of(bench)
    run = parallel.map_rows(programs.embed_pictures(encoder.config, dtype()), local=True)
    params = parallel.replicate(encoder.params)
    return rate(lambda batch: run(params, batch), bench, count)


def rate(work: Callable[[np.ndarray], object], bench: Bench, count: int) -> float:
    """Pictures a second, of batches that are there."""
    size = programs.TOWERS[CLIPS[bench.sizes]].image_size
    batch = np.random.default_rng(0).integers(0, 256, (bench.batch, size, size, 3), np.uint8)
    work(batch)
    start = time.perf_counter()
    for _ in range(count // bench.batch):
        work(batch)
    return count / (time.perf_counter() - start)


def step(bench: Bench, _: Any) -> float:
    """Pairs a second of the step that `train.py` takes, always with one batch, which is there."""
    model = programs.captioner("mlp", bench.sizes, dtype=dtype())
    layout = parallel.DATA_PARALLEL
    state, frozen = (
        layout.place(tree)
        for tree in programs.training_state(model, programs.random_params(programs.param_shapes(model)))
    )
    batch = layout.send(programs.random_batch(model, PAIRS, TOKENS))
    take = layout.map_step(programs.training_step(model))
    first, last = STEPS[bench.sizes]
    for number in range(last):
        if number == first:
            start = time.perf_counter()
        state, metrics = take(state, frozen, batch)
        jax.block_until_ready(metrics)
    return (last - first) * PAIRS / (time.perf_counter() - start)


WORK: dict[str, Callable[[Bench, Any], Any]] = {
    "make": make,
    "decoding": decoding,
    "search": search,
    "photos": prepare_photos,
    "embed": embed_photos,
    "tower": tower,
    "step": step,
}


if __name__ == "__main__":
    main()
