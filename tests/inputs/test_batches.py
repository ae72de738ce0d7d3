import json
import threading
from collections import Counter
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import Source, assert_ended

from clipcap_jax import pictures as pictures_module
from clipcap_jax.datasets import open_split
from clipcap_jax.errors import UserError
from clipcap_jax.inputs import batches as data_lib
from clipcap_jax.inputs.batches import Batch, CaptionData, Pairs, make_pairs, training_batches, training_order
from clipcap_jax.text.tokenizer import Tokenizer

IMAGE_SIZE, MAX_TOKENS = 16, 10

TOKENIZER = Tokenizer.train(["a picture of plain red", "dark blue"], 270)
END = TOKENIZER.end_id


@pytest.fixture(scope="module")
def embeddings(data_dir: Path) -> CaptionData:
    """The tiny data set's 17 training pictures, as embeddings: no two are the same."""
    data = CaptionData(open_split("records/both", "train", str(data_dir)), None)
    assert len(np.unique(data.inputs(range(17)), axis=0)) == len(data) == 17
    return data


@pytest.fixture(scope="module")
def pictures(data_dir: Path) -> CaptionData:
    return CaptionData(open_split("records/both", "train", str(data_dir)), IMAGE_SIZE)


@pytest.fixture(scope="module")
def pairs(embeddings: CaptionData) -> Pairs:
    return make_pairs(embeddings.captions, TOKENIZER, MAX_TOKENS)


def read_pairs(data: CaptionData, batches: Iterable[Batch]) -> Counter[tuple[int, tuple[int, ...]]]:
    """How often each (picture, caption) occurs in batches, told by their contents."""
    known = data.inputs(range(len(data)))
    found: Counter[tuple[int, tuple[int, ...]]] = Counter()
    for batch in batches:
        for inputs, tokens, length in zip(batch["inputs"], batch["tokens"], batch["lengths"], strict=True):
            if length:
                (picture,) = np.flatnonzero((known == inputs).reshape(len(known), -1).all(axis=1))
                found[int(picture), tuple(tokens[:length].tolist())] += 1
    return found


def all_pairs(data: CaptionData) -> Counter[tuple[int, tuple[int, ...]]]:
    """What an epoch has to hold, from the texts."""
    return Counter(
        (picture, (*TOKENIZER.encode([text])[0], END)[:MAX_TOKENS])
        for picture, texts in enumerate(data.captions)
        for text in texts
    )


def assert_same(actual: Batch, expected: Batch) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name], expected[name])


def test_pairs_teach_an_end_unless_they_are_cut() -> None:
    short, exact, long = [TOKENIZER.encode([text])[0] for text in ("red", "dark bl", "a picture of dark blue")]
    limit = len(exact) + 1
    assert len(short) + 1 < limit < len(long) + 1
    pairs = make_pairs([("red", "dark bl"), (), ("a picture of dark blue",)], TOKENIZER, limit)
    assert pairs.examples.tolist() == [0, 0, 2]
    assert pairs.lengths.tolist() == [len(short) + 1, limit, limit]
    padding = [END] * (limit - len(short))
    assert pairs.padded(np.arange(3), limit).tolist() == [short + padding, [*exact, END], long[:limit]]
    assert END not in long
    assert (len(pairs), pairs.cut) == (3, 1)


def test_the_originals_pairs_have_no_end() -> None:
    short, long = TOKENIZER.encode(["red", "a picture of dark blue"])
    limit = len(long)
    pairs = make_pairs([("red",), ("a picture of dark blue",)], TOKENIZER, limit, "original")
    assert pairs.lengths.tolist() == [len(short), len(long)]
    assert pairs.padded(np.arange(2), limit).tolist() == [short + [END] * (limit - len(short)), long]
    assert pairs.cut == 0
    # The original's `tokenizer.encode(caption)` keeps white space around, which tokens hold.
    (around,) = TOKENIZER.encode([" red "], strip=False)
    assert around not in (short, TOKENIZER.encode([" red"])[0])
    assert make_pairs([(" red ",)], TOKENIZER, limit, "original").padded(np.arange(1), len(around)).tolist() == [around]


def test_pairs_that_hold_a_token() -> None:
    (z,), (q,) = TOKENIZER.encode(["z", "q"])
    pairs = make_pairs([("qz", "z z"), (), ("q",), ("", "a z q z")], TOKENIZER, 5)  # the last z is cut off
    assert pairs.holding(z).tolist() == [0, 1, 1, 4]
    assert pairs.holding(q).tolist() == [0, 2, 4]
    assert pairs.holding(TOKENIZER.size).tolist() == []
    assert pairs.select(np.array([2, 4])).holding(z).tolist() == [1]
    assert make_pairs([("",), ("q",), ("",)], TOKENIZER, 5, "original").holding(q).tolist() == [1]


