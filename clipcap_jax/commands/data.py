"""`clipcap prepare` and `clipcap embed`."""

import argparse
import dataclasses
import functools
from typing import Any

from clipcap_jax import jobs
from clipcap_jax.commands.cli import add_cluster_options, cpus, positive, start_processes
from clipcap_jax.errors import UserError
from clipcap_jax.progress import screen


def add(commands: Any) -> None:
    """Add them to the parser's commands."""
    prepare = commands.add_parser("prepare", help="prepare a data set for training")
    kinds = prepare.add_subparsers(required=True, metavar="DATASET")
    shapes = kinds.add_parser("shapes", help="drawings of coloured shapes, made on the spot")
    shapes.set_defaults(run=_prepare_shapes)
    records = kinds.add_parser("records", help="your own pictures or embeddings, with a captions file")
    records.set_defaults(run=_prepare_records)
    records.add_argument("--name", required=True, help='the data set will be "records/<name>"')
    records.add_argument(
        "--captions",
        required=True,
        help="a .jsonl, .json, .csv, .tsv or .txt file of image and caption, and of image_id, split, embedding_row or "
        "domain",
    )
    records.add_argument("--images", help="the folder that the captions file's image names are looked up in")
    records.add_argument("--image-field", help="what the captions file calls the file name [image or file_name]")
    records.add_argument("--caption-field", help="what it calls the caption [caption, captions or text]")
    records.add_argument("--embeddings", help=".npy matrix, one row per picture")
    records.add_argument("--encoder", help="what made the embeddings, such as ViT-B/32")
    splits = records.add_mutually_exclusive_group()
    splits.add_argument("--split", help="the split of pictures that name none")
    splits.add_argument(
        "--shares",
        type=functools.partial(_fraction, most=100),
        nargs=3,
        metavar=("TRAIN", "VAL", "TEST"),
        help="how many percent of them are of which split, drawn by a hash of the image id [90 5 5]",
    )
    records.add_argument("--max-skipped", type=_fraction, default=0.01, help="share of records that may be bad [0.01]")
    for name, description in jobs.PUBLISHED.items():
        published = kinds.add_parser(name, help=description)
        published.set_defaults(run=_prepare_published, name=name)
        published.add_argument("--manual-dir", required=True, help="the folder with the owners' files; see docs/")
        published.set_defaults(download=False, download_images=False)
        if name in jobs.KARPATHY:
            published.add_argument("--download", action="store_true", help="fetch Karpathy's captions to it")
        if name in jobs.WITH_PICTURES:
            published.add_argument("--download-images", action="store_true", help="fetch the pictures to it")
        published.add_argument(
            "--max-skipped", type=_fraction, default=0.01, help="share of pictures that may be bad [0.01]"
        )
    for command in kinds.choices.values():
        _add_options(command)
        command.add_argument(
            "--processes", type=positive, default=cpus(), help="how many write shards [one per CPU that it may use]"
        )
        command.add_argument(
            "--beam",
            action="store_true",
            help="have Apache Beam's workers write them; all other options are Beam's, such as --runner=FlinkRunner",
        )

    embed = commands.add_parser("embed", help="run a CLIP tower over a prepared data set's pictures, once")
    embed.set_defaults(run=_embed)
    embed.add_argument("data", help='a prepared data set that holds pictures, such as "coco" or "records/mine"')
    embed.add_argument("--clip", required=True, help="the tower's weights: a file, a folder or a name on the hub")
    embed.add_argument("--clip-heads", type=positive, help="of the tower [as its config says, or the width over 64]")
    embed.add_argument("--name", help='the new data set will be "embeddings/<name>" [the old one\'s, with _ for /]')
    embed.add_argument("--batch-size", type=positive, default=256, help="pictures a step, over all devices [256]")
    embed.add_argument(
        "--workers", type=positive, default=cpus(), help="threads that decode [one per CPU that it may use]"
    )
    embed.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="to compute in [float32]")
    embed.add_argument(
        "--share", type=_share, default=(0, 1), help="this host's number, from 0, and how many there are: 0/4 [0/1]"
    )
    embed.add_argument("--max-skipped", type=_fraction, default=0.01, help="share of pictures that may be bad [0.01]")
    _add_options(embed)
    add_cluster_options(embed)


