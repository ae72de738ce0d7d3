import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from needs import skip_without
from pytorch import gpt2 as torch_gpt2
from pytorch import import_torch
from random_models import clipcap_config, random_embeddings, random_params, random_tokens
from tiny import Source

from clipcap_jax.captioning.captioner import Captioner
from clipcap_jax.captioning.constraints import ANY, Constraints, constrained
from clipcap_jax.captioning.decode import Hypotheses, beam_search
from clipcap_jax.captioning.sampling import Sampling, sample
from clipcap_jax.config import DecodeConfig
from clipcap_jax.convert import gpt2
from clipcap_jax.models.clipcap import ClipCap

VOCAB_SIZE, BATCH, MAX_TOKENS = 40, 3, 7
NO_END = VOCAB_SIZE  # an id that no token has
MODEL = ClipCap(clipcap_config(vocab_size=VOCAB_SIZE))
EMBEDDINGS = random_embeddings(0, BATCH)
PROMPT = np.array([7, 3, 7, 11], np.int32)
PENALTIES = (None, 1.3, 0.8)


def processed(scores: np.ndarray, ids: np.ndarray, end_token: int, constraints: Constraints, written: int) -> Any:
    """What transformers makes of the scores of one step; `ids`: the prompt's, too."""
    import torch
    from transformers import MinNewTokensLengthLogitsProcessor, NoBadWordsLogitsProcessor
    from transformers import RepetitionPenaltyLogitsProcessor as Penalty

    found, history = torch.tensor(scores), torch.tensor(ids).long()
    if constraints.repetition_penalty is not None:
        found = Penalty(float(constraints.repetition_penalty))(history, found)
    if constraints.banned is not None:
        found = NoBadWordsLogitsProcessor(lists(constraints.banned))(history, found)
    if constraints.min_tokens is not None:
        start = ids.shape[1] - written
        found = MinNewTokensLengthLogitsProcessor(start, int(constraints.min_tokens), end_token)(history, found)
    return found.numpy()


def lists(banned: np.ndarray) -> list[list[int]]:
    return [[token for token in row if token != ANY] for row in banned.tolist()]


@pytest.mark.parametrize("prompt", [None, PROMPT])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_scores_are_those_of_transformers(prompt: np.ndarray | None, penalty: float | None) -> None:
    """With few tokens, so that many are repeated, and banned sequences begun."""
    skip_without("torch")
    size, end_token = 6, 2
    banned = np.array([[ANY, ANY, 1], [ANY, 3, 4], [5, 5, 0], [ANY, 2, 2]], np.int32)
    first = np.array([] if prompt is None else prompt % size, np.int32)
    constraints = Constraints(None if prompt is None else first, np.int32(3), penalty, banned)
    scores = np.random.default_rng(0).normal(0, 2, (200, size)).astype(np.float32)
    tokens = random_tokens(1, 200, 5, vocab_size=size)
    changed = 0
    for step in range(5):
        found = constrained(jnp.asarray(scores), jnp.asarray(tokens), step, end_token, constraints)
        ids = np.concatenate([np.tile(first, (200, 1)), tokens[:, :step]], axis=1).astype(np.int64)
        if ids.shape[1]:  # transformers has no step without a token
            expected = processed(scores, ids, end_token, constraints, step)
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert np.isneginf(found[:, 1]).all()
        assert np.isneginf(found[:, end_token]).all() == (step < 3)
        changed += int(np.isneginf(found)[:, [0, 4]].sum())
    assert changed > 50


