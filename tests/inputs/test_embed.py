import dataclasses
import io
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from original import load_clip
from PIL import Image
from safetensors.numpy import save_file
from sources import listed
from tiny import SPLITS, Clipcap, Source, make_config, train

from clipcap_jax import files, parallel
from clipcap_jax import pictures as pictures_module
from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.datasets import RecordsSource, open_split, prepare, prepare_records, prepare_shapes, shards
from clipcap_jax.datasets.schema import Example
from clipcap_jax.datasets.shards import Writer
from clipcap_jax.errors import UserError
from clipcap_jax.evaluation.evaluate import open_data
from clipcap_jax.inputs import embed as embed_module
from clipcap_jax.inputs.embed import Encoder, _Embedder, embed, encoder_name
from clipcap_jax.models.clip_vit import normalize_pixels
from clipcap_jax.models.clipcap import tower

PICTURES = sum(SPLITS.values())
TOWER = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 2, "heads": 2, "embedding_width": 24}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    config, params, _ = load_clip("vit")
    return Encoder(config, params)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tower as a file."""
    _, _, arrays = load_clip("vit")
    path = tmp_path_factory.mktemp("weights") / "tower.safetensors"
    save_file(
        {
            name.removeprefix("state/"): np.ascontiguousarray(array)
            for name, array in arrays.items()
            if name.startswith("state/")
        },
        path,
    )
    return path


@pytest.fixture
def pictures(source: Source, tmp_path: Path) -> Path:
    """A data folder with "records/pictures"."""
    prepare_records(RecordsSource("pictures", str(source.captions), images=str(source.pictures)), str(tmp_path))
    return tmp_path


def read(data_dir: Path, name: str = "embeddings/mine") -> dict[str, list[Example]]:
    return {split: list(open_split(name, split, str(data_dir))) for split in SPLITS}


def without_embedding(example: Example) -> Example:
    return dataclasses.replace(example, embedding=None)


def test_every_picture_is_embedded_once(encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessed = []
    preprocess = pictures_module.preprocess

    def counted(image: Any, size: int) -> np.ndarray:
        preprocessed.append(size)
        return preprocess(image, size)

    monkeypatch.setattr(pictures_module, "preprocess", counted)
    summary = embed(encoder, "records/pictures", "mine", str(pictures), batch_size=8, workers=2)
    assert summary is not None
    assert summary.images == SPLITS
    assert preprocessed == [32] * PICTURES
    model = tower(encoder.config, jax.numpy.dtype("float32"))
    apply = jax.jit(lambda pixels: model.apply({"params": encoder.params}, normalize_pixels(pixels)))
    for split, found in read(pictures).items():
        before = list(open_split("records/pictures", split, str(pictures)))
        for example, old in zip(found, before, strict=True):
            assert old.image is not None
            assert example.embedding is not None
            assert without_embedding(example) == dataclasses.replace(old, image=None)
            expected = apply(preprocess(pictures_module.decode(old.image), 32)[None])[0]
            np.testing.assert_allclose(example.embedding, expected, rtol=1e-3, atol=1e-3)  # float16
    stored = open_split("embeddings/mine", "val", str(pictures))
    assert (stored.encoder, stored.embedding_width, stored.has_images) == (encoder.name, 24, False)


def test_a_batch_begins_before_the_one_ahead_of_it_is_waited_for(
    encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_rows, events = parallel.begin_rows, []

    def watched(function: Any, **options: Any) -> Any:
        begin, numbers = begin_rows(function, **options), itertools.count()

        def begin_and_tell(*arguments: Any) -> Any:
            number, wait = next(numbers), begin(*arguments)
            events.append(f"begins {number}")

            def wait_and_tell() -> Any:
                events.append(f"is waited for {number}")
                return wait()

            return wait_and_tell

        return begin_and_tell

    monkeypatch.setattr(parallel, "begin_rows", watched)
    prepare.prepare(listed("few", "train", list(open_split("records/pictures", "train", str(pictures)))), str(pictures))
    embed(encoder, "few", "mine", str(pictures), batch_size=8)
    assert events == ["begins 0", "begins 1", "is waited for 0", "begins 2", "is waited for 1", "is waited for 2"]


def test_the_name_tells_weights_apart(encoder: Encoder) -> None:
    other = jax.tree.map(np.array, encoder.params)
    assert encoder_name(encoder.config, other) == encoder.name
    other["projection"]["kernel"][0, 0] += 1e-6
    assert encoder_name(encoder.config, other) != encoder.name
    heads = dataclasses.replace(encoder.config, heads=4)  # no parameter shows them
    assert encoder_name(heads, encoder.params) != encoder.name


def test_it_goes_on_where_it_stopped(encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed(encoder, "records/pictures", "whole", str(pictures), batch_size=4)
    monkeypatch.setattr(embed_module, "EMBEDDINGS_PER_SHARD", 5)
    write, limit = Writer.write, 2
    written: list[int] = []

    def limited(self: Writer, index: int, examples: Any = None) -> Any:
        if len(written) == limit:
            raise KeyboardInterrupt
        written.append(index)
        return write(self, index, examples)

    monkeypatch.setattr(Writer, "write", limited)
    with pytest.raises(KeyboardInterrupt):
        embed(encoder, "records/pictures", "mine", str(pictures), batch_size=4)
    with pytest.raises(UserError, match="not prepared"):
        read(pictures)
    limit = PICTURES
    embed(encoder, "records/pictures", "mine", str(pictures), batch_size=4)
    assert sorted(written) == list(range(4 + 1 + 2))  # none of them twice
    for split, expected in read(pictures, "embeddings/whole").items():
        for example, one in zip(read(pictures)[split], expected, strict=True):
            assert without_embedding(example) == without_embedding(one)
            np.testing.assert_array_equal(example.embedding, one.embedding)


def test_each_host_does_its_share(encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_module, "EMBEDDINGS_PER_SHARD", 5)
    embed(encoder, "records/pictures", "whole", str(pictures))
    assert embed(encoder, "records/pictures", "mine", str(pictures), share=(1, 2)) is None
    with pytest.raises(UserError, match="not prepared"):
        read(pictures)
    summary = embed(encoder, "records/pictures", "mine", str(pictures), share=(0, 2))
    assert summary is not None
    assert summary.images == SPLITS
    for split, expected in read(pictures, "embeddings/whole").items():
        for example, one in zip(read(pictures)[split], expected, strict=True):
            np.testing.assert_array_equal(example.embedding, one.embedding)
    again = embed(encoder, "records/pictures", "mine", str(pictures), share=(1, 2))
    assert again is not None
    assert again.already_prepared


def test_hosts_that_do_not_agree(encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_module, "EMBEDDINGS_PER_SHARD", 5)
    embed(encoder, "records/pictures", "mine", str(pictures), share=(0, 2))
    other = dataclasses.replace(encoder, dtype="bfloat16")
    with pytest.raises(UserError, match=r"was begun, but not finished, from something else: dtype was float32"):
        embed(other, "records/pictures", "mine", str(pictures), share=(1, 2))
    assert embed(encoder, "records/pictures", "mine", str(pictures), share=(1, 2)) is not None


def test_a_disk_that_fills(encoder: Encoder, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_module, "EMBEDDINGS_PER_SHARD", 5)
    to_disk, written = shards._to_disk, []

    def fill(path: Path) -> None:
        written.append(path)
        if len(written) == 4:
            raise OSError(28, "No space left on device")
        to_disk(path)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_to_disk", fill)
        with pytest.raises(UserError, match=r"embeddings/mine could not be written to .*: .*No space left on device"):
            embed(encoder, "records/pictures", "mine", str(pictures))
    with pytest.raises(UserError, match="not prepared"):
        read(pictures)
    assert not list((pictures / "embeddings" / "mine").glob("*/*.tmp"))
    summary = embed(encoder, "records/pictures", "mine", str(pictures))
    assert summary is not None
    assert summary.images == SPLITS


def test_two_at_once(encoder: Encoder, pictures: Path) -> None:
    folder = pictures / "embeddings" / "mine"
    folder.mkdir(parents=True)
    with (
        files.locked(folder / "1.0.0share0of1.lock"),
        pytest.raises(UserError, match=r"embeddings/mine is being prepared in .* by another process"),
    ):
        embed(encoder, "records/pictures", "mine", str(pictures))


def test_what_the_command_says_to_train_with(
    weights: Path, pictures: Path, source: Source, clipcap: Clipcap, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tower of any sizes, with which the run then captions pictures."""
    arguments = ("records/pictures", "--clip", weights, "--data-dir", pictures, "--batch-size", 8, "--workers", 1)
    assert clipcap("embed", *arguments) == 0
    printed = capsys.readouterr().out
    assert f"embeddings/records_pictures is prepared: {pictures}" in printed
    line = printed[printed.index("To train on it: ") :].splitlines()[0]
    flags = [word.removeprefix("--config.").partition("=") for word in shlex.split(line)[4:]]
    settings = {name: value for name, _, value in flags}
    assert settings["data.name"] == "embeddings/records_pictures"
    train(pictures / "run", make_config(pictures, settings))
    assert losses(pictures / "run")
    assert Captioner.load(pictures / "run", "latest").caption(next(source.pictures.glob("*.png"))).score < 0


