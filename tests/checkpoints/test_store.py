import dataclasses
import hashlib
import itertools
import json
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from tiny import assert_same, in_process, make_config, named, train

from clipcap_jax import progress
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.checkpoints import store
from clipcap_jax.checkpoints.metadata import FORMAT_VERSION, Metadata
from clipcap_jax.checkpoints.store import Checkpoints, differences
from clipcap_jax.config import Config
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer
from clipcap_jax.training import optim

ROOT = Path(__file__).parents[2]
V1 = Path(__file__).parents[1] / "data" / "checkpoint_v1"


@pytest.fixture(scope="module")
def metadata(data_dir: Path) -> Metadata:
    return Metadata(make_config(data_dir), Tokenizer.train(["a dog", "ein Hündchen"], 270), "an encoder", 5)


def arrays(step: int) -> dict[str, Any]:
    return {"mapper": {"kernel": np.full((2, 3), step, np.float32)}, "gpt2": {"bias": np.arange(4.0) * step}}


def save(
    run: Path,
    metadata: Metadata,
    cider: dict[int, float | None],
    keep: int = 1,
    params: Callable[[int], Any] = arrays,
) -> None:
    """Save the steps that `cider` gives scores of; None: not validated."""
    checkpoints = Checkpoints(run, keep=keep)
    for step, value in cider.items():
        checkpoints.save(
            step,
            params=params(step),
            unaveraged=None,
            optimizer={"mu": np.array([step], np.float32)},
            position={"step": step, "total": 9},
            metadata=metadata,
            metrics={} if value is None else {"CIDEr": value, "loss": 1.0},
        )
    checkpoints.close()


def test_what_is_saved_comes_back(tmp_path: Path, metadata: Metadata) -> None:
    save(tmp_path, metadata, {7: 0.5, 9: 0.6}, keep=2)
    with store.opened(tmp_path) as checkpoints:
        assert_same(named(checkpoints.params(7)), named(arrays(7)))
        back = checkpoints.metadata(9)
        assert (back.config, back.encoder, back.embedding_width) == (metadata.config, "an encoder", 5)
        assert back.tokenizer.to_dict() == metadata.tokenizer.to_dict()
        restored = checkpoints.restore(9, arrays(0), {"mu": np.zeros(1, np.float32)}, averages=False)
        assert_same(named(restored.params), named(arrays(9)))
        assert restored.average is None
        assert restored.optimizer["mu"] == 9
        assert restored.position == {"step": 9, "total": 9}
        assert [checkpoints.is_last(step) for step in (7, 9)] == [False, True]


@pytest.mark.parametrize(
    ("cider", "keep", "kept", "best"),
    [
        ({1: 0.5, 2: 0.9, 3: None, 4: 0.3, 5: None}, 1, [2, 5], 2),
        ({1: 0.5, 2: 0.9, 3: None, 4: 0.3, 5: None}, 2, [2, 4, 5], 2),
        ({1: 0.5, 2: 0.9, 3: 1.2}, 1, [3], 3),
        ({1: None, 2: None, 3: None}, 2, [2, 3], 3),  # never validated: the newest
        ({1: 0.0, 2: None}, 1, [1, 2], 1),
        ({1: 0.5, 2: 0.5, 3: 0.4}, 1, [2, 3], 2),
        ({1: 0.5, 2: 0.5, 3: 0.4}, 3, [1, 2, 3], 2),
    ],
)
def test_the_newest_and_the_best_are_kept(
    tmp_path: Path, metadata: Metadata, cider: dict[int, float | None], keep: int, kept: list[int], best: int
) -> None:
    save(tmp_path, metadata, cider, keep)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == kept
    with store.opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == kept
        assert checkpoints.find("latest") == kept[-1]
        assert checkpoints.find("best") == best
        assert checkpoints.find(str(kept[0])) == kept[0]
        for which in ("77", "newest", "", "-1"):
            names = ", ".join(map(str, kept))
            with pytest.raises(UserError, match=rf"there is no checkpoint '{which}' in .*: there are {names}"):
                checkpoints.find(which)


