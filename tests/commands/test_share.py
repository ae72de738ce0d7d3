"""`clipcap push`, `clipcap pull` and captioners by name, by the hub's own client in a process that has no other hub."""

import contextlib
import io
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import hub_server
import numpy as np
import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import ModelCard
from safetensors.numpy import load, save
from tiny import EMBEDDING_WIDTH, Source, assert_same, named

from clipcap_jax import __main__, hub
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.errors import UserError

FILES = {".gitattributes", "README.md", "config.json", "model.safetensors", "scores.json", "tokenizer.json"}
Command = Callable[..., tuple[int, str]]


def command(folder: str, token: str, *arguments: str) -> tuple[int, str]:
    """Status and all that is shown of `clipcap`, in a folder."""
    shown = io.StringIO()
    argv = mock.patch.object(sys, "argv", ["clipcap", *arguments])
    environment = mock.patch.dict(os.environ, HF_TOKEN=token, COLUMNS="300")
    here = contextlib.chdir(folder)
    with argv, environment, here, contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        try:
            __main__.main()
        except SystemExit as stop:
            return int(stop.code or 0), shown.getvalue()
    return 0, shown.getvalue()


def load_captioner(name: Any, **options: Any) -> tuple[dict[str, Any], str]:
    """The parameters of `Captioner.load`, or what is wrong."""
    try:
        return named(Captioner.load(name, **options).params), ""
    except UserError as error:
        return {}, str(error)


def push_after(name: str, file: Path, after: str) -> str:
    """What `hub.push` says."""
    try:
        return hub.push(name, [file], after=after, private=False, message="more")
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with hub_server.serve() as server:
        yield server


@pytest.fixture(scope="module")
def process(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """The hub's client reads where the hub is when it is imported."""
    home = str(tmp_path_factory.mktemp("hub"))
    places = {"HF_ENDPOINT": server.address, "HF_HOME": home, "HF_HUB_CACHE": f"{home}/cache"}
    places |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "NO_PROXY": "*"}
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        with mock.patch.dict(os.environ, places):
            pool.submit(os.getpid).result()
        yield pool


@pytest.fixture
def clipcap_there(process: ProcessPoolExecutor, tmp_path: Path) -> Command:
    """Runs the command; `token`: who does, "" nobody."""

    def run(*arguments: str | Path, token: str = TOKEN) -> tuple[int, str]:
        return process.submit(command, str(tmp_path), token, *map(str, arguments)).result()

    return run


@pytest.fixture(scope="module")
def run(embeddings_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the scores of two checkpoints, the second of which is the best."""
    run = shutil.copytree(embeddings_run, tmp_path_factory.mktemp("runs") / "run")
    for step, score in ((100, 0.125), (200, 0.25)):
        (folder := run / "evaluations" / f"both-test-{step}").mkdir(parents=True)
        content = {
            "scores": {"CIDEr": score, "SPICE": None, "loss": 1.5},
            "intervals": {"CIDEr": [0.2, 0.3], "SPICE": [None, None]},
            "details": {"data set": "records/both/test", "checkpoint": f"step {step}", "decoding": "beam_size=1"},
        }
        (folder / "scores.json").write_text(json.dumps(content))
    (run / "checkpoints" / "200" / "metrics" / "metrics").write_text('{"CIDEr": 99.0}')
    return run


@pytest.fixture(scope="module")
def package(
    process: ProcessPoolExecutor, server: Hub, run: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What `push` puts into a new repository."""
    folder = str(tmp_path_factory.mktemp("package"))
    status, said = process.submit(
        command, folder, TOKEN, "push", str(run), "ann/ours", "--private", "--license=mit", "--message=The best"
    ).result()
    repository = server.repositories["ann/ours"]
    assert status == 0
    assert f"step 200, is now {server.address}/ann/ours/commit/{repository.newest}" in said
    assert repository.private
    return repository.commits[repository.newest]


def test_what_is_pushed(package: dict[str, bytes], run: Path) -> None:
    assert package.keys() == FILES
    assert json.loads(package["scores.json"]).keys() == {"both-test-200"}
    private = str(json.loads((run / "config.json").read_text())["config"]["data"]["data_dir"])
    assert len(private) > 10
    assert not [name for name, content in package.items() if private.encode() in content]
    card = ModelCard(package["README.md"].decode())
    data: Any = card.data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "mit",
        "clipcap_jax",
        "image-to-text",
    )
    [result] = data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("records/both", "test")
    assert (result.metric_name, result.metric_value) == ("CIDEr", 0.25)
    for line in (
        'captioner = clipcap_jax.Captioner.load("ann/ours")',
        f"[0]).text)  # {EMBEDDING_WIDTH} wide, from mean colour",
        "- Training: 40 epochs, batches of 8, learning rate 0.005 after 2 steps, seed 0",
        "- Checkpoint: step 200 of 200",
        "On records/both, split test, beam_size=1:",
        "| CIDEr | 0.2500 | 0.2000 to 0.3000 |",
        "| loss | 1.5000 |  |",
    ):
        assert line in card.text
    assert "No licence" not in card.text


