"""What a user says of one captioning: how to search or draw, what to keep to, and how many captions of each picture."""

import dataclasses
import math
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from clipcap_jax.captioning.constraints import ANY, Constraints
from clipcap_jax.captioning.sampling import Sampling
from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError
from clipcap_jax.text.tokenizer import Tokenizer

# Of float32.
_TINIEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Settings:
    """As checked.

    Attributes:
      decode: length limit and ranking; its beam is what is searched, or how many are drawn.
      sampling: how captions are drawn; None: they are searched for.
      constraints: what they are held to.
      seed: of what is drawn.
    """

    decode: DecodeConfig
    sampling: Sampling | None
    constraints: Constraints
    seed: int


def settings(
    default: DecodeConfig,
    tokenizer: Tokenizer,
    *,
    n: int | None,
    beam_size: int | None,
    max_tokens: int | None,
    length_penalty: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    min_tokens: int | None,
    repetition_penalty: float | None,
    banned: Sequence[str] | None,
    prompt: str | None,
) -> Settings:
    """See `Captioner.caption`; None is what is not said.

    Raises:
      UserError: a number is out of its range, two contradict each other, or the tokenizer cannot write a text.
    """
    counts = {"n": n, "beam_size": beam_size, "max_tokens": max_tokens, "min_tokens": min_tokens, "top_k": top_k}
    for name, value in counts.items():
        if value is not None:
            check_count(name, value)
    for name, number, most in (
        ("length_penalty", length_penalty, math.inf),
        ("repetition_penalty", repetition_penalty, math.inf),
        ("temperature", temperature, math.inf),
        ("top_p", top_p, 1),
    ):
        if number is not None:
            _check_number(name, number, most)
    if seed is not None and not (_is_whole(seed) and 0 <= seed < 2**32):
        raise UserError(f"seed is {seed!r}: it has to be a whole number from 0 to 2**32 - 1")
    given: dict[str, Any] = {"beam_size": beam_size, "max_tokens": max_tokens, "length_penalty": length_penalty}
    decode = dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
    if min_tokens is not None and min_tokens > decode.max_tokens:
        raise UserError(f"min_tokens is {min_tokens}, more than max_tokens, {decode.max_tokens}: raise that, too")
    written = _prompt(tokenizer, prompt)
    constraints = Constraints(
        np.array(written, np.int32) if written else None,
        None if min_tokens is None else np.int32(min_tokens),
        None if repetition_penalty in (None, 1) else np.float32(repetition_penalty),
        _banned(tokenizer, banned, written),
    )
    if (temperature, top_k, top_p, seed) == (None,) * 4:
        if beam_size is not None and (n or 1) > beam_size:
            raise UserError(f"n is {n}, but a beam of {beam_size} holds no more than {beam_size}: raise beam_size, too")
        return Settings(dataclasses.replace(decode, beam_size=max(decode.beam_size, n or 1)), None, constraints, 0)
    if beam_size is not None:
        raise UserError(
            "beam_size is of a search, while temperature, top_k, top_p and seed are of captions that are drawn: leave "
            "out the one or the others"
        )
    sampling = Sampling(
        np.float32(1 if temperature is None else temperature),
        None if top_k is None else np.int32(min(top_k, np.iinfo(np.int32).max)),
        None if top_p in (None, 1) else np.float32(top_p),
    )
    drawn = dataclasses.replace(decode, beam_size=n or 1)
    return Settings(drawn, sampling, constraints, secrets.randbits(32) if seed is None else int(seed))


def _prompt(tokenizer: Tokenizer, prompt: str | None) -> list[int]:
    if prompt is None:
        return []
    _check_text("prompt", prompt)
    if unknown := tokenizer.unknown(prompt):
        raise UserError(f"prompt is {prompt!r}, but the tokenizer has no piece for {', '.join(map(repr, unknown))}")
    return tokenizer.encode([prompt])[0]


def _banned(tokenizer: Tokenizer, banned: Sequence[str] | None, prompt: Sequence[int]) -> np.ndarray | None:
    """`Constraints.banned`: each text as it is and with a capital, at the start of a word and within one."""
    if banned is None:
        return None
    if isinstance(banned, str) or not isinstance(banned, Iterable):
        raise UserError(f'banned is {banned!r}: it has to be a list of texts, such as ["dog", "in front of"]')
    sequences: dict[tuple[int, ...], None] = {}  # in order
    for text in banned:
        _check_text("a banned text", text)
        if not (text := text.strip()):
            raise UserError("a banned text is empty")
        capital = text[0].upper() + text[1:]
        for ids in tokenizer.encode([text, f" {text}", capital, f" {capital}"], strip=False):
            if not ids or tokenizer.unknown_id in ids:
                continue  # no caption can have it
            if any(tuple(prompt[start : start + len(ids)]) == tuple(ids) for start in range(len(prompt))):
                raise UserError(f"the prompt has {text!r}, which is banned: leave out the one or the other")
            sequences[tuple(ids)] = None
    if not sequences:
        return None
    longest = max(map(len, sequences))
    return np.array([[ANY] * (longest - len(ids)) + list(ids) for ids in sequences], np.int32)


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or text != text.encode(errors="replace").decode():  # half of a character
        raise UserError(f"{name} is {text!r}: it has to be a text")


def check_count(name: str, value: Any) -> None:
    """Raise a UserError unless it is a whole number from 1 on."""
    if not _is_whole(value) or value < 1:
        raise UserError(f"{name} is {value!r}: it has to be a whole number from 1 on")


def check_rows(rows: Any) -> np.ndarray:
    """As uint32; raise a UserError unless they are whole numbers from 0 to 2**32 - 1."""
    array = np.asarray(rows)
    if array.ndim != 1 or (array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= 2**32)):
        raise UserError("rows have to be whole numbers from 0 to 2**32 - 1, one for each input")
    return array.astype(np.uint32)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and type(value) is not bool


def _check_number(name: str, value: Any, most: float) -> None:
    zero = name == "length_penalty"
    if not (_is_whole(value) or isinstance(value, float | np.floating)) or not abs(value) <= _LARGEST:
        raise UserError(f"{name} is {value!r}: it has to be a number, as float32 has it")
    if value < 0 or value > most or (value < _TINIEST and not zero):
        bounds = "from 0 on" if zero else "above 0" + (f", up to {most}" if most < math.inf else "")
        raise UserError(f"{name} is {value!r}: it has to be {bounds}")
