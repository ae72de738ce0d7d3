import json
from pathlib import Path

import performance
import pytest

LINES: list[performance.Line] = [
    {
        "case": "device",
        "device": "A card",
        "driver": None,
        "cores": 4,
        "date": "2026-11-27",
        "commit": "abc",
        "python": "3.12.3",
        "versions": {"jax": "0.11.2"},
        "dtype": "bfloat16",
        "product": 7e14,
        "copy": 4e12,
    },
    {"case": "training/mlp/40/ours", "rate": 1.0},
    {"case": "training/mlp/40/ours", "rate": 4524.2, "share": 0.214, "compile": 10.8, "peak": 3321505408},
    {"case": "training/mlp/40/original", "rate": 718.1},
    {"case": "training/mlp/40/compiled", "error": "OutOfMemoryError: no room"},
]

OTHERS = "<!-- tables: scaling -->\n\n<!-- end -->\n<!-- tables: tpu -->\n<!-- end -->\n"


def test_the_page_is_what_the_lines_say() -> None:
    page = performance.PAGE.read_text()
    assert performance.filled(page, performance.RESULTS) == page, "run: python benchmarks/performance.py"


def test_a_row(tmp_path: Path) -> None:
    (tmp_path / "card.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    lines = performance.read(tmp_path / "card.jsonl")
    assert performance.training_row(lines, "mlp", 40) == [
        *("MLP mapper and GPT-2", "40", "4,524", "21%", "718", "6.30", "OutOfMemoryError: no room", "not measured"),
        *("11 s", "3.3 GB"),
    ]
    assert set(performance.training_row(lines, "transformer", 256)[2:]) == {"not measured"}
    page = f"before\n<!-- tables: devices -->\nold\n<!-- end -->\n{OTHERS}after\n"
    filled = performance.filled(page, tmp_path)
    assert "| MLP mapper and GPT-2 | 40 | 4,524 | 21% |" in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")


def test_jobs() -> None:
    line: performance.Line = {
        "rate": 6.266,
        "spread": [4.525, 8.009],
        "parts": {"decoding": 427.8, "search": 8.247},
        "share": 0.7598,
    }
    trained: performance.Line = {"rate": 13.54, "spread": [13.2, 13.8], "parts": {"step": 14.53}, "share": 0.9319}
    lines: performance.Lines = {
        "caption": line,
        "train": trained,
        "start/first": {"seconds": 12.14},
        "start/second": {"seconds": 7.51},
        "start/demo": {"seconds": 14.3, "spread": [14.2, 14.5]},
    }
    caption, train = performance.job_rows(lines)
    assert caption[1:] == ["6.27", "4.53 to 8.01", "428", "8.25", "76%"]
    assert train[1:] == ["13.5", "13.2 to 13.8", "", "14.5", "93%"]
    one, demo = performance.starts(lines)
    assert "took 12.1 s, and 7.5 s with" in one
    assert "came after 14.2 to 14.5 s" in demo


def test_history(tmp_path: Path) -> None:
    """What an earlier commit reached is told beside the last, and what only it reached by its name."""
    later = {**LINES[0], "commit": "abc1234"}, {"case": "training/mlp/40/ours", "rate": 2 * 4524.256}
    (tmp_path / "card.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*LINES, *later)))
    page = performance.filled(f"<!-- tables: devices -->\nold\n<!-- end -->\n{OTHERS}", tmp_path)
    assert f"| ours, a second, at commit | {LINES[0]['commit']} | abc1234 | times as fast |" in page
    assert "| training/mlp/40 | 4,524 | 9,049 | 2.00 |" in page


def test_what_failed_makes_no_table(tmp_path: Path) -> None:
    page = f"<!-- tables: devices -->\nold\n<!-- end -->\n{OTHERS}"
    for case in ("start", "device"):
        (tmp_path / f"{case}.jsonl").write_text(json.dumps({"case": case, "error": "the process died"}))
    assert performance.filled(page, tmp_path).split() == page.replace("old", "").split()


CHIP = {"topology": "v5e:2x2x1", "program": "training/mlp/gpt2", "rows": 64, "dtype": "bfloat16", "available": 2**34}


def test_rows_of_chips() -> None:
    assert performance.chip_row({**CHIP, "error": "XlaRuntimeError: no\nmore"})[3:5] == ["", "XlaRuntimeError: no"]
    assert performance.chip_row({**CHIP, "hosts": 4, "error": "no"})[0] == "v5e:2x2x1, 4 hosts"
    assert performance.chip_row({**CHIP, "fits": False, "needed": 3 * 2**34})[4] == "does not fit: 48 of 16 GiB"
    assert performance.chip_row(
        {
            **CHIP,
            "fits": True,
            "compile": 65.4,
            "memory": {"arguments": 2**31, "outputs": 2**31, "temporaries": 2**32, "aliased": 2**31, "peak": 1},
            "collectives": [{"kind": "all-reduce", "runs": "synchronous", "count": 5, "bytes": 625600520}],
            "products": {"count": 9, "flops": 1000},
            "float32": {"count": 1, "flops": 158},
            "copies": {"count": 0, "bytes": 0},
        }
    )[3:] == ["65 s", "6.00 of 16 GiB", "5 all-reduce, 626 MB, synchronous", "15.8%", "none"]


def test_tables_of_scaling() -> None:
    exchange = {"kind": "all-gather", "largest": {"bytes": 154389504, "of": "f32[50257,768]"}}
    smaller = {"kind": "all-reduce", "largest": {"bytes": 4, "of": "f32[]"}}
    sizes = {"arguments": 2**31, "outputs": 2**31, "temporaries": 2**30, "aliased": 2**31, "peak": 1}
    lines: dict[str, performance.Line] = {
        "steps/data/1x1": {"seconds": 0.5, "busy": 0.9},
        "steps/data/2x2": {"seconds": 0.61234, "busy": 1.0},
        "steps/fsdp/2x2": {"seconds": 1.0, "busy": 2.0},
        "bytes/tpu/fsdp/4": {"sent": 12e8, "least": 8e8, "collectives": [exchange, smaller]},
        "memory/tpu/gpt2/fsdp/16": {"fits": True, "memory": sizes},
        "memory/tpu/gpt2/fsdp/4": {"fits": False, "needed": 2**35},
        "memory/cpu/gpt2/fsdp/4": {"fits": True, "memory": sizes},
    }
    rows = [line for line in performance.scaling(lines) if line and "---" not in line]
    assert rows == [
        "| ms a step: processes x devices of each | 1x1 | 2x2 |",
        "| data | 500 | 612 |",
        "| fsdp | not measured | 1,000 |",
        "| core-ms a step: processes x devices of each | 1x1 | 2x2 |",
        "| data | 900 | 1,000 |",
        "| fsdp | not measured | 2,000 |",
        "| compiled for | layout | devices | a device sends | at least | ratio | largest array of an exchange |",
        "| TPU v5e | fsdp | 4 | 1,200 MB | 800 MB | 1.50 | f32[50257,768], 154 MB |",
        "| compiled for | model | layout | 4 devices | 16 devices |",
        "| TPU v5e | gpt2 | fsdp | does not fit: 32 GiB | 3.00 GiB |",
        "| CPUs | gpt2 | fsdp | 3.00 GiB | not measured |",
    ]
    assert not list(performance.scaling({"device": {}}))


def test_a_page_without_a_place_for_the_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 places"):
        performance.filled("nothing", tmp_path)