def test_what_is_pulled_is_a_run(
    clipcap_there: Command, package: dict[str, bytes], server: Hub, run: Path, source: Source, tmp_path: Path
) -> None:
    server.add("ann/pulled", {**package, "modeling.py": b"raise SystemExit", "pytorch_model.bin": b"\x80"})
    status, said = clipcap_there("pull", "ann/pulled")
    assert (status, "ann/pulled is now in runs/pulled" in said) == (0, True)
    first, pulled = Captioner.load(run), Captioner.load(tmp_path / "runs" / "pulled")
    assert_same(named(pulled.params), named(first.params))
    assert pulled.metadata.tokenizer.same_ids(first.metadata.tokenizer)
    assert (pulled.metadata.encoder, pulled.decode) == (first.metadata.encoder, first.decode)
    status, said = clipcap_there("pull", "ann/pulled")
    assert (status, "runs/pulled is there already" in said) == (2, True)
    status, said = clipcap_there("caption", "ann/pulled", source.embeddings, "--output", "named.jsonl")
    assert status == 0
    assert clipcap_there("caption", run, source.embeddings, "--output", "here.jsonl")[0] == 0
    assert (tmp_path / "named.jsonl").read_text() == (tmp_path / "here.jsonl").read_text()
    asked = {asked.rpartition("/")[2] for asked in server.asked if "/ann/pulled/" in asked}
    assert asked == FILES - {".gitattributes", "README.md", "scores.json"}


def test_revisions(
    clipcap_there: Command, process: ProcessPoolExecutor, package: dict[str, bytes], server: Hub, run: Path
) -> None:
    repository = server.add("ann/changed", package)
    before = repository.newest
    assert clipcap_there("push", run, "ann/changed", "--checkpoint=100")[0] == 0
    assert {*repository.commits[repository.newest]} == FILES  # scores of the other checkpoint are gone
    assert json.loads(repository.commits[repository.newest]["scores.json"]).keys() == {"both-test-100"}
    for name, step in (("ann/changed", 100), (f"ann/changed@{before}", 200)):
        params, _ = process.submit(load_captioner, name).result()
        assert_same(params, named(Captioner.load(run, step).params))
    assert clipcap_there("pull", "ann/changed", "old", "--revision", before)[0] == 0
    for arguments, message in (
        (("pull", "ann/changed", "--revision=none"), "the Hugging Face hub did not give it: "),
        (("pull", f"ann/changed@{before}", "--revision=main"), "names a revision, and so does --revision"),
    ):
        status, said = clipcap_there(*arguments)
        assert (status, message in said) == (2, True)
    message = "which has one checkpoint: name a ann/changed@REVISION"
    assert message in process.submit(load_captioner, "ann/changed", checkpoint=100).result()[1]
    file = run / "config.json"
    assert "A commit has happened since" in process.submit(push_after, "ann/changed", file, before).result()


def test_what_lies_here_goes_first(
    clipcap_there: Command, process: ProcessPoolExecutor, server: Hub, run: Path, source: Source, tmp_path: Path
) -> None:
    asked = len(server.asked)
    shutil.copytree(run, tmp_path / "ann" / "ours")
    assert clipcap_there("caption", "ann/ours", source.embeddings)[0] == 0
    assert "holds no checkpoints" in process.submit(load_captioner, Path("ann/ours")).result()[1]  # paths are of here
    assert len(server.asked) == asked


