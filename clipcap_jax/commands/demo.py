"""`clipcap demo`."""

import argparse
import ipaddress
from pathlib import Path
from typing import Any

from clipcap_jax.commands.convert import add_original_options, original_options
from clipcap_jax.errors import UserError
from clipcap_jax.progress import screen


def add(commands: Any) -> None:
    """Add it to the parser's commands."""
    demo = commands.add_parser("demo", help="a page in the browser to try one captioner on pictures, or two")
    demo.set_defaults(run=_demo)
    demo.add_argument("run_folder", help="the folder of a run, or the original's .pt file")
    demo.add_argument("other_run", nargs="?", help="another one, or the same again: the captions of both side by side")
    demo.add_argument("--checkpoint", default="best", help='"best", "latest" or a step [best]')
    demo.add_argument("--other-checkpoint", default="best", help="of the other run [best]")
    demo.add_argument("--port", type=_port, default=7860, help="0 for any that is free [7860]")
    demo.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the page to other machines [127.0.0.1]")
    add_original_options(demo)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to {2**16 - 1}")
    return int(text)


def _demo(arguments: argparse.Namespace) -> None:
    from clipcap_jax import parallel
    from clipcap_jax.demo import server

    server.check_installed()
    parallel.keep_compiled_programs()
    with server.listen(arguments.host, arguments.port) as listening:
        captioners = {}
        for run, checkpoint in (
            (arguments.run_folder, arguments.checkpoint),
            (arguments.other_run, arguments.other_checkpoint),
        ):
            if run:
                captioner = _load(run, checkpoint, arguments)
                captioners[f"{run}, step {captioner.step}"] = captioner
        console = screen()
        console.print(f"The page is at {server.address(listening)}; Ctrl-C ends it", soft_wrap=True)
        if not ipaddress.ip_address(listening.getsockname()[0]).is_loopback:
            console.print("Whoever reaches this machine can use it: it asks for no password")
        server.serve(captioners, listening)


def _load(run: str, checkpoint: str, arguments: argparse.Namespace) -> Any:
    from clipcap_jax.captioning.captioner import Captioner

    original = original_options(arguments)
    captioner = Captioner.load(run, checkpoint, **(original if Path(run).is_file() else {}))
    if captioner.image_size is None:
        raise UserError(
            f"{run} captions {captioner.reader.embedding_kind()}, not pictures, and a page cannot make them: it takes "
            "a run with a vision tower, or a .pt file with --clip"
        )
    return captioner