def test_a_reader_sees_what_is_saved_beside_it(tmp_path: Path, metadata: Metadata) -> None:
    save(tmp_path, metadata, {1: 0.5})
    with store.opened(tmp_path) as checkpoints:
        save(tmp_path, metadata, {2: 0.7, 3: 0.6})
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.find("best") == 2


def test_a_folder_that_is_no_run(tmp_path: Path, metadata: Metadata) -> None:
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=rf"{folder} holds no checkpoints: give the folder of a run"):
            Captioner.load(folder)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no finished checkpoint yet"):
        Captioner.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/checkpoints cannot be used: "):
        Checkpoints(tmp_path / "file", keep=1)


def test_what_orbax_writes_is_json(tmp_path: Path, metadata: Metadata) -> None:
    """Without the NaN of a loss of a validation."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(
        1,
        params=arrays(1),
        unaveraged=None,
        optimizer={"mu": np.zeros(1, np.float32)},
        position={"step": 1, "total": 9},
        metadata=metadata,
        metrics={"CIDEr": 0.5, "loss": float("nan")},
    )
    checkpoints.close()
    stored = json.loads((tmp_path / "checkpoints/1/metrics/metrics").read_text(), parse_constant=pytest.fail)
    assert stored == {"CIDEr": 0.5}


@pytest.mark.parametrize("name", ["lr[lr=1e-4]", "why?", "a*"])
def test_a_folder_that_orbax_takes_for_a_pattern(tmp_path: Path, metadata: Metadata, name: str) -> None:
    """There it would save parts that nothing puts together; what was copied there can be read."""
    with pytest.raises(UserError, match=r"Orbax cannot save .* Give another folder"):
        Checkpoints(tmp_path / name / "run", keep=1)
    save(tmp_path / "run", metadata, {1: 0.5})
    shutil.copytree(tmp_path / "run", tmp_path / name)
    with store.opened(tmp_path / name) as checkpoints:
        assert checkpoints.params(1).keys() == arrays(1).keys()


def test_a_folder_that_is_no_utf8(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this name is no UTF-8"):
        store.run_folder(tmp_path / "ph\udcff")


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_format(tmp_path: Path, metadata: Metadata) -> None:
    save(tmp_path, metadata, {1: 0.5})
    file = tmp_path / "checkpoints" / "1" / "metadata" / "metadata"
    change_json(file, format_version=FORMAT_VERSION + 1)
    told = f"has format {FORMAT_VERSION + 1}, and this clipcap_jax reads format {FORMAT_VERSION}: install the version"
    with pytest.raises(UserError, match=told):
        Captioner.load(tmp_path)
    file.write_text("{}")
    with pytest.raises(UserError, match="has format of another program"):
        Captioner.load(tmp_path)


@pytest.mark.parametrize("damage", ["delete", "truncate", "garble"])
@pytest.mark.parametrize(
    "files",
    [
        "metadata/metadata",
        "metadata",
        "position/metadata",
        "position",
        "params",
        "params/_METADATA",
        "params/manifest.ocdbt",
        "params/**/d/*",
        "metrics/metrics",
    ],
)
def test_damaged_files(tmp_path: Path, metadata: Metadata, files: str, damage: str) -> None:
    # One array: of several, Orbax forgets the others when it cannot read the first, and their threads complain later.
    save(tmp_path, metadata, {1: 0.5}, params=lambda _: {"kernel": np.zeros((20, 30), np.float32)})
    for path in (tmp_path / "checkpoints" / "1").glob(files):
        if path.is_dir():
            shutil.rmtree(path)
        elif damage == "delete":
            path.unlink()
        else:
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2] if damage == "truncate" else bytes(255 - x for x in content))

    def read() -> None:
        with store.opened(tmp_path) as checkpoints:
            step = checkpoints.find("latest")
            checkpoints.metadata(step)
            checkpoints.is_last(step)
            checkpoints.params(step)

    if (files, damage) == ("metrics/metrics", "delete"):  # as of one that was not validated
        read()
    else:
        with pytest.raises(UserError, match=rf"{tmp_path}/checkpoints(/1 is gone or not whole| cannot be read)"):
            read()


def test_plain_orbax_restores_it_as_the_docs_say(tmp_path: Path, metadata: Metadata) -> None:
    save(tmp_path, metadata, {7: 0.5, 8: 0.6})
    page = (ROOT / "docs" / "training.md").read_text()
    (snippet,) = re.findall(r"```python\n(import orbax.*?)```", page, re.DOTALL)
    path = "/path/to/runs/shapes/checkpoints"
    assert path in snippet
    script = snippet.replace(path, str(tmp_path / "checkpoints")) + (
        "import json, sys\n"
        "assert 'clipcap_jax' not in sys.modules\n"
        "params = {part: {name: array.tolist() for name, array in parts.items()} "
        "for part, parts in restored['params'].items()}\n"
        "print(json.dumps([step, params, restored['metadata']]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    expected = {part: {name: array.tolist() for name, array in parts.items()} for part, parts in arrays(8).items()}
    assert json.loads(done.stdout) == [8, expected, json.loads(json.dumps(metadata.to_dict()))]


def test_what_saving_waits_for_is_told(
    tmp_path: Path, metadata: Metadata, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "a", metadata, {3: None})
    assert capsys.readouterr() == ("", "")  # it took no two seconds
    monkeypatch.setattr(progress, "_PATIENCE", 0.0)
    save(tmp_path / "b", metadata, {3: None})
    printed = capsys.readouterr()
    assert "Saving the checkpoint of step 3: 0 s\n" in printed.err
    assert printed.out == ""


def test_no_room_is_noticed_before_anything_is_written(
    tmp_path: Path, metadata: Metadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 2 * 3 * 4 + 4 * 8 + 4  # what arrays() and the optimiser hold
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    message = (
        rf"the checkpoint of step 2 to {tmp_path}/checkpoints failed: it takes {size} bytes, and {size - 1} are free\. "
        r"There is no whole checkpoint yet\. Mend that, for instance make room, then the same command goes on\."
    )
    with pytest.raises(UserError, match=message):
        save(tmp_path, metadata, {2: 0.5})
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    save(tmp_path, metadata, {2: 0.5})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=0, free=0))  # it does not tell
    save(tmp_path, metadata, {3: 0.5})


def train_without_room(run: Path, config: Config, step: int) -> str:
    """Train, and while saving a step be unable to write files of more than 10 kB; returns the error."""
    save = Checkpoints.save

    def save_in_vain(self: Checkpoints, saved: int, **items: Any) -> None:
        if saved == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        save(self, saved, **items)

    with mock.patch.object(Checkpoints, "save", save_in_vain), pytest.raises(UserError) as error:
        train(run, config)
    return str(error.value)


def test_a_full_disk(data_dir: Path, tmp_path: Path) -> None:
    told = in_process(train_without_room, tmp_path, make_config(data_dir), 6)
    folder = tmp_path / "checkpoints"
    assert told.startswith(f"saving the checkpoint of step 6 to {folder} failed: ")
    assert "The newest whole checkpoint is 4. Mend that, for instance make room, then the same command goes on." in told
    assert any(path.name.startswith("6.") for path in folder.iterdir())  # it had begun
    with store.opened(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4]
    printed = train(tmp_path, make_config(data_dir))
    assert "Going on after step 4 of 15" in printed
    assert "Trained 15 steps" in printed
    assert {path.name for path in folder.iterdir()} == {"4", "6", "8", "12", "15"}


def test_differences_name_what_differs() -> None:
    expected = {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "b": np.zeros(1)}
    assert differences(expected, expected) == []
    assert differences(expected, {"a": {"kernel": np.zeros((2, 4)), "bias": np.zeros(3)}, "c": np.zeros(5)}) == [
        "a.kernel: (2, 4), where the config makes (2, 3)",
        "b: not there, where the config makes (1,)",
        "c: (5,), where the config makes none",
    ]


def checksums(params: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the float32 arrays, by name."""
    arrays = {name: np.asarray(array, "<f4") for name, array in params.items()}
    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}