def test_pushes_that_are_refused(clipcap_there: Command, package: dict[str, bytes], server: Hub, run: Path) -> None:
    server.add("ann/public", package)
    theirs = server.add("bob/theirs", {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b""})
    server.add("bob/notes", {"README.md": b"mine"})
    server.add("bob/empty", {})
    before = {name: {*repository.commits} for name, repository in server.repositories.items()}
    for arguments, message in (
        (("bob/theirs",), "holds config.json, model.safetensors, which clipcap did not put there"),
        (("bob/notes",), "bob/notes is there already, and holds README.md, which clipcap did not put there"),
        (("ann/public", "--private"), "ann/public is there and public"),
        (("ann/new", "--checkpoint=7"), "there is no checkpoint '7'"),
        (("new",), "'new' is no name of a repository"),
        (("ann/new@main",), "'ann/new@main' is no name of a repository"),
        (("../new",), "'../new' is no name of a repository"),
        (("ann/a--b",), "'ann/a--b' is no name of a repository"),
        (("ann/public", "--license=free beer"), '"license" must be one of those there are'),
    ):
        status, said = clipcap_there("push", run, *arguments)
        assert (status, message in said) == (2, True), said
    status, said = clipcap_there("push", run, "ann/new", token="")
    assert (status, "there is no token of the Hugging Face hub: `hf auth login`" in said) == (2, True), said
    status, said = clipcap_there("push", run, "ann/new", token="hf_stale")
    assert (status, "does not let you write to ann/new" in said) == (2, True), said
    assert {name: {*repository.commits} for name, repository in server.repositories.items()} == before
    assert theirs.commits[theirs.newest].keys() == {".gitattributes", "config.json", "model.safetensors"}
    assert clipcap_there("push", run, "bob/empty")[0] == 0


def changed(content: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(content), **changes}).encode()


def weights(content: bytes, dtype: Any = np.float32, **others: np.ndarray) -> bytes:
    return save({**{name: array.astype(dtype) for name, array in load(content).items()}, **others})


FLOAT8 = json.dumps({"mapper/in/bias": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
BROKEN: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "another's": ("config.json", lambda content: b'{"model_type": "gpt2"}', "holds no captioner of clipcap_jax"),
    "no config": ("config.json", lambda content: None, "holds no captioner of clipcap_jax"),
    "no weights": ("model.safetensors", lambda content: None, "holds none of model.safetensors"),
    "no JSON": ("config.json", lambda content: b"{", "is not JSON"),
    "a list": ("config.json", lambda content: b"[]", "does not hold settings by name"),
    "newer": ("config.json", lambda content: changed(content, format_version=99), "the checkpoint has format 99"),
    "no settings": ("config.json", lambda content: changed(content, config=3), "cannot be read"),
    "older": ("config.json", lambda content: changed(content, config=3, format_version=1), "cannot be read"),
    "no width": ("config.json", lambda content: changed(content, embedding_width="5"), "cannot be read"),
    "width 0": ("config.json", lambda content: changed(content, embedding_width=0), "do not fit together"),
    "no end": (
        "config.json",
        lambda content: changed(content, tokenizer={"end_token": "</s>"}),
        "no end-of-text token",
    ),
    "no tokenizer": ("config.json", lambda content: changed(content, tokenizer=None), "cannot be read"),
    "other tokenizer": ("tokenizer.json", lambda content: b'{"model": 1}', "cannot be read"),
    "bytes": ("tokenizer.json", lambda content: b"\xff", "cannot be read"),
    "cut": ("model.safetensors", lambda content: content[:-1], "is not a whole safetensors file"),
    "half": (
        "model.safetensors",
        lambda content: weights(content, np.float16),
        "weights of another model: gpt2/final_norm/bias: float16",
    ),
    "types that NumPy has not": (
        "model.safetensors",
        lambda content: struct.pack("<Q", len(FLOAT8)) + FLOAT8 + b"ab",
        "is not a whole safetensors file",
    ),
    "wider": (
        "config.json",
        lambda content: changed(content, embedding_width=6),
        "holds weights of another model: mapper/in/kernel: (5, ",
    ),
    "more": (
        "model.safetensors",
        lambda content: weights(content, **{"mapper/in": np.zeros(1, np.float32)}),
        "weights of another model: mapper/in: (1,), where the config makes none",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_captioner(kind: str, process: ProcessPoolExecutor, package: dict[str, bytes], server: Hub) -> None:
    file, change, message = BROKEN[kind]
    content = change(package[file])
    files = {name: stored for name, stored in package.items() if name != file}
    name = f"eve/{kind.replace(' ', '-').replace(chr(39), '')}"
    server.add(name, files if content is None else {**files, file: content})
    assert message in process.submit(load_captioner, name).result()[1]


def test_what_is_not_there(clipcap_there: Command) -> None:
    for name, message in (
        ("ann/nothing", "the Hugging Face hub has no such repository, or it is private"),
        ("nothing", "'nothing' is no name of a repository"),
        ("ann/..", "'ann/..' is no name of a repository"),
    ):
        status, said = clipcap_there("pull", name)
        assert (status, message in said) == (2, True), said