@pytest.mark.parametrize("captions", [[], [()], [(), ()]])
def test_pairs_of_nothing(captions: Any) -> None:
    pairs = make_pairs(captions, TOKENIZER, 5)
    assert len(pairs) == pairs.cut == len(pairs.holding(0)) == 0
    assert pairs.padded(np.arange(0), 5).shape == (0, 5)


ORDERS = st.tuples(
    st.lists(st.integers(1, 20), min_size=1, max_size=60).map(np.array),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
    st.integers(0, 1000),
)


@given(ORDERS)
def test_an_epoch_holds_every_pair_once(order: tuple[np.ndarray, int, int, int, int]) -> None:
    lengths, batch_size, *_ = order
    rows = training_order(*order)
    batches = data_lib.steps_per_epoch(len(lengths), batch_size)
    assert rows.shape == (batches, batch_size)
    assert (batches - 1) * batch_size < len(lengths)
    assert sorted(rows[rows >= 0]) == list(range(len(lengths)))
    padded = (rows < 0).any(axis=1)
    assert padded.sum() == (len(lengths) % batch_size != 0)  # in one batch, which holds something as well
    assert (rows >= 0).any(axis=1).all()


def test_the_order_is_what_it_was() -> None:
    """NumPy may change what its generators draw. Then this fails, and a run must not go on where another NumPy left it:
    it would repeat some pairs and miss others."""
    lengths = np.array([9, 7, 12, 5, 8, 11, 6, 10, 13, 4])
    assert training_order(lengths, 3, 2, seed=3, epoch=1).tolist() == [[1, 4, 0], [3, 6, 7], [5, 2, 8], [-1, -1, 9]]
    assert training_order(lengths, 3, 2, seed=3, epoch=2).tolist() == [[3, 5, 2], [6, 1, 4], [0, 7, 8], [-1, -1, 9]]