@functools.cache
def theirs() -> tuple[Any, Any]:
    """A random GPT-2 of transformers, and parameters of `MODEL` with it."""
    import_torch()
    model = torch_gpt2(scale=0.3, vocab_size=VOCAB_SIZE, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    params = random_params(MODEL, 0, EMBEDDINGS, random_tokens(0, BATCH, MAX_TOKENS))
    return model, {**params, "gpt2": gpt2.from_arrays(arrays, "a test", 2)[1]}


def generated(beams: int, end_token: int | None, constraints: Constraints) -> np.ndarray:
    import torch

    model, params = theirs()
    asked: dict[str, Any] = {}
    prefix = torch.from_numpy(np.array(MODEL.apply({"params": params}, EMBEDDINGS, method="prefix")))
    if constraints.prompt is not None:
        prompt = torch.from_numpy(np.tile(constraints.prompt, (BATCH, 1))).long()
        prefix = torch.cat([prefix, model.transformer.wte(prompt)], dim=1)
        asked["input_ids"] = prompt
    if constraints.repetition_penalty is not None:
        asked["repetition_penalty"] = float(constraints.repetition_penalty)
    if constraints.banned is not None:
        asked["bad_words_ids"] = lists(constraints.banned)
    if constraints.min_tokens is not None:
        asked["min_new_tokens"] = int(constraints.min_tokens)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = model.generate(
            inputs_embeds=prefix,
            num_beams=beams,
            do_sample=False,
            max_new_tokens=MAX_TOKENS,
            eos_token_id=end_token,
            pad_token_id=end_token or 0,
            attention_mask=torch.ones(prefix.shape[:2]),
            **asked,
        )
    skipped = 0 if constraints.prompt is None else len(constraints.prompt)
    written = np.full((BATCH, MAX_TOKENS), end_token or 0)
    written[:, : found.shape[1] - skipped] = found.numpy()[:, skipped:]
    return written


@functools.cache
def search(beams: int) -> Any:
    decode = DecodeConfig(beams, MAX_TOKENS, 1.0, "")
    inputs = jnp.asarray(EMBEDDINGS)
    return jax.jit(lambda params, end, constraints: beam_search(MODEL, params, inputs, decode, end, constraints))


@jax.jit
def drawn(params: Any, end_token: int, constraints: Constraints) -> Hypotheses:
    """Always the likeliest."""
    decode, key = DecodeConfig(1, MAX_TOKENS, 1.0, ""), jax.random.key(0)
    inputs, rows = jnp.asarray(EMBEDDINGS), jnp.arange(BATCH)
    return sample(MODEL, params, inputs, rows, key, decode, Sampling(top_k=1), 1, end_token, constraints)


@pytest.mark.parametrize("prompt", [None, PROMPT])
@pytest.mark.parametrize("penalty", PENALTIES[:2])
def test_captions_are_those_of_transformers(prompt: np.ndarray | None, penalty: float | None) -> None:
    """A beam, greedy and drawn; what is banned are words and pairs of the captions that there are otherwise."""
    _, params = theirs()
    free = generated(1, None, Constraints(prompt))
    pairs = [[ANY, free[0, 0]], [ANY, free[1, 1]], free[2, 2:4].tolist()]
    constraints = Constraints(prompt, None, penalty, np.array(pairs, np.int32))
    for beams in (1, 3):
        expected = generated(beams, None, constraints)
        assert (expected != generated(beams, None, Constraints(prompt))).any()
        np.testing.assert_array_equal(search(beams)(params, NO_END, constraints).tokens[:, 0], expected)
        if beams == 1:
            np.testing.assert_array_equal(drawn(params, NO_END, constraints).tokens[:, 0], expected)

    end_token = int(free[0, 1])
    for min_tokens in (1, 2, 5):
        constraints = Constraints(prompt, np.int32(min_tokens), penalty)
        expected = generated(1, end_token, constraints)
        for found in (search(1), drawn):
            hypotheses = found(params, end_token, constraints)
            np.testing.assert_array_equal(hypotheses.tokens[:, 0], expected)
            assert (hypotheses.lengths > min_tokens).all()


def test_scores() -> None:
    """Of greedy and drawn captions the model's own, without penalty, of what follows the prompt."""
    params = random_params(MODEL, 0, EMBEDDINGS, random_tokens(0, BATCH, MAX_TOKENS))
    constraints = Constraints(PROMPT, np.int32(2), 1.5, np.array([[7]], np.int32))
    for found in (search(1), drawn):
        tokens, lengths, scores, _ = (np.asarray(x)[:, 0] for x in found(params, NO_END, constraints))
        whole = np.concatenate([np.tile(PROMPT, (BATCH, 1)), tokens], axis=1)
        log_probs = np.asarray(jax.nn.log_softmax(MODEL.apply({"params": params}, EMBEDDINGS, whole)))[:, len(PROMPT) :]
        expected = np.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0].sum(axis=1) / lengths
        np.testing.assert_allclose(scores, expected, rtol=1e-4)


def test_where_nothing_is_left() -> None:
    params = random_params(MODEL, 0, EMBEDDINGS, random_tokens(0, BATCH, MAX_TOKENS))
    everything = Constraints(banned=np.arange(VOCAB_SIZE, dtype=np.int32)[:, None])
    for found in (search(1), search(3), drawn):
        assert np.isneginf(found(params, NO_END, everything).scores).all()
    some = Constraints(banned=np.arange(2, VOCAB_SIZE, dtype=np.int32)[:, None])  # a beam of 3 has 2 left at first
    found = search(3)(params, NO_END, some)
    assert np.isfinite(found.scores).all()
    assert set(np.unique(found.tokens)) <= {0, 1}


def test_nothing_is_compiled_anew_for_another_penalty() -> None:
    params = random_params(MODEL, 0, EMBEDDINGS, random_tokens(0, BATCH, MAX_TOKENS))
    search(2)(params, 1, Constraints(PROMPT, np.int32(1), np.float32(1.1)))
    before = search(2)._cache_size()
    search(2)(params, 1, Constraints(PROMPT + 1, np.int32(2), np.float32(1.2)))
    assert search(2)._cache_size() == before


@pytest.fixture(scope="module")
def captioner(embeddings_run: Path) -> Captioner:
    return Captioner.load(embeddings_run)


WAYS: list[dict[str, Any]] = [{"beam_size": 1}, {"beam_size": 3}, {"n": 3}, {"n": 2, "seed": 0}]


@pytest.mark.parametrize("way", WAYS)
def test_what_is_asked_of_captions(captioner: Captioner, source: Source, way: dict[str, Any]) -> None:
    embeddings = np.load(source.embeddings)[:6]

    def texts(**asked: Any) -> list[str]:
        found = captioner.caption(embeddings, **way, **asked)
        return [str(caption) for one in found for caption in ([one] if "n" not in way else one)]

    words = {word for text in texts() for word in text.split()}
    banned = ["in", "red", "green", "nearly black"]
    assert words & {"red", "green"}
    for text in texts(banned=banned):
        assert not {"in", "red", "green", "In", "Red"} & {*text.split()}
        assert "nearly black" not in text
    for text in texts(prompt=" Bild 狗 ", max_tokens=8):
        assert text.startswith("Bild 狗")
    for text in texts(min_tokens=12):
        assert len(text.encode()) >= 10  # of byte-level pieces, but for white space at the end
