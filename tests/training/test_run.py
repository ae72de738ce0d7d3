import contextlib
import io
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
from rich.console import Console
from tiny import make_config

from clipcap_jax.checkpoints.store import Checkpoints
from clipcap_jax.datasets.schema import open_split
from clipcap_jax.training import run

WORDS = ["red", "green", "blue", "yellow", "pink", "grey", "white", "in", "a", "and", "only", "picture", ".", "nearly"]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]


def test_what_the_tokenizer_does_not_know_is_told(data_dir: Path, tmp_path: Path) -> None:
    """The words for shades."""
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    settings = make_config(data_dir, {"tokenizer.source": str(tmp_path), "model.gpt2.vocab_size": len(PIECES)})
    console = Console(file=io.StringIO(), width=300)
    with (
        contextlib.closing(Checkpoints(tmp_path / "run", keep=1)) as checkpoints,
        mock.patch.object(run, "init_params", side_effect=KeyboardInterrupt),  # which comes after, and takes long
        pytest.raises(KeyboardInterrupt),
    ):
        run.open_run(settings, tmp_path / "run", checkpoints, console)
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue().splitlines()
    for split in ("train", "val"):
        texts = [text for example in open_split("records/both", split, str(data_dir)) for text in example.captions]
        unknown = [[word for word in text.replace(".", " .").split() if word not in PIECES] for text in texts]
        words = Counter(word for some in unknown for word in some)
        assert len(words) > 2
        start = (
            f"{sum(map(bool, unknown))} of the {len(texts)} captions of records/both/{split} hold "
            f"{words.total()} pieces that the tokenizer does not know, most often "
        )
        (line,) = [line for line in told if line.startswith(start)]
        named = line.removeprefix(start).split()
        assert sorted(named) == sorted(words)
        assert [words[word] for word in named] == sorted(words.values(), reverse=True)
