"""`clipcap score` and `clipcap submit`."""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipcap_jax.commands import captions_files
from clipcap_jax.commands.cli import add_overwrite_option, positive
from clipcap_jax.errors import UserError, counted, first
from clipcap_jax.evaluation import report
from clipcap_jax.evaluation.report import Row
from clipcap_jax.files import check_new, whole
from clipcap_jax.metrics import References, Scores, SpiceConfig, score_domains, unavailable, words
from clipcap_jax.metrics.coco_files import CaptionsFile
from clipcap_jax.metrics.health import health
from clipcap_jax.metrics.measure import Measure
from clipcap_jax.metrics.paper import ROWS
from clipcap_jax.metrics.scorecard import Scorecard
from clipcap_jax.progress import screen

if TYPE_CHECKING:
    from clipcap_jax.evaluation.clipscore import ClipScorer

_SUFFIXES = (".json", ".md", ".html")


def add(commands: Any) -> None:
    """Add them to the parser's commands."""
    score = commands.add_parser("score", help="score captions against references")
    score.set_defaults(run=_score)
    score.add_argument(
        "captions", type=Path, help="what clipcap caption wrote, a table of image and caption, or COCO's results .json"
    )
    score.add_argument(
        "references", type=Path, help="a table of image and caption (.jsonl, .csv, ...), or COCO's or nocaps' .json"
    )
    score.add_argument(
        "--output",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="write the scores to this .json or .md file, or a page with the captions to this .html file; repeatable",
    )
    add_overwrite_option(score)
    score.add_argument("--images", type=Path, help="the folder with the pictures, for the page and for --clipscore")
    score.add_argument(
        "--only-captioned", action="store_true", help="leave out the references of images without a caption"
    )
    score.add_argument("--compare", type=Path, metavar="BASELINE", help="also test the difference to these captions")
    score.add_argument("--paper", choices=sorted(ROWS), default="", help="show the paper's scores of this data set")
    score.add_argument("--plain-cider", action="store_true", help="also CIDEr itself; CIDEr-D is what is called CIDEr")
    score.add_argument(
        "--words",
        choices=words.NAMED,
        default="ptb",
        help="what counts as a word; for scripts without spaces: characters, or spaces where all is segmented [ptb]",
    )
    score.add_argument("--meteor", action="store_true", help="also METEOR, which needs Java")
    score.add_argument("--spice", action="store_true", help="also SPICE, which needs Java, and minutes")
    score.add_argument(
        "--clipscore", metavar="WEIGHTS", help="also CLIPScore, by this CLIP: a file, folder or hub name"
    )
    score.add_argument("--clip-tokenizer", default="", help="CLIP's: a file, folder or hub name [beside its weights]")
    score.add_argument("--spice-jars", default="", help="the folder with Stanford CoreNLP 3.6.0, Nashorn and ASM")
    score.add_argument("--spice-cache", default="", help="where parses are kept [~/.cache/clipcap_jax/spice]")
    score.add_argument("--spice-memory", type=positive, default=SpiceConfig.memory, help="GiB, at most [8]")
    score.add_argument("--spice-threads", type=positive, default=0, help="[one per core]")

    submit = commands.add_parser("submit", help="check captions for COCO's or nocaps' server, and write its file")
    submit.set_defaults(run=_submit)
    submit.add_argument("server", choices=("coco", "nocaps"))
    for split in ("val", "test"):
        submit.add_argument(
            f"--{split}",
            nargs=2,
            type=Path,
            metavar=("CAPTIONS", "IMAGES"),
            help="a results file, and the owner's .json that lists the pictures",
        )
    submit.add_argument("--name", default="clipcap", help="the method's, in the names of COCO's files [clipcap]")
    submit.add_argument("--output", type=Path, required=True, help="a .zip for coco, a .json for nocaps")
    add_overwrite_option(submit)


