"""What `make docs` does not see of the documentation, and what stands in two places."""

import json
import re
from pathlib import Path

import clipcap_jax

ROOT = Path(__file__).parents[1]


def test_the_notebook_is_kept_without_outputs() -> None:
    """`make docs` runs it."""
    notebook = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 3
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [clipcap_jax.__version__]
