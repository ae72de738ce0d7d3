"""Outputs of the original implementations (see tests/data/original/SOURCES.md), and their parameters."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipcap_jax.convert import clip, gpt2, original
from clipcap_jax.models.clipcap import ClipCapConfig, ClipConfig

DATA = Path(__file__).parent / "data" / "original"

Arrays = dict[str, np.ndarray]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Original:
    """A small random captioner of the original: `arrays` and `sizes` hold what its files hold."""

    arrays: Mapping[str, np.ndarray]
    sizes: dict[str, Any]

    @classmethod
    def load(cls, kind: str) -> "Original":
        """`kind`: "mlp" or "transformer"."""
        with np.load(DATA / f"official_{kind}.npz") as arrays:
            return cls(dict(arrays), json.loads((DATA / f"official_{kind}.json").read_text()))

    @property
    def state(self) -> Arrays:
        """The state dict of the original's `ClipCaptionModel`."""
        return self.part("state/")

    def part(self, prefix: str) -> Arrays:
        """The arrays whose names start so, without it."""
        return {name.removeprefix(prefix): value for name, value in self.arrays.items() if name.startswith(prefix)}

    def _mapper(self) -> Any:
        mapper = self.part("state/clip_project.")
        return original.mapper_from_arrays(mapper, self.sizes["n_embd"], self.sizes.get("num_heads", 0), "a test")

    @property
    def config(self) -> ClipCapConfig:
        mapper, _, _ = self._mapper()
        language_model, _ = self._gpt2()
        return ClipCapConfig(None, mapper, language_model, False, dtype="float32", matmul_precision="highest")

    @property
    def params(self) -> Params:
        return {"mapper": self._mapper()[2], "gpt2": self._gpt2()[1]}

    def _gpt2(self) -> Any:
        return gpt2.from_arrays(self.part("state/gpt."), "a test", self.sizes["n_head"])


def load_clip(kind: str) -> tuple[ClipConfig, Params, Arrays]:
    """A tower of OpenAI's: sizes, parameters, and `pixel_values` and `image_embeds`; `kind`: "vit" or "resnet"."""
    arrays: Arrays = {}
    for path in DATA.glob(f"openai_clip_{kind}*.npz"):
        with np.load(path) as part:
            arrays.update(part)
    state = {name.removeprefix("state/"): value for name, value in arrays.items() if name.startswith("state/")}
    return *clip.from_arrays(state, "a test"), arrays