def prepare_anew(source: Source, data_dir: Path, captions: str) -> None:
    shutil.rmtree(data_dir / "records" / "pictures")
    changed = data_dir / "changed.jsonl"
    changed.write_text(captions)
    prepare_records(RecordsSource("pictures", str(changed), images=str(source.pictures)), str(data_dir))


def test_embeddings_belong_to_pictures(
    encoder: Encoder, pictures: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrected caption asks for none, a new picture for its own alone; the result is as if made anew."""
    embed(encoder, "records/pictures", "mine", str(pictures))
    seen: list[Any] = []
    preprocess = pictures_module.preprocess

    def counted(image: Any, size: int) -> np.ndarray:
        seen.append(image)
        return preprocess(image, size)

    monkeypatch.setattr(pictures_module, "preprocess", counted)
    lines = [json.loads(line) for line in source.captions.read_text().splitlines()]
    key = "captions" if "captions" in lines[0] else "caption"
    lines[0] |= {key: ["corrected."] if key == "captions" else "corrected."}
    prepare_anew(source, pictures, "\n".join(map(json.dumps, lines)))
    before = {example.image_id: example.embedding for split in read(pictures).values() for example in split}
    summary = embed(encoder, "records/pictures", "mine", str(pictures))
    assert summary is not None
    assert not summary.already_prepared
    assert seen == []
    after = [example for split in read(pictures).values() for example in split]
    assert any("corrected." in example.captions for example in after)
    for example in after:
        np.testing.assert_array_equal(example.embedding, before[example.image_id])
    again = embed(encoder, "records/pictures", "mine", str(pictures))
    assert again is not None
    assert again.already_prepared

    new = pictures / "new"
    shutil.copytree(source.pictures, new)
    first, second = sorted(new.iterdir())[:2]
    first.write_bytes((source.pictures / second.name).read_bytes())
    second.write_bytes((source.pictures / first.name).read_bytes())
    third = sorted(new.iterdir())[2]
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(buffer, "PNG")
    third.write_bytes(buffer.getvalue())
    shutil.rmtree(pictures / "records" / "pictures")
    prepare_records(RecordsSource("pictures", str(source.captions), images=str(new)), str(pictures))
    embed(encoder, "records/pictures", "mine", str(pictures))
    assert len(seen) == 1  # the exchanged ones are known, under each other's names
    embed(encoder, "records/pictures", "whole", str(pictures))
    for kept, made in zip(read(pictures).values(), read(pictures, "embeddings/whole").values(), strict=True):
        for one, other in zip(kept, made, strict=True):
            assert without_embedding(one) == without_embedding(other)
            assert one.embedding is not None
            assert other.embedding is not None
            np.testing.assert_allclose(one.embedding, other.embedding, rtol=2e-3)  # other batches: the last bit


def test_no_other_embeddings_are_begun_while_a_share_is_at_work(encoder: Encoder, pictures: Path) -> None:
    other = dataclasses.replace(encoder, params=jax.tree.map(lambda leaf: leaf * 1.5, encoder.params))
    load = _Embedder._load

    def rival(self: Any, *arguments: Any) -> Any:
        if self.encoder is encoder:
            with pytest.raises(UserError, match="was begun, but not finished, from something else: encoder was"):
                embed(other, "records/pictures", "mine", str(pictures))
        return load(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Embedder, "_load", rival)
        embed(encoder, "records/pictures", "mine", str(pictures), share=(0, 2), workers=1)
    assert embed(encoder, "records/pictures", "mine", str(pictures), share=(1, 2)) is not None


def test_prepared_anew_after_it_stopped(encoder: Encoder, pictures: Path, source: Source) -> None:
    """What was begun from the old data set is begun anew."""
    finish = prepare.finish

    def stopped(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            embed(encoder, "records/pictures", "mine", str(pictures))
    assert prepare.finish is finish
    prepare_anew(source, pictures, re.sub(r"\.\"", ' again."', source.captions.read_text()))
    embed(encoder, "records/pictures", "mine", str(pictures))
    read_captions = [e.captions for split in read(pictures).values() for e in split]
    assert read_captions == [e.captions for split in read(pictures, "records/pictures").values() for e in split]


def test_prepared_anew_while_it_is_embedded(
    encoder: Encoder, pictures: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = _Embedder._load
    done: list[bool] = []

    def replaced(self: Any, *arguments: Any) -> Any:
        if not done:
            done.append(True)
            prepare_anew(source, pictures, re.sub(r"\.\"", ' again."', source.captions.read_text()))
        return load(self, *arguments)

    monkeypatch.setattr(_Embedder, "_load", replaced)
    with pytest.raises(UserError, match=r"records/pictures/1.0.0 was deleted or prepared anew"):
        embed(encoder, "records/pictures", "mine", str(pictures), workers=1)


def test_what_cannot_be_embedded(encoder: Encoder, pictures: Path, source: Source) -> None:
    given = RecordsSource("numbers", str(source.captions), embeddings=str(source.embeddings))
    prepare_records(given, str(pictures))
    with pytest.raises(UserError, match="records/numbers holds no pictures"):
        embed(encoder, "records/numbers", "mine", str(pictures))
    broken = dataclasses.replace(encoder, params=jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), encoder.params))
    with pytest.raises(UserError, match=r"the embedding of .* is not finite"):
        embed(broken, "records/pictures", "mine", str(pictures))
    shutil.rmtree(pictures / "embeddings")
    embed(encoder, "records/pictures", "mine", str(pictures))
    with pytest.raises(UserError, match=r"from something else: encoder was CLIP, weights .*, is now CLIP, weights"):
        embed(broken, "records/pictures", "mine", str(pictures))


def test_a_picture_that_cannot_be_decoded(encoder: Encoder, pictures: Path) -> None:
    """Our own preparation lets none in; others' may."""
    good = open_split("records/pictures", "train", str(pictures))[0]

    bad = dataclasses.replace(good, image_id="bad", image=b"\xff\xd8\xff")
    prepare.prepare(listed("foreign", "train", [good, bad]), str(pictures))
    with pytest.raises(UserError, match=r"1 problems in 2 records.*\(image broken 1\)"):
        embed(encoder, "foreign", "mine", str(pictures))
    summary = embed(encoder, "foreign", "mine", str(pictures), max_skipped=0.5)
    assert summary is not None
    assert (summary.images, summary.skipped) == ({"train": 1}, {"image broken": 1})


def losses(run: Path) -> dict[int, float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_training_on_embeddings_equals_training_on_pictures(
    encoder: Encoder, weights: Path, pictures: Path, source: Source
) -> None:
    """With the tower frozen. And either run captions photos, as both have it."""
    embed(encoder, "records/pictures", "mine", str(pictures))
    changes: dict[str, Any] = {f"model.clip.{name}": value for name, value in TOWER.items()}
    changes |= {
        "data.name": "records/pictures",
        "model.gpt2.dropout": 0.0,
        "model.gpt2.word_dropout": 0.0,
        "train.pretrained.clip": str(weights),
        "train.trainable": ("mapper", "gpt2"),
        "evaluate.images": 0,
    }
    train(pictures / "from pixels", make_config(pictures, changes, "pixels"))
    changes |= {"data.name": "embeddings/mine", "data.input": "embedding"}
    settings = make_config(pictures, changes, "pixels")
    train(pictures / "from embeddings", settings)
    expected, found = losses(pictures / "from pixels"), losses(pictures / "from embeddings")
    assert len(expected) == 15
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-3)

    # A run that goes on does so with the same embeddings alone.
    shutil.rmtree(pictures / "embeddings" / "mine")
    other = dataclasses.replace(encoder, params=jax.tree.map(lambda leaf: 1.01 * leaf, encoder.params))
    embed(other, "records/pictures", "mine", str(pictures))
    with pytest.raises(UserError, match=r"embeddings/mine/train is not what it was: .* of other data"):
        train(pictures / "from embeddings", settings)
    shutil.rmtree(pictures / "embeddings" / "mine")
    embed(encoder, "records/pictures", "mine", str(pictures))
    assert "Going on after step 15 of 15" in train(pictures / "from embeddings", settings)

    captioner = Captioner.load(pictures / "from embeddings", "latest")
    assert captioner.image_size == 32
    paths = sorted(source.pictures.iterdir())
    from_files = captioner.caption(paths, batch_size=8)
    assert len({caption.text for caption in from_files}) > 1
    by_id = {example.image_id: example for examples in read(pictures).values() for example in examples}
    stored = np.stack([np.asarray(by_id[str(100 + i)].embedding) for i in range(len(paths))])
    from_embeddings = [caption.text for caption in captioner.caption(stored)]
    assert [caption.text for caption in from_files] == from_embeddings
    assert open_data(captioner, "records/pictures", "test", str(pictures)).inputs([0]).shape == (1, 32, 32, 3)
    assert open_data(captioner, "", "test", "").inputs([0]).shape == (1, 24)


def test_embeddings_of_another_tower(encoder: Encoder, weights: Path, pictures: Path) -> None:
    other = jax.tree.map(np.array, encoder.params)
    other["projection"]["kernel"][0, 0] += 1e-3
    embed(dataclasses.replace(encoder, params=other), "records/pictures", "mine", str(pictures))
    changes: dict[str, Any] = {f"model.clip.{name}": value for name, value in TOWER.items()}
    changes |= {"data.name": "embeddings/mine", "data.input": "embedding", "train.trainable": ("mapper",)}
    with pytest.raises(UserError, match=r"name the weights that made them in config.train.pretrained.clip"):
        make_config(pictures, changes, "pixels")
    changes |= {"train.pretrained.clip": str(weights)}
    with pytest.raises(UserError, match=r"holds embeddings from CLIP, weights \w+; the tower of the config is CLIP, w"):
        train(pictures / "run", make_config(pictures, changes, "pixels"))
    with pytest.raises(UserError, match=r"holds embeddings of width 24; config.model.clip makes them 8 wide"):
        train(pictures / "run2", make_config(pictures, changes | {"model.clip.embedding_width": 8}, "pixels"))


@pytest.mark.slow
def test_killed_at_any_moment(encoder: Encoder, weights: Path, tmp_path: Path) -> None:
    """20 kills: what comes out in the end is what an uninterrupted run gives, by the embedding of each id."""
    data_dir = tmp_path / "data"
    prepare_shapes(str(data_dir), {"train": 400, "val": 30})
    script = tmp_path / "script.py"
    script.write_text(f"""
from clipcap_jax.inputs import embed
from clipcap_jax.convert.clip import load_clip
embed.EMBEDDINGS_PER_SHARD = 40
print("begins", flush=True)
embed.embed(embed.Encoder(*load_clip({str(weights)!r})), "shapes", "killed", {str(data_dir)!r}, batch_size=8, workers=2)
""")
    environment = os.environ | {
        "PYTHONPATH": str(Path(embed_module.__file__).parents[2]),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
    }
    drawn, kills, finished = random.Random(0), 0, data_dir / "embeddings" / "killed" / "1.0.0"
    subprocess.run([sys.executable, script], env=environment, check=True)
    expected = {split: list(open_split("embeddings/killed", split, str(data_dir))) for split in ("train", "val")}
    shutil.rmtree(finished)
    while kills < 20:
        started = subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE)
        assert started.stdout is not None
        assert started.stdout.readline() == b"begins\n"
        time.sleep(drawn.uniform(0, 4))
        kills += started.poll() is None
        started.kill()
        started.communicate()
        assert len(list(finished.parent.glob("1.0.0.unfinished/*.tmp"))) <= 2
        if finished.exists() and kills < 20:
            shutil.rmtree(finished)
    if not finished.exists():
        subprocess.run([sys.executable, script], env=environment, check=True)
    for split, examples in expected.items():
        for example, one in zip(open_split("embeddings/killed", split, str(data_dir)), examples, strict=True):
            assert without_embedding(example) == without_embedding(one)
            np.testing.assert_array_equal(example.embedding, one.embedding)
