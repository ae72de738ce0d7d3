import json
import os
import subprocess
import sys
from pathlib import Path

import needs
import pytest
import tpu_compile

SCRIPT = Path(tpu_compile.__file__)


@pytest.mark.slow
@pytest.mark.skipif(needs.lacks("libtpu"), reason="needs libtpu, of the extra `tpu`")
def test_programs_are_compiled_for_tpus_that_are_not_there(tmp_path: Path) -> None:
    options = ["--tiny", "--topology", "v5e:2x2x1", "v5e:4x4x1", "--only", "training/mlp", "ViT/bfloat16"]
    options += ["--keep", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    output = subprocess.check_output([sys.executable, SCRIPT, *options], env=environment, text=True)

    training, embedding, divided = map(json.loads, output.splitlines())
    assert training["program"] == "training/mlp/tiny"
    assert (training["chips"], training["hosts"], training["chip"]) == (4, 1, "TPU v5 lite")
    assert training["partitions"] == 4
    assert training["fits"]
    assert training["memory"]["arguments"] > 12 * training["trained"]
    assert training["loops"] == [2, 2]
    assert training["products"]["flops"] == training["flops"]
    assert sum(collective["bytes"] for collective in training["collectives"]) == 4 * training["trained"] + 8
    assert embedding["products"]["flops"] == embedding["flops"]
    assert embedding["collectives"] == []
    # One program for the chips of all hosts.
    assert (divided["program"], divided["layout"]) == ("training/mlp/tiny/fsdp", "fsdp")
    assert (divided["chips"], divided["hosts"], divided["partitions"]) == (16, 4, 16)
    assert len(list(tmp_path.iterdir())) == 3


def test_over_16_chips_a_state_is_divided() -> None:
    names = [[name for name, _ in tpu_compile.cases(chips, tiny=True, first=chips == 4)] for chips in (4, 16, 256)]
    assert [["training/mlp/tiny" in of, "training/mlp/tiny/fsdp" in of] for of in names] == [
        [True, False],
        [False, True],
        [True, False],
    ]


def test_without_the_compiler_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(sys, "argv", ["tpu_compile.py"])
    with pytest.raises(SystemExit) as stopped:
        tpu_compile.main()

    assert stopped.value.code == 2
    assert 'pip install "clipcap_jax[tpu]"' in capsys.readouterr().err


def test_what_cannot_fit_is_not_compiled() -> None:
    program = tpu_compile.training("mlp", "tiny", rows=8)
    line = tpu_compile.attempt(program, devices=[], memory=10**6, file=None)

    assert not line["fits"]
    # Parameters, two moments and gradients, 4 bytes each, and a few numbers: steps, the key.
    assert 16 * line["trained"] <= line["needed"] <= 16 * line["trained"] + 64


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (37.25G) exceeds "
        "available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 37.25G of 15.75G hbm. Exceeded by 21.50G.",
    ],
)
def test_the_compiler_says_what_it_lacks(message: str) -> None:
    line = tpu_compile.out_of_memory(message)

    assert (line["needed"], line["available"]) == (37.25 * 2**30, 15.75 * 2**30)
