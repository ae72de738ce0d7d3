"""What a user says of one captioning: how to search or draw, and how many captions of each picture."""

import dataclasses
import math
import secrets
from typing import Any

import numpy as np

from clipcap_jax.captioning.sampling import Sampling
from clipcap_jax.config import DecodeConfig
from clipcap_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Settings:
    """As checked.

    Attributes:
      decode: length limit and ranking; its beam is what is searched, or how many are drawn.
      sampling: how captions are drawn; None: they are searched for.
      seed: of what is drawn.
    """

    decode: DecodeConfig
    sampling: Sampling | None
    seed: int


def settings(
    default: DecodeConfig,
    *,
    n: int | None,
    beam_size: int | None,
    max_tokens: int | None,
    length_penalty: float | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> Settings:
    """See `Captioner.caption`; None is what is not said.

    Raises:
      UserError: a number is out of its range, or two contradict each other.
    """
    for name, value in {"n": n, "beam_size": beam_size, "max_tokens": max_tokens, "top_k": top_k}.items():
        if value is not None:
            check_count(name, value)
    for name, number, most in (
        ("length_penalty", length_penalty, math.inf),
        ("temperature", temperature, math.inf),
        ("top_p", top_p, 1),
    ):
        if number is not None:
            _check_number(name, number, most)
    if seed is not None and not (_is_whole(seed) and 0 <= seed < 2**32):
        raise UserError(f"seed is {seed!r}: it has to be a whole number from 0 to 2**32 - 1")
    given: dict[str, Any] = {"beam_size": beam_size, "max_tokens": max_tokens, "length_penalty": length_penalty}
    decode = dataclasses.replace(default, **{name: value for name, value in given.items() if value is not None})
    if (temperature, top_k, top_p, seed) == (None,) * 4:
        if beam_size is not None and (n or 1) > beam_size:
            raise UserError(f"n is {n}, but a beam of {beam_size} holds no more than {beam_size}: raise beam_size, too")
        return Settings(dataclasses.replace(decode, beam_size=max(decode.beam_size, n or 1)), None, 0)
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
    return Settings(drawn, sampling, secrets.randbits(32) if seed is None else int(seed))


def check_count(name: str, value: Any) -> None:
    """Raise a UserError unless it is a whole number from 1 on."""
    if not _is_whole(value) or value < 1:
        raise UserError(f"{name} is {value!r}: it has to be a whole number from 1 on")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and type(value) is not bool


def _check_number(name: str, value: Any, most: float) -> None:
    zero = name == "length_penalty"
    if not (_is_whole(value) or isinstance(value, float | np.floating)) or not math.isfinite(value):
        raise UserError(f"{name} is {value!r}: it has to be a number")
    if value < 0 or value > most or (value == 0 and not zero):
        bounds = "from 0 on" if zero else "above 0" + (f", up to {most}" if most < math.inf else "")
        raise UserError(f"{name} is {value!r}: it has to be {bounds}")
