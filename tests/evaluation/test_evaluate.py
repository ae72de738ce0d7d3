import dataclasses
import io
import json
import re
import shutil
import threading
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from by_hand import mean_loss, tokenizer_with_a_word_at_0
from clip_files import write_clip
from tiny import ENCODER, SPLITS, Source, assert_ended

from clipcap_jax import pictures
from clipcap_jax.captioning.captioner import Caption, Captioner
from clipcap_jax.config import Targets
from clipcap_jax.datasets import RecordsSource, open_split, prepare_records, shapes
from clipcap_jax.errors import UserError
from clipcap_jax.evaluation import evaluate
from clipcap_jax.evaluation.clipscore import ClipScorer
from clipcap_jax.evaluation.evaluate import Evaluation
from clipcap_jax.inputs import batches
from clipcap_jax.inputs.batches import CaptionData
from clipcap_jax.inputs.embed import encoder_name
from clipcap_jax.metrics import References
from clipcap_jax.progress import screen


@pytest.fixture(scope="module")
def captioner(embeddings_run: Path) -> Captioner:
    return Captioner.load(embeddings_run)


@pytest.fixture(scope="module")
def data(captioner: Captioner) -> CaptionData:
    return evaluate.open_data(captioner, "", "test", "")


def caption_all(captioner: Captioner, data: CaptionData, batch_size: int = 4) -> list[Caption]:
    return evaluate.caption_all(captioner, data, batch_size=batch_size, console=screen(file=io.StringIO()))


def evaluate_all(captioner: Captioner, data: CaptionData, batch_size: int = 4) -> Evaluation:
    captions = caption_all(captioner, data, batch_size)
    return evaluate.evaluate(captioner, data, captions, batch_size=batch_size)


@pytest.fixture(scope="module")
def evaluated(captioner: Captioner, data: CaptionData) -> Evaluation:
    return evaluate_all(captioner, data)