def test_format_1_is_still_read() -> None:
    """See tests/data/checkpoint_v1/SOURCES.md. Never write this checkpoint anew: users have such ones."""
    expected = json.loads((V1 / "expected.json").read_text())
    captioner = Captioner.load(V1 / "run")
    assert captioner.step == 400
    assert captioner.metadata.encoder == "mean colour"
    assert captioner.metadata.embedding_width == 5
    stored = json.loads(json.dumps(dataclasses.asdict(captioner.metadata.config)))
    # What has come since, with what was the only way then.
    assert stored["model"]["mapper"].pop("dropout") == 0.0
    assert stored["train"].pop("pretrained") == {"clip": "", "gpt2": ""}
    assert stored["train"].pop("targets") == "all"
    assert stored["evaluate"]["decode"].pop("stop") == ""
    assert stored["optimizer"].pop("average_decay") == 0.0
    assert stored["model"]["gpt2"].pop("word_dropout") == 0.0
    train = stored["train"]
    assert (train.pop("accumulation"), train.pop("remat"), train.pop("gradient_dtype")) == (1, False, "float32")
    assert stored.pop("parallel") == {"layout": "data"}
    assert stored["evaluate"].pop("words") == "ptb"
    assert stored == expected["config"]
    assert captioner.metadata.tokenizer.encode(list(expected["tokens"])) == list(expected["tokens"].values())
    assert checksums(named(jax.device_get(captioner.params))) == expected["sha256"]
    captions = list(captioner.caption(np.load(V1 / "embeddings.npy")))
    assert [caption.text for caption in captions] == expected["captions"]
    np.testing.assert_allclose([caption.score for caption in captions], expected["scores"], rtol=1e-4)


