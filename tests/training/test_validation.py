import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import mean_loss
from random_models import random_params
from tiny import IMAGE_SIZE, assert_ended, make_config, train_until

from clipcap_jax import pictures
from clipcap_jax.captioning.batches import BatchCaptioner
from clipcap_jax.captioning.decode import beam_search
from clipcap_jax.config import Config
from clipcap_jax.datasets import open_split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs import batches
from clipcap_jax.inputs.batches import CaptionData, Pairs, make_pairs
from clipcap_jax.metrics import References
from clipcap_jax.models.clipcap import ClipCap
from clipcap_jax.text.tokenizer import Tokenizer
from clipcap_jax.training.validation import LossMeter, Validation, Validator

MAX_TOKENS = 8


@pytest.fixture(scope="module")
def data(data_dir: Path) -> CaptionData:
    """The tiny validation split: 5 pictures with 10 captions."""
    return CaptionData(open_split("records/both", "val", str(data_dir)), None)


@pytest.fixture(scope="module")
def tokenizer(data: CaptionData) -> Tokenizer:
    return Tokenizer.train([text for texts in data.captions for text in texts], 280)


@pytest.fixture(scope="module")
def pairs(data: CaptionData, tokenizer: Tokenizer) -> Pairs:
    return make_pairs(data.captions, tokenizer, MAX_TOKENS)


@pytest.fixture(scope="module")
def model(data_dir: Path) -> ClipCap:
    return ClipCap(make_config(data_dir).model)


@pytest.fixture(scope="module")
def params(model: ClipCap, data: CaptionData) -> Any:
    """Random ones: unlike fresh ones, they make another caption of every picture."""
    return random_params(model, 0, data.inputs([0]), np.zeros((1, 1), np.int32))


def config(data_dir: Path, images: int, batch_size: int) -> Config:
    return make_config(data_dir, {"evaluate.images": images, "evaluate.batch_size": batch_size})


@pytest.fixture(scope="module")
def loss(data_dir: Path, params: Any, tokenizer: Tokenizer) -> Callable[[dict[int, int]], float]:
    """The mean loss of the captions of some pictures, each shown with a picture."""
    val = open_split("records/both", "val", str(data_dir))
    return functools.partial(mean_loss, make_config(data_dir), params, tokenizer, val)


@pytest.fixture(scope="module")
def captions(data_dir: Path, model: ClipCap, params: Any, data: CaptionData, tokenizer: Tokenizer) -> dict[int, str]:
    """What the model says of each picture; no two are the same."""
    decode = make_config(data_dir).evaluate.decode
    found = beam_search(model, params, jnp.asarray(data.inputs(range(5))), decode, tokenizer.end_id)
    captions = {i: tokenizer.decode(tokens) for i, tokens in enumerate(np.asarray(found.tokens[:, 0]))}
    assert len(set(captions.values())) == 5
    return captions


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_loss_of_a_split_is_the_mean_over_its_tokens(
    model: ClipCap, params: Any, data: CaptionData, pairs: Pairs, loss: Any, batch_size: int
) -> None:
    meter = LossMeter(model)
    assert meter(params, data, pairs, batch_size) == pytest.approx(loss({i: i for i in range(5)}), rel=1e-5)
    permuted = meter(params, data, pairs, batch_size, permuted=True)
    assert permuted == pytest.approx(loss({i: (i + 2) % 5 for i in range(5)}), rel=1e-5)
    assert permuted != pytest.approx(loss({i: i for i in range(5)}), rel=1e-3)


@pytest.mark.parametrize(
    ("images", "chosen"), [(1, [0]), (2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])]
)
def test_a_subset_is_evenly_spaced(
    data_dir: Path,
    model: ClipCap,
    params: Any,
    data: CaptionData,
    pairs: Pairs,
    tokenizer: Tokenizer,
    loss: Any,
    captions: dict[int, str],
    images: int,
    chosen: list[int],
) -> None:
    validation = Validator(model, tokenizer, data, pairs, config(data_dir, images, batch_size=4))(params)
    assert validation.metrics["loss"] == pytest.approx(loss({i: i for i in chosen}), rel=1e-5)
    assert validation.metrics["loss_permuted"] == pytest.approx(loss({i: (i + 2) % 5 for i in chosen}), rel=1e-5)

    assert validation.captions == {data.image_ids[i]: captions[i] for i in chosen}
    assert validation.distinct == len(chosen)
    scores = References({data.image_ids[i]: data.captions[i] for i in chosen}).score(validation.captions).overall
    assert validation.metrics.keys() == {"loss", "loss_permuted", *scores}
    assert {name: validation.metrics[name] for name in scores} == scores
    assert "CIDEr" in scores