def _add_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data-dir", default="data", help="where prepared data sets lie [data]")


def _fraction(text: str, most: int = 1) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {most}")
    return value


def _share(text: str) -> tuple[int, int]:
    number, _, shares = text.partition("/")
    if not (number.isdecimal() and shares.isdecimal() and int(number) < int(shares)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number and how many there are, such as 0/4")
    return int(number), int(shares)


def _prepare(arguments: argparse.Namespace, source: Any, **options: Any) -> None:
    beam = arguments.others if arguments.beam else None
    screen().print(jobs.prepare(source, arguments.data_dir, processes=arguments.processes, beam=beam, **options))


def _prepare_published(arguments: argparse.Namespace) -> None:
    _prepare(
        arguments,
        arguments.name,
        manual_dir=arguments.manual_dir,
        download=arguments.download,
        download_images=arguments.download_images,
        max_skipped=arguments.max_skipped,
    )


def _prepare_shapes(arguments: argparse.Namespace) -> None:
    _prepare(arguments, "shapes")


def _prepare_records(arguments: argparse.Namespace) -> None:
    from clipcap_jax import datasets  # importing it takes seconds, which `clipcap --help` should not

    given: dict[str, Any] = {"split": arguments.split} if arguments.split else {}
    if arguments.shares:
        if abs(sum(arguments.shares) - 100) > 1e-6:
            raise UserError(
                f"--shares are {sum(arguments.shares):g} percent together: they have to be 100, as 80 10 10"
            )
        given = {
            "split": {name: share / 100 for name, share in zip(("train", "val", "test"), arguments.shares, strict=True)}
        }
    source = datasets.RecordsSource(
        name=arguments.name,
        captions=arguments.captions,
        images=arguments.images,
        embeddings=arguments.embeddings,
        encoder=arguments.encoder,
        image_field=arguments.image_field,
        caption_field=arguments.caption_field,
        **given,
    )
    _prepare(arguments, source, max_skipped=arguments.max_skipped)


def _embed(arguments: argparse.Namespace) -> None:
    from clipcap_jax import cluster
    from clipcap_jax.convert.clip import load_clip
    from clipcap_jax.inputs.embed import Encoder, embed

    console = start_processes(arguments)
    encoder = Encoder(*load_clip(arguments.clip, arguments.clip_heads), arguments.dtype)
    name = arguments.name or arguments.data.replace("/", "_")
    if cluster.joined() and arguments.share != (0, 1):
        raise UserError("--share is for processes that are started without knowing each other: leave it out")
    number, shares = share = (cluster.index(), cluster.count()) if cluster.joined() else arguments.share
    do_share = functools.partial(
        embed,
        encoder,
        arguments.data,
        name,
        arguments.data_dir,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        share=share,
        max_skipped=arguments.max_skipped,
    )
    summary = do_share()
    if cluster.joined():
        cluster.meet()
        summary = do_share()  # nothing, but to find what the last one has put together
    if summary is None:
        console.print(f"Share {number} of {shares} is finished, others are not yet: the last one puts them together.")
    else:
        console.print(summary)
        settings = f"--config.data.name={summary.name} --config.data.input=embedding"
        # With the tower, to caption pictures too.
        sizes = encoder.name.partition(",")[0].removeprefix("CLIP") or f'"{dataclasses.asdict(encoder.config)}"'
        settings += f" --config.model.clip={sizes} --config.train.pretrained.clip={arguments.clip}"
        console.print(f"To train on it: {settings}", soft_wrap=True)