@pytest.mark.parametrize("pool_batches", [1, 3])
def test_the_order_differs_by_seed_and_epoch(pool_batches: int) -> None:
    lengths = np.random.default_rng(0).integers(5, 20, 50)
    orders = {
        tuple(training_order(lengths, 8, pool_batches, seed, epoch).ravel()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25
    first_batches = {frozenset(order[:8]) for order in orders}
    assert len(first_batches) == 25


def test_a_pool_is_sorted_by_length() -> None:
    """In one pool of all the batches, put in order, are the sorted lengths; but they come shuffled."""
    lengths = np.random.default_rng(0).integers(5, 20, 64)
    batches = lengths[training_order(lengths, 8, 100, 0, 0)]
    assert np.concatenate(sorted(batches.tolist())).tolist() == sorted(lengths)
    assert batches.tolist() != sorted(batches.tolist())

    unsorted, pools = (lengths[training_order(lengths, 8, pool_batches, 0, 0)] for pool_batches in (1, 4))
    spread = [np.ptp(order, axis=1).mean() for order in (batches, pools, unsorted)]
    assert spread == sorted(spread)
    assert spread[0] < spread[1] < spread[2]


def test_a_batch(embeddings: CaptionData, pairs: Pairs) -> None:
    order = np.argsort(pairs.lengths)
    rows = np.array([order[3], -1, order[0], order[3]])
    batch = data_lib.make_batch(embeddings, pairs, rows)
    assert {name: array.dtype for name, array in batch.items()} == {
        "inputs": np.float16,
        "tokens": np.int32,
        "lengths": np.int32,
    }
    assert batch["lengths"].tolist() == [pairs.lengths[order[3]], 0, pairs.lengths[order[0]], pairs.lengths[order[3]]]
    longest = batch["tokens"].shape[1]
    assert longest in (4, 8, MAX_TOKENS)
    assert longest - 4 < max(batch["lengths"]) <= longest
    for i in (0, 2, 3):
        np.testing.assert_array_equal(batch["tokens"][i], pairs.padded(rows[[i]], longest)[0])
        np.testing.assert_array_equal(batch["inputs"][i], embeddings.inputs([pairs.examples[rows[i]]])[0])

    other = data_lib.make_batch(embeddings, pairs, rows, np.array([5, 0, 6, 7]))
    np.testing.assert_array_equal(other["inputs"], embeddings.inputs([5, 0, 6, 7]))
    np.testing.assert_array_equal(other["tokens"], batch["tokens"])


def test_the_longest_caption_has_room(embeddings: CaptionData, pairs: Pairs) -> None:
    """Lengths are rounded up, but not beyond the 10 tokens that there are."""
    batch = data_lib.make_batch(embeddings, pairs, np.array([np.argmax(pairs.lengths)]))
    assert batch["lengths"].tolist() == [MAX_TOKENS]
    assert batch["tokens"].shape == (1, MAX_TOKENS)


BATCH_SIZE, STEPS_PER_EPOCH = 8, 5  # 33 pairs: the last batch of an epoch holds 1
STEPS = 2 * STEPS_PER_EPOCH + 2


def batches(data: CaptionData, pairs: Pairs, workers: int = 0, seed: int = 3, **options: int) -> Generator[Batch]:
    settings = {"batch_size": BATCH_SIZE, "pool_batches": 2, "seed": seed, "steps": STEPS, "workers": workers}
    return training_batches(data, pairs, **(settings | options))


@pytest.mark.parametrize("kind", ["embeddings", "pictures"])
def test_training_reads_every_pair_once_an_epoch(kind: str, pairs: Pairs, request: pytest.FixtureRequest) -> None:
    data = request.getfixturevalue(kind)
    read = list(batches(data, pairs))
    assert len(read) == STEPS
    epochs = [read[:STEPS_PER_EPOCH], read[STEPS_PER_EPOCH : 2 * STEPS_PER_EPOCH]]
    assert [read_pairs(data, epoch) for epoch in epochs] == 2 * [all_pairs(data)]
    assert {len(batch["lengths"]) for batch in read} == {BATCH_SIZE}
    first, second = ([batch["lengths"].tolist() for batch in epoch] for epoch in epochs)
    assert first != second
    assert [batch["lengths"].tolist() for batch in batches(data, pairs, seed=4)][:STEPS_PER_EPOCH] != first


@pytest.mark.parametrize("taken", [0, 1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1])
def test_coming_lengths_are_those_of_the_epochs_batches(embeddings: CaptionData, pairs: Pairs, taken: int) -> None:
    left = STEPS_PER_EPOCH - taken % STEPS_PER_EPOCH
    lengths = [batch["tokens"].shape[1] for batch in list(batches(embeddings, pairs, start=taken))[:left]]
    order = {"batch_size": BATCH_SIZE, "pool_batches": 2, "seed": 3, "steps": STEPS, "start": taken}
    assert data_lib.coming_lengths(pairs, **order) == list(dict.fromkeys(lengths))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("taken", [0, 1, STEPS_PER_EPOCH - 1, STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1])
def test_going_on_gives_the_batches_that_would_have_come(
    embeddings: CaptionData, pairs: Pairs, taken: int, workers: int
) -> None:
    whole = list(batches(embeddings, pairs))
    rest = list(batches(embeddings, pairs, workers, start=taken))
    assert len(rest) == len(whole) - taken
    for batch, expected in zip(rest, whole[taken:], strict=True):
        assert_same(batch, expected)


def test_the_next_epochs_order_is_drawn_while_this_one_is_read(
    embeddings: CaptionData, pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [threading.Event() for _ in range(3)]

    def noted(lengths: np.ndarray, batch_size: int, pool_batches: int, seed: int, epoch: int) -> np.ndarray:
        drawn[epoch].set()
        return training_order(lengths, batch_size, pool_batches, seed, epoch)

    monkeypatch.setattr(data_lib, "training_order", noted)
    read = batches(embeddings, pairs, workers=2, steps=3 * 50, batch_size=1, start=1)  # 33 steps an epoch
    next(read)
    assert drawn[1].wait(60)
    assert not drawn[2].is_set()  # no more than one ahead: there is memory for two
    read.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_training_that_stops_leaves_no_threads(embeddings: CaptionData, pairs: Pairs, workers: int) -> None:
    before = set(threading.enumerate())
    read = batches(embeddings, pairs, workers)
    next(read)
    assert bool(set(threading.enumerate()) - before) == (workers > 0)
    read.close()
    assert_ended(before)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_read_shares_of_what_one_reads(embeddings: CaptionData, pairs: Pairs, hosts: int) -> None:
    """Also when they go on from what another number of hosts has read."""
    whole = list(batches(embeddings, pairs))
    for taken in (0, 7):
        shares = [batches(embeddings, pairs, host % 3, start=taken, host=host, hosts=hosts) for host in range(hosts)]
        for blocks, expected in zip(zip(*shares, strict=True), whole[taken:], strict=True):
            assert {len(block["lengths"]) for block in blocks} == {BATCH_SIZE // hosts}
            assert_same({name: np.concatenate([block[name] for block in blocks]) for name in expected}, expected)


@given(ORDERS)
def test_the_order_is_that_of_sorted_pools(order: tuple[np.ndarray, int, int, int, int]) -> None:
    """As a loop over the pools makes it."""
    lengths, batch_size, pool_batches, seed, epoch = order
    random = np.random.default_rng((seed, epoch))
    rows = [*random.permutation(len(lengths)), *[-1] * (-len(lengths) % batch_size)]
    expected: list[int] = []
    pool = pool_batches * batch_size
    for i in range(0, len(rows), pool):
        expected += (
            sorted(rows[i : i + pool], key=lambda row: 0 if row < 0 else lengths[row])
            if pool_batches > 1
            else rows[i : i + pool]
        )
    found = training_order(*order)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, random.permutation(np.reshape(expected, (-1, batch_size))))


# How many of the captions of COCO's validation split have how many of GPT-2's tokens, the end included: 8, 9, 10, ...
COCO_LENGTHS = [66, 793, 3056, 4333, 4736, 4052, 2930, 1851, 1150, 717, 434, 278, 187, 108, 94, 51, 38, 27, 29, 27, 16]
COCO_LENGTHS += [11, 1, 6, 3, 3, 3, 2, 2, 1, 0, 0, 2, 0, 0, 1, 1, 0, 0, 2, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1]


def padding(lengths: np.ndarray, batch_size: int, prefix: int = 10) -> tuple[float, set[int]]:
    """The share of an epoch's computed positions that are padding, and the lengths that batches have."""
    pairs = Pairs(np.zeros_like(lengths), lengths, np.zeros(len(lengths), np.int64), np.zeros(99, np.uint16), 68, 0)
    data = mock.create_autospec(CaptionData, instance=True)
    computed, shapes = 0, set()
    for rows in training_order(lengths, batch_size, 50, 0, 0):
        batch = data_lib.make_batch(data, pairs, rows)
        computed += batch_size * (prefix + batch["tokens"].shape[1])
        shapes.add(batch["tokens"].shape[1])
    return 1 - (len(lengths) * prefix + lengths.sum()) / computed, shapes


@pytest.mark.parametrize(("batch_size", "compiled"), [(40, 8), (256, 6)])
def test_little_is_padding(batch_size: int, compiled: int) -> None:
    share, shapes = padding(np.repeat(np.arange(8, 8 + len(COCO_LENGTHS)), COCO_LENGTHS), batch_size)
    assert share < 0.08
    assert len(shapes) <= compiled


def test_little_is_padding_on_coco(shared: Path) -> None:
    file = shared / "data" / "coco_captions" / "captions_val2017.json"
    texts = [annotation["caption"] for annotation in json.loads(file.read_text())["annotations"]]
    lengths = make_pairs([(text,) for text in texts], Tokenizer.load(str(shared / "data/tokenizers/gpt2")), 68).lengths
    assert np.bincount(lengths)[8:].tolist() == COCO_LENGTHS
    assert padding(lengths, 40)[0] < 0.08
    assert padding(lengths, 256)[0] < 0.08


@pytest.mark.parametrize("batch_size", [4, 33, 40])
def test_validation_reads_every_pair_once(embeddings: CaptionData, pairs: Pairs, batch_size: int) -> None:
    read = list(data_lib.validation_batches(embeddings, pairs, batch_size))
    assert read_pairs(embeddings, read) == all_pairs(embeddings)
    assert {len(batch["lengths"]) for batch in read} == {batch_size}
    lengths = np.concatenate([batch["lengths"] for batch in read])
    assert lengths[: len(pairs)].tolist() == sorted(pairs.lengths)
    assert not lengths[len(pairs) :].any()


def test_permuted_validation_shows_every_caption_with_another_picture(embeddings: CaptionData, pairs: Pairs) -> None:
    right = list(data_lib.validation_batches(embeddings, pairs, 8))
    wrong = list(data_lib.validation_batches(embeddings, pairs, 8, permuted=True))
    for ours, theirs in zip(right, wrong, strict=True):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
        np.testing.assert_array_equal(ours["lengths"], theirs["lengths"])
        assert (ours["inputs"] != theirs["inputs"]).any(axis=1).all()
    again = data_lib.validation_batches(embeddings, pairs, 8, permuted=True)
    for batch, expected in zip(again, wrong, strict=True):
        assert_same(batch, expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 8])
def test_inputs_come_in_order(embeddings: CaptionData, count: int, workers: int) -> None:
    indices = np.random.default_rng(0).permutation(17)[:count]
    read = list(data_lib.input_batches(embeddings, indices, 4, workers))
    assert {inputs.shape for _, inputs in read} <= {(4, 5)}
    real = [row for rows, inputs in read for row in inputs[:rows]]
    np.testing.assert_array_equal(real, embeddings.inputs(indices) if count else [])


def test_pictures_are_decoded_and_resized(pictures: CaptionData, embeddings: CaptionData) -> None:
    """A tiny picture has one colour, and its embedding begins with it."""
    inputs = pictures.inputs([3, 0])
    assert inputs.dtype == np.uint8
    assert inputs.shape == (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    colours = np.broadcast_to(embeddings.inputs([3, 0])[:, None, None, :3], inputs.shape)
    np.testing.assert_allclose(inputs / 255, colours, atol=1e-3)


def test_embeddings_in_the_place_of_pictures(pictures: CaptionData) -> None:
    indices = np.array([3, 0])
    rows = np.array([[1, 2], [3, 4]], np.float32)
    data = pictures.embedded(indices, iter(rows))
    assert data.embedding_width == 2
    assert data.inputs([0, 3, 0]).tolist() == [[3, 4], [1, 2], [3, 4]]
    assert np.isnan(data.inputs([1])).all()  # so that a loss is not finite, rather than wrong
    assert (data.captions, data.image(3)) == (pictures.captions, pictures.image(3))
    assert pictures.embedding_width is None
    assert pictures.inputs([0]).ndim == 4


def test_texts_and_the_encoder(source: Source, pictures: CaptionData, embeddings: CaptionData) -> None:
    records = [json.loads(line) for line in source.captions.read_text().splitlines()]
    expected = {record["image_id"]: record for record in records if record["split"] == "train"}
    for data in (pictures, embeddings):
        assert data.name == "records/both/train"
        assert list(data.domains) == 17 * [""]
        assert sorted(data.image_ids) == sorted(expected)
        for i, image_id in enumerate(data.image_ids):
            assert data.captions[i] == tuple(expected[image_id]["captions"])
            assert Path(data.image_paths[i]) == source.pictures / expected[image_id]["image"]
            assert data.image(i) == Path(data.image_paths[i]).read_bytes()
    assert embeddings.encoder == "mean colour"
    assert pictures.encoder is None  # it has nothing to do with what the model reads


def test_a_data_set_without_what_the_model_reads(data_dir: Path) -> None:
    message = 'records/pictures/val holds no embeddings: set config.data.input to "image"'
    with pytest.raises(UserError, match=message):
        CaptionData(open_split("records/pictures", "val", str(data_dir)), None)
    message = 'records/embeddings/val holds no pictures: set config.data.input to "embedding"'
    with pytest.raises(UserError, match=message):
        CaptionData(open_split("records/embeddings", "val", str(data_dir)), IMAGE_SIZE)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_picture_is_named(
    data_dir: Path, pairs: Pairs, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preparing checks every picture, but files rot."""
    pictures = CaptionData(open_split("records/both", "train", str(data_dir)), IMAGE_SIZE)
    whole = pictures.image

    def rotten(index: int) -> bytes | None:
        encoded = whole(index)
        return encoded[:60] if encoded and index == 2 else encoded

    monkeypatch.setattr(pictures, "image", rotten)
    assert len(pictures.inputs([1, 3])) == 2
    message = f"records/both/train, picture '{pictures.image_ids[2]}': The image is truncated or broken"
    with pytest.raises(UserError, match=message):
        pictures.inputs([1, 2])
    with pytest.raises(UserError, match=message):
        list(batches(pictures, pairs, workers))


@pytest.mark.parametrize(("kept", "decoded_again"), [(17, 0), (16, 1)])
def test_decoded_pictures_are_kept_while_there_is_room(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, kept: int, decoded_again: int
) -> None:
    monkeypatch.setattr(data_lib, "_CACHED_BYTES", kept * IMAGE_SIZE * IMAGE_SIZE * 3)
    data = CaptionData(open_split("records/both", "train", str(data_dir)), IMAGE_SIZE)
    decoded: list[bytes] = []
    decode = pictures_module.decode

    def counted(encoded: bytes) -> Image.Image:
        decoded.append(encoded)
        return decode(encoded)

    monkeypatch.setattr(pictures_module, "decode", counted)
    first = data.inputs(range(17))
    assert len(decoded) == 17
    first[:] = 0  # a batch is a copy
    again = data.inputs([*range(16, 0, -1), 0])  # the newest first, and last the one that there may be no room for
    assert len(decoded) == 17 + decoded_again
    np.testing.assert_array_equal(again[-1], pictures_module.preprocess(decode(decoded[0]), IMAGE_SIZE))