def _score(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    captions, file = _captions(arguments.captions), captions_files.read_references(arguments.references)
    compared = _captions(arguments.compare) if arguments.compare else None
    captions = captions_files.matched(captions, file, arguments.captions)
    compared = None if compared is None else captions_files.matched(compared, file, arguments.compare)
    texts = file.captions
    if arguments.only_captioned:
        texts = {image: several for image, several in texts.items() if image in captions}
        compared = compared and {image: text for image, text in compared.items() if image in texts}
        if not texts:
            raise UserError(f"no caption of {arguments.captions} is of an image that {arguments.references} has")
    references = _references(texts, captions, compared, arguments)
    console = screen()
    for name, reason in unavailable(meteor=arguments.meteor, spice=_spice(arguments), words=arguments.words).items():
        console.print(f"{name} will not be computed: {reason}", style="yellow", soft_wrap=True)
    pictures = {image: _picture(arguments.images, file, image) for image in texts} if arguments.images else {}
    _check_pictures(pictures, arguments)
    clip = _load_clip(arguments) if arguments.clipscore else None
    files = list(pictures.values())
    seen = clip.embed_pictures(list(texts), lambda i: files[i].read_bytes()) if clip else None

    def scored(given: dict[str, str]) -> Scores:
        more: dict[str, Measure] = {}
        if clip is not None:
            more = clip.measures(list(texts), seen, [given[image] for image in texts], list(texts.values()))
        scores = references.score(
            given, meteor=arguments.meteor, spice=_spice(arguments), plain_cider=arguments.plain_cider
        )
        return scores.add(more)

    details = {
        "captions of": arguments.captions,
        "references of": arguments.references,
        "baseline": arguments.compare,
        "CLIP": arguments.clipscore,
        "images without references": len(file.images.difference(file.captions)),
    }
    scores = scored(captions)
    scorecard = Scorecard(
        scores=scores,
        domains=score_domains(texts, captions, file.domains, scores),
        health=health(list(captions.values()), words=arguments.words),
        details={name: str(value) for name, value in details.items() if value},
        paper=arguments.paper,
        baseline=None if compared is None else scored(compared),
    )
    title = f"Captions of {arguments.captions.name}"
    report.print_scores(scorecard, console)
    for output in arguments.output:
        with whole(output) as partial:
            if output.suffix == ".html":
                rows = list(_rows(captions, file, scores, pictures))
                report.write_page(partial, title=title, rows=rows, scorecard=scorecard)
            else:
                text = scorecard.to_json() if output.suffix == ".json" else scorecard.to_markdown(title)
                partial.write_bytes(text.encode(errors="backslashreplace"))
        console.print(f"written: {output}", soft_wrap=True)


# All that can be wrong is looked for before anything is scored, which may take minutes.


def _check_options(arguments: argparse.Namespace) -> None:
    read = {path.resolve() for path in (arguments.captions, arguments.references, arguments.compare) if path}
    for output in arguments.output:
        if output.suffix not in _SUFFIXES:
            raise UserError(f"--output {output}: the name has to end in {', '.join(_SUFFIXES)}")
        if output.resolve() in read:
            raise UserError(f"--output {output} is one of the files to read")
        if not os.access(output.parent, os.W_OK):
            raise UserError(f"--output {output} cannot be written")
        check_new(output, overwrite=arguments.overwrite)
    for option, needed, kind in (
        (arguments.clipscore, arguments.images, "--clipscore compares captions with pictures: name them with --images"),
        (arguments.clip_tokenizer, arguments.clipscore, "--clip-tokenizer is --clipscore's: give that too"),
        (arguments.spice_jars, arguments.spice, "--spice-jars is --spice's: give that too"),
    ):
        if option and not needed:
            raise UserError(kind)


def _captions(path: Path) -> dict[str, str]:
    captions, without = captions_files.read_results(path)
    if without:
        told = f"{path}: {counted(without, 'picture')} could not be captioned"
        screen().print(told, style="yellow", soft_wrap=True)
    return captions


def _references(
    texts: dict[str, list[str]],
    captions: dict[str, str],
    compared: dict[str, str] | None,
    arguments: argparse.Namespace,
) -> References:
    try:
        references = References(texts, arguments.words)
    except UserError as error:
        raise UserError(f"{arguments.references}: {error}") from error
    files = {arguments.captions: captions} | ({} if compared is None else {arguments.compare: compared})
    for path, given in files.items():
        try:
            references.check(given)
        except UserError as error:
            partial = given is captions and 0 < len(texts.keys() & captions.keys()) < len(texts)
            hint = ". --only-captioned leaves out the images that have none" if partial else ""
            raise UserError(f"{path}: {error}{hint}") from error
    return references


def _check_pictures(pictures: dict[str, Path], arguments: argparse.Namespace) -> None:
    missing = [path for path in pictures.values() if not path.is_file()]
    if len(missing) == len(pictures) > 0 or (missing and arguments.clipscore):
        raise UserError(f"{len(missing)} of {len(pictures)} pictures are not there: {first(list(map(str, missing)))}")


def _spice(arguments: argparse.Namespace) -> SpiceConfig | None:
    if not arguments.spice:
        return None
    return SpiceConfig(arguments.spice_jars, arguments.spice_memory, arguments.spice_threads, arguments.spice_cache)


def _load_clip(arguments: argparse.Namespace) -> "ClipScorer":
    from clipcap_jax import parallel
    from clipcap_jax.evaluation.clipscore import ClipScorer

    parallel.keep_compiled_programs()
    return ClipScorer.load(arguments.clipscore, arguments.clip_tokenizer)


def _rows(captions: dict[str, str], file: CaptionsFile, scores: Scores, pictures: dict[str, Path]) -> Iterator[Row]:
    per_image = scores.per_image
    for image in scores.images:
        yield Row(
            image_id=image,
            caption=captions[image],
            references=tuple(file.captions[image]),
            scores={name: values[image] for name, values in per_image.items()},
            read_image=lambda: None,
            image_path=str(pictures.get(image, "")),
            picture="",
            finished=True,
        )


def _picture(folder: Path, file: CaptionsFile, image: str) -> Path:
    return folder / file.file_names.get(image, image)


def _submit(arguments: argparse.Namespace) -> None:
    from clipcap_jax.metrics import submission

    if not re.fullmatch(r"[\w.-]+", arguments.name):
        raise UserError(f"--name {arguments.name} cannot be part of a file's name")
    check_new(arguments.output, overwrite=arguments.overwrite)
    given = {split: getattr(arguments, split) for split in ("val", "test") if getattr(arguments, split)}
    if arguments.server == "coco":
        if set(given) != {"val", "test"}:
            raise UserError("COCO's server wants the captions of both splits: give --val and --test")
        results = {f"{split}2014": submission.checked(f"{split}2014", *files) for split, files in given.items()}
        submission.write_coco(arguments.output, arguments.name, results)
    else:
        if len(given) != 1:
            raise UserError("nocaps' server takes one split at a time: give --val or --test")
        [(split, files)] = given.items()
        submission.write_nocaps(arguments.output, submission.checked(f"nocaps {split}", *files))
    screen().print(f"{arguments.output} is ready for the server", soft_wrap=True)
