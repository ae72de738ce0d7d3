import json
from pathlib import Path

import performance
import pytest

LINES = [
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
    {"case": "compiled/mlp/40", "error": "OutOfMemoryError: no room"},
]


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
    page = "before\n<!-- tables: devices -->\nold\n<!-- end -->\n<!-- tables: tpu -->\n<!-- end -->\nafter\n"
    filled = performance.filled(page, tmp_path)
    assert "| MLP mapper and GPT-2 | 40 | 4,524 | 21% |" in filled
    assert "old" not in filled
    assert filled.startswith("before\n")
    assert filled.endswith("\nafter\n")


def test_a_page_without_a_place_for_the_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 places"):
        performance.filled("nothing", tmp_path)