def write(result: Evaluation, captioner: Captioner, folder: Path) -> str:
    console = screen(file=io.StringIO(), width=200)
    evaluate.write_captions(result.data, result.captions, folder)
    evaluate.write(result, captioner, folder, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_data_set_of_the_run_is_the_default(data: CaptionData) -> None:
    assert data.name == "records/both/test"
    assert len(data) == SPLITS["test"]


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_size_changes_nothing(
    captioner: Captioner, data: CaptionData, evaluated: Evaluation, batch_size: int
) -> None:
    other = evaluate_all(captioner, data, batch_size)
    assert [caption.text for caption in other.captions] == [caption.text for caption in evaluated.captions]
    assert other.scores.per_image == evaluated.scores.per_image
    np.testing.assert_allclose(other.loss, evaluated.loss, rtol=1e-5)
    np.testing.assert_allclose(other.loss_permuted, evaluated.loss_permuted, rtol=1e-5)


def test_files(captioner: Captioner, data: CaptionData, evaluated: Evaluation, tmp_path: Path) -> None:
    printed = write(evaluated, captioner, tmp_path / "new" / "[" / "x]:smile:")
    folder = tmp_path / "new" / "[" / "x]:smile:"  # no markup

    results = json.loads((folder / "captions.json").read_text())
    assert [result["image_id"] for result in results] == [int(image_id) for image_id in data.image_ids]
    assert [result["caption"] for result in results] == [caption.text for caption in evaluated.captions]

    report = json.loads((folder / "scores.json").read_text())
    references = References(dict(zip(data.image_ids, data.captions, strict=True)))
    expected = references.score({str(result["image_id"]): result["caption"] for result in results}).overall
    assert {name: report["scores"][name] for name in expected} == expected
    assert report["scores"]["loss"] == evaluated.loss
    assert report["not_computed"] == {"METEOR": "not asked for", "SPICE": "not asked for"}
    assert report["details"]["data set"] == "records/both/test"
    assert report["details"]["words"] == "ptb"
    assert report["health"]["captions"] == len(data)
    assert report["health"]["unfinished captions"] == 0
    assert f"| CIDEr | {expected['CIDEr']:.4f} |" in (folder / "scores.md").read_text()

    page = (folder / "page.html").read_text()
    for image_id, texts in zip(data.image_ids, data.captions, strict=True):
        assert page.count(f">{image_id}<") == 1
        assert all(text in page for text in texts)
    assert page.count("data:image/png") == len(data)

    for name, score in expected.items():
        assert re.search(rf"{name}\W+{score:.4f}", printed)
    assert "not asked for" in printed
    assert str(folder) in printed
    assert data.captions[0][0] in printed


@pytest.mark.parametrize("targets", ["all", "original"])
def test_losses_are_those_of_what_the_run_learnt(
    captioner: Captioner, data: CaptionData, evaluated: Evaluation, data_dir: Path, targets: Targets
) -> None:
    texts = [text for captions in data.captions for text in captions]
    tokenizer, metadata = tokenizer_with_a_word_at_0(texts, 320), captioner.metadata
    config = dataclasses.replace(metadata.config, train=dataclasses.replace(metadata.config.train, targets=targets))
    metadata = dataclasses.replace(metadata, config=config, tokenizer=tokenizer)
    other = Captioner(metadata, captioner.params, captioner.step)
    found = evaluate.evaluate(other, data, evaluated.captions, batch_size=4)
    split, params = open_split("records/both", "test", str(data_dir)), jax.device_get(captioner.params)
    assert found.loss == pytest.approx(mean_loss(config, params, tokenizer, split), rel=1e-5)
    permuted = {i: (i + len(data) // 2) % len(data) for i in range(len(data))}
    assert found.loss_permuted == pytest.approx(mean_loss(config, params, tokenizer, split, permuted), rel=1e-5)


def test_captions_that_did_not_finish_are_told(captioner: Captioner, data: CaptionData, tmp_path: Path) -> None:
    short = captioner.with_decode(dataclasses.replace(captioner.decode, max_tokens=2))
    write(evaluate_all(short, data), short, tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["health"]["unfinished captions"] == len(data)
    page = (tmp_path / "page.html").read_text()
    assert page.count(">not finished<") == len(data)
    assert f"{len(data)} of the captions reached the length limit" in page


def test_pictures_that_lie_on_disk_are_shown(
    captioner: Captioner, evaluated: Evaluation, source: Source, tmp_path: Path
) -> None:
    folder = shutil.copytree(source.pictures, tmp_path / "pictures")
    lying = RecordsSource("lying", str(source.captions), images=str(folder), embeddings=str(source.embeddings))
    prepare_records(dataclasses.replace(lying, encoder=ENCODER), str(tmp_path))
    data = evaluate.open_data(captioner, "records/lying", "test", str(tmp_path))
    assert data.image(0) is None
    exchanged, gone, *_ = map(Path, data.image_paths)
    exchanged.write_bytes(Path(data.image_paths[-1]).read_bytes())
    gone.unlink()
    write(dataclasses.replace(evaluated, data=data), captioner, tmp_path)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == len(data) - 2
    assert f"{exchanged} is another picture than it was" in page
    assert f"There is no picture at {gone}" in page


def test_the_right_scenes_of_shapes_are_counted(pixels_run: Path, tmp_path: Path) -> None:
    shapes.prepare_shapes(str(tmp_path), {"train": 3, "val": 3, "test": 6})
    captioner = Captioner.load(pixels_run)
    data = CaptionData(open_split("shapes", "test", str(tmp_path)), captioner.image_size)
    texts = [texts[0] for texts in data.captions]
    texts[2] = texts[2].replace(" and ", " and a black ring and ")  # one shape too many
    texts[4] = texts[3]  # the wrong picture's
    captions = [Caption(text, True, 0.0) for text in texts]
    scored = evaluate.evaluate(captioner, data, captions, batch_size=4)
    printed = write(scored, captioner, tmp_path / "results")
    assert json.loads((tmp_path / "results" / "scores.json").read_text())["scores"]["exact scenes"] == 4 / 6
    assert re.search(r"exact scenes\W+0.6667", printed)


def test_pictures_are_decoded_and_looked_at_once(pixels_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And give the losses and the captions that they would give anew each time."""
    monkeypatch.setattr(batches, "_CACHED_BYTES", 0)
    captioner = Captioner.load(pixels_run)
    pixels = evaluate.open_data(captioner, "", "test", "")
    threads, console = set(threading.enumerate()), screen(file=io.StringIO())
    with mock.patch.object(pictures, "decode", wraps=pictures.decode) as decode:
        seen = evaluate.embed_all(captioner, pixels, batch_size=4, console=console)
        once = evaluate_all(captioner, seen)
        assert decode.call_count == SPLITS["test"]
        anew = evaluate_all(captioner, pixels)
    assert decode.call_count > 5 * SPLITS["test"]
    assert_ended(threads)
    assert [caption.text for caption in once.captions] == [caption.text for caption in anew.captions]
    np.testing.assert_allclose([once.loss, once.loss_permuted], [anew.loss, anew.loss_permuted], rtol=1e-6)
    assert evaluate.embed_all(captioner, seen, batch_size=4, console=console) is seen


def test_embeddings_of_another_encoder(captioner: Captioner, source: Source, tmp_path: Path) -> None:
    other = RecordsSource("other", str(source.captions), embeddings=str(source.embeddings), encoder="ViT-B/32")
    prepare_records(other, str(tmp_path))
    with pytest.raises(
        UserError, match=r"from ViT-B/32, but the checkpoint was trained on\s+embeddings from mean colour"
    ):
        evaluate.open_data(captioner, "records/other", "test", str(tmp_path))


def test_clipscore_of_pictures_and_of_its_own_embeddings(
    captioner: Captioner, data: CaptionData, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = ClipScorer.load(str(write_clip(tmp_path)))
    captions = caption_all(captioner, data)
    found = evaluate.evaluate(captioner, data, captions, batch_size=4, clip=clip)
    texts = [caption.text for caption in captions]
    scored, _ = clip.score(data.image_ids, lambda i: data.image(i) or b"", texts, data.captions)
    np.testing.assert_allclose(found.scores.measures["CLIPScore"].per_image, scored)

    embeddings = np.random.default_rng(0).normal(size=(len(data), clip.vision.embedding_width)).astype(np.float16)
    monkeypatch.setattr(evaluate, "LossMeter", lambda *_: lambda *_, **__: 1.0)
    monkeypatch.setattr(data, "encoder", encoder_name(clip.vision, clip.vision_params))
    monkeypatch.setattr(data, "inputs", lambda rows: embeddings[rows])
    monkeypatch.setattr(data, "image", None)  # so it is not looked at
    found = evaluate.evaluate(captioner, data, captions, batch_size=4, clip=clip)
    scored, _ = clip.score(data.image_ids, embeddings, texts, data.captions)
    np.testing.assert_allclose(found.scores.measures["CLIPScore"].per_image, scored)


def test_clipscore_without_pictures(
    captioner: Captioner, data: CaptionData, evaluated: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "image", lambda index: None)
    monkeypatch.setattr(data, "image_paths", [""] * len(data))
    clip = ClipScorer.load(str(write_clip(tmp_path)))
    with pytest.raises(UserError, match=r"picture \w+: records/both/test neither holds it nor says where it lies"):
        evaluate.evaluate(captioner, data, evaluated.captions, batch_size=4, clip=clip)


def test_clipscore_of_exchanged_pictures(
    captioner: Captioner, data: CaptionData, evaluated: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the data set does not hold are read from where they lay when it was prepared."""
    paths = [tmp_path / f"{i}.png" for i in range(len(data))]
    for i, path in enumerate(paths):
        path.write_bytes(data.image(i) or b"")
    monkeypatch.setattr(data, "image", lambda index: None)
    monkeypatch.setattr(data, "image_paths", [*map(str, paths)])
    clip = ClipScorer.load(str(write_clip(tmp_path)))
    found = evaluate.evaluate(captioner, data, evaluated.captions, batch_size=4, clip=clip)
    assert np.isfinite(found.scores.measures["CLIPScore"].per_image).all()
    first, last = paths[0].read_bytes(), paths[-1].read_bytes()
    paths[0].write_bytes(last)
    paths[-1].write_bytes(first)
    with pytest.raises(UserError, match=r"0\.png is another picture than it was when the data set was prepared"):
        evaluate.evaluate(captioner, data, evaluated.captions, batch_size=4, clip=clip)


def test_a_split_without_references(captioner: Captioner, data: CaptionData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "captions", [*data.captions[:-1], ()])
    with pytest.raises(UserError, match="1 examples without references"):
        caption_all(captioner, data)
    with pytest.raises(UserError, match="1 examples without references"):
        evaluate.embed_all(captioner, data, batch_size=4, console=screen(file=io.StringIO()))
    monkeypatch.setattr(data, "captions", [()] * len(data))
    assert len(caption_all(captioner, data)) == len(data)


def test_ids_that_occur_twice(captioner: Captioner, data: CaptionData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "image_ids", [*data.image_ids[:-1], data.image_ids[0]])
    with pytest.raises(UserError, match="occur twice"):
        caption_all(captioner, data)


def test_a_folder_that_cannot_be_made(
    captioner: Captioner, data: CaptionData, evaluated: Evaluation, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*file/x: Not a directory"):
        write(evaluated, captioner, tmp_path / "file" / "x")


def test_no_such_split(captioner: Captioner) -> None:
    with pytest.raises(UserError, match="no split 'dev'"):
        evaluate.open_data(captioner, "", "dev", "")


def test_words(captioner: Captioner, data: CaptionData, tmp_path: Path) -> None:
    """Those of the captions are counted, and told, in a folder of their own."""
    captions = caption_all(captioner, data)
    found = evaluate.evaluate(captioner, data, captions, batch_size=4, words=list)
    texts = dict(zip(data.image_ids, (caption.text for caption in captions), strict=True))
    references = References(dict(zip(data.image_ids, data.captions, strict=True)), list)
    assert found.scores.overall == references.score(texts).overall
    write(found, captioner, tmp_path)
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["details"]["words"] == "list"
    letters = sum(map(len, "".join(texts.values()).split()))
    assert report["health"]["words per caption"] == pytest.approx(letters / len(texts))
    names = [evaluate.name_of(captioner, data, words) for words in ("ptb", "characters", "spaces")]
    assert len(set(names)) == 3