def test_training_goes_on_from_format_1() -> None:
    expected = json.loads((V1 / "expected.json").read_text())
    with store.opened(V1 / "run") as checkpoints:
        config, params = checkpoints.metadata(400).config, checkpoints.params(400)
        fresh = optim.optimizer(config.optimizer, 400).init(params)
        restored = checkpoints.restore(400, params, fresh, averages=False)
    optimizer = restored.optimizer
    assert checksums(named(restored.params)) == expected["sha256"]
    assert named(optimizer).keys() == named(fresh).keys()
    assert {int(count) for name, count in named(optimizer).items() if name.endswith("count")} == {400}
    norm = np.sqrt(sum(np.square(array).sum() for name, array in named(optimizer).items() if ".nu." in name))
    assert norm == pytest.approx(expected["norm of nu"], rel=1e-5)
    assert restored.position == expected["position"]


def test_a_reader_does_not_mind_that_checkpoints_go(metadata: Metadata, tmp_path: Path) -> None:
    save(tmp_path, metadata, {1: 0.1})
    folder, stop = tmp_path / "checkpoints", threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            shutil.copytree(folder / "1", tmp_path / "copy")
            (tmp_path / "copy").rename(folder / "2")
            shutil.rmtree(folder / "2")

    seen: set[int] = set()
    with ThreadPoolExecutor() as pool:
        writing = pool.submit(come_and_go)
        try:
            # Often; and until one that came was seen before it went, which a busy machine may let wait.
            end = time.monotonic() + 120
            for looks in itertools.count():
                if looks >= 30 and (seen == {1, 2} or time.monotonic() > end):
                    break
                with store.opened(tmp_path) as reader:
                    for steps in (reader.steps() for _ in range(10)):
                        assert 1 in steps
                        seen |= {*steps}
        finally:
            stop.set()
        writing.result()
    assert seen == {1, 2}
