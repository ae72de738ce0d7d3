"""SPICE (Anderson et al., ECCV 2016) by its authors' Java program; pycocoevalcap brings it along without its parser."""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from clipcap_jax import files
from clipcap_jax.metrics import java
from clipcap_jax.metrics.measure import Measure, mean
from clipcap_jax.progress import is_hidden, screen

# What a caption costs that is not in the cache yet: 0.03 seconds on two cores.
_START_SECONDS = 300.0
_CAPTION_SECONDS = 0.5

# Its cache stores objects of Java's own by reflection, which Java 16 and later allow only where they are told to.
_OPEN = ("lang", "util", "util.concurrent", "math", "text", "net", "nio")
_OPENED = tuple(
    f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in (*(f"java.{p}" for p in _OPEN), "sun.nio.ch")
)

_MAVEN = "https://repo1.maven.org/maven2"
# What it needs beside its own jars: pattern of the file's name -> where it is published. Java 15 and later have no
# JavaScript engine (Nashorn, with ASM) of their own, with which the program writes its results.
_JARS = {
    "stanford-corenlp-3.6.0.jar": "edu/stanford/nlp/stanford-corenlp/3.6.0/stanford-corenlp-3.6.0.jar",
    "stanford-corenlp-3.6.0-models*.jar": "edu/stanford/nlp/stanford-corenlp/3.6.0/stanford-corenlp-3.6.0-models.jar",
    "nashorn-core-15*.jar": "org/openjdk/nashorn/nashorn-core/15.7/nashorn-core-15.7.jar",
    **{
        f"{name}-9*.jar": f"org/ow2/asm/{name}/9.8/{name}-9.8.jar"
        for name in ("asm", "asm-commons", "asm-tree", "asm-util", "asm-analysis")
    },
}


@dataclasses.dataclass(frozen=True)
class SpiceConfig:
    """How SPICE's program is run.

    Attributes:
      jars: the folder with Stanford CoreNLP 3.6.0, its models, Nashorn and ASM; "": pycocoevalcap's own `spice/lib`.
      memory: Java's limit, in GiB.
      threads: that parse; 0: one a core.
      cache: the folder that parses are kept in, which several processes may share; "": `~/.cache/clipcap_jax/spice`.
    """

    jars: str = ""
    memory: int = 8
    threads: int = 0
    cache: str = ""


def spice(captions: Sequence[str], references: Sequence[Sequence[str]], config: SpiceConfig) -> Measure:
    """SPICE, from text tokenised by `ptb.tokenize_all`: the mean of the images' F-scores.

    An image of which neither the caption nor a reference says anything that the parser finds scores 0.

    Raises:
      java.Unavailable: Java, pycocoevalcap or a jar is missing, or the program failed or took too long.
    """
    program, jars = find(config)
    kept = Path(config.cache).expanduser() if config.cache else files.home() / "spice"
    images = [
        {"image_id": str(i), "test": caption, "refs": list(texts)}
        for i, (caption, texts) in enumerate(zip(captions, references, strict=True))
    ]
    count = len(captions) + sum(map(len, references))
    with tempfile.TemporaryDirectory(prefix="spice-") as scratch:
        questions, answers = Path(scratch, "captions.json"), Path(scratch, "scores.json")
        questions.write_text(json.dumps(images))
        try:
            kept.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise java.Unavailable(f"SPICE's cache {kept} cannot be made: {error}") from error
        lines = java.run(
            "SPICE",
            program,
            [
                f"-Xmx{config.memory}G",
                *_OPENED,
                f"-Djava.io.tmpdir={scratch}",  # where the cache unpacks its native library
                "-classpath",
                os.pathsep.join(map(str, jars)),
                "edu.anu.spice.SpiceScorer",
                *(str(questions), "-out", str(answers), "-cache", str(kept), "-silent"),
                *("-threads", str(config.threads or os.cpu_count() or 1)),
            ],
            seconds=_START_SECONDS + _CAPTION_SECONDS * count,
        )
        columns = (SpinnerColumn(), TextColumn("SPICE {task.description}", markup=False), TimeElapsedColumn())
        shown = Progress(*columns, console=screen(stderr=True), transient=True, disable=is_hidden())
        with contextlib.closing(lines), shown as progress:
            task = progress.add_task(f"starts: {count:,} captions, those parsed before are in {kept}")
            for line in lines:
                progress.update(task, description=line.lower())
        return mean(_read(answers, len(captions)))


def find(config: SpiceConfig) -> tuple[str, list[Path]]:
    """Java, and SPICE's class path.

    Raises:
      java.Unavailable: one of them is missing.
    """
    program = java.find("SPICE", at_least=11)
    own = java.pycocoevalcap("SPICE", "spice")
    folder = Path(config.jars).expanduser() if config.jars else own / "lib"
    return program, [own / "spice-1.0.jar", *_check_jars(folder), own / "lib" / "*"]


def _check_jars(folder: Path) -> list[Path]:
    found = {pattern: sorted(folder.glob(pattern)) for pattern in _JARS}
    missing = [pattern for pattern, files in found.items() if not files]
    if missing:
        raise java.Unavailable(
            f"SPICE needs files that are not in {folder}: {', '.join(p.replace('*', '') for p in missing)}. Fetch "
            + " ".join(f"{_MAVEN}/{_JARS[pattern]}" for pattern in missing)
            + " to a folder, and name it with --spice-jars (evaluate.py: --spice_jars)."
        )
    return [files[0] for files in found.values()]


def _read(answers: Path, count: int) -> list[float]:
    try:
        scores = {entry["image_id"]: entry["scores"]["All"]["f"] for entry in json.loads(answers.read_text())}
        return [float(scores[str(i)]) for i in range(count)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise java.Unavailable(f"SPICE's Java program wrote no scores, or not of all captions: {error!r}") from error