@pytest.mark.parametrize(("images", "seen"), [(5, 5), (2, 4)])  # also those that permuted validation shows
@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_are_decoded_and_looked_at_once(
    data_dir: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, images: int, seen: int, workers: int
) -> None:
    """And give the losses and the captions that they would give anew each time."""
    settings = make_config(data_dir, {"evaluate.images": images, "data.workers": workers}, "pixels")
    model = ClipCap(settings.model)
    monkeypatch.setattr(batches, "_CACHED_BYTES", 0)
    data = CaptionData(open_split("records/both", "val", str(data_dir)), IMAGE_SIZE)
    pairs = make_pairs(data.captions, tokenizer, MAX_TOKENS)
    params = random_params(model, 0, data.inputs([0]), np.zeros((1, 1), np.int32))
    validate = Validator(model, tokenizer, data, pairs, settings)
    threads = set(threading.enumerate())
    with mock.patch.object(pictures, "decode", wraps=pictures.decode) as decode:
        advanced: list[int] = []
        validation = validate(params, advanced.append)
    assert decode.call_count == seen
    assert_ended(threads)

    chosen = np.linspace(0, 4, images).round().astype(int)
    some, loss = pairs.select(np.isin(pairs.examples, chosen)), LossMeter(model)
    assert sum(advanced) == validate.total == seen + 2 * len(some) + images
    anew = [loss(params, data, some, 4), loss(params, data, some, 4, permuted=True)]
    np.testing.assert_allclose([validation.metrics["loss"], validation.metrics["loss_permuted"]], anew, rtol=1e-6)
    captions = BatchCaptioner(model, tokenizer, settings.evaluate.decode).all(params, data, chosen, 4)
    assert list(validation.captions.values()) == [caption.text for caption in captions]
    assert validation.distinct >= images // 2
    other = jax.tree.map(lambda x: 2 * x, params)  # of a tower that has learnt
    assert validate(other).metrics["loss"] == pytest.approx(loss(other, data, some, 4), rel=1e-5)


def test_words(
    data_dir: Path, model: ClipCap, params: Any, data: CaptionData, pairs: Pairs, tokenizer: Tokenizer
) -> None:
    """The best checkpoint is chosen by the CIDEr of the config's words; what to know of it is told."""
    settings = make_config(data_dir, {"evaluate.images": 5, "evaluate.words": "spaces"})
    validator = Validator(model, tokenizer, data, pairs, settings)
    advanced: list[int] = []
    found = validator(params, advanced.append)
    assert sum(advanced) == validator.total == 2 * len(pairs) + 5
    expected = References(dict(zip(data.image_ids, data.captions, strict=True)), "spaces").score(found.captions).overall
    assert {name: found.metrics[name] for name in expected} == expected
    as_ptb = References(dict(zip(data.image_ids, data.captions, strict=True))).score(found.captions).overall
    assert as_ptb != expected  # full stops are words where nothing takes them away
    assert "CIDEr says little of 5 pictures" in validator.notes[0]


def test_nothing_to_validate_on(data_dir: Path, model: ClipCap, data: CaptionData, tokenizer: Tokenizer) -> None:
    none = make_pairs([() for _ in data.captions], tokenizer, MAX_TOKENS)
    with pytest.raises(UserError, match="records/both/val holds no captions to validate on"):
        Validator(model, tokenizer, data, none, config(data_dir, 5, batch_size=4))


@pytest.mark.parametrize(
    ("captions", "collapsed"),
    [
        ([], False),
        (["a"], False),
        (["a", "a"], True),
        (["a", "b"], False),
        (["a"] * 39 + ["b"], False),
        (["a"] * 40 + ["b"], True),
        ([str(i) for i in range(5)] * 20, False),
        ([str(i % 4) for i in range(100)], True),
    ],
)
def test_collapsed_is_less_than_5_percent(captions: list[str], collapsed: bool) -> None:
    validation = Validation({}, {str(i): caption for i, caption in enumerate(captions)})
    assert validation.collapsed == collapsed


def test_training_warns_of_captions_that_are_all_the_same(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_config(data_dir, {"evaluate.every": 1})
    metrics = {"loss": 1.25, "loss_permuted": 2.5, "CIDEr": 0.125, "Bleu_4": 0.0625}
    said: dict[str, str] = {}
    monkeypatch.setattr(Validator, "__call__", lambda *_: Validation(metrics, said))
    said.update({str(i): f"[b]{i}[/b]" for i in range(8)})
    printed = train_until(tmp_path / "good", settings, 1)
    assert "step 1  validation loss 1.250 (2.500 with other pictures)  CIDEr 0.125  BLEU-4 0.062" in printed
    assert "    2: [b]2[/b]\n" in printed
    assert "Warning: CIDEr says little of 4 pictures" in printed
    assert "between them" not in printed
    said.update({str(i): "a dog" for i in range(8)})
    printed = train_until(tmp_path / "collapsed", settings, 1)
    assert "Warning: 8 pictures have only 1 caption between them." in printed
