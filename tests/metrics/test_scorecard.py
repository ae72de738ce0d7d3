import json

import pytest

from clipcap_jax.metrics import Scores
from clipcap_jax.metrics.measure import mean
from clipcap_jax.metrics.scorecard import Line, Scorecard

SCORES = Scores(("1", "2"), {"CIDEr": mean([0.25, 0.75]), "SPICE": mean([0.2, 0.2])}, {"METEOR": "no java | here"})
INSIDE = Scores(("2",), {"CIDEr": mean([0.75]), "SPICE": mean([0.2])}, {})


def scorecard(**changes: object) -> Scorecard:
    given = {
        "scores": SCORES,
        "domains": {"in-domain": INSIDE},
        "health": {"captions": 2, "words per caption": 7.5},
        "details": {"checkpoint": "step 7"},
        "paper": "nocaps",
        "losses": {"loss": 1.25},
    }
    return Scorecard(**{**given, **changes})  # type: ignore[arg-type]


def test_the_table_holds_the_papers_rows_beside_ours() -> None:
    [table] = scorecard().tables()
    assert table.header == ("metric", "score", "95% interval", "in-domain")
    assert list(table.lines) == [
        Line("CIDEr", ("0.5000", "0.2500-0.7500", "0.7500")),
        Line("  paper: MLP + GPT-2", ("0.6570", "", "0.7973"), aside=True),
        Line("  paper: transformer", ("0.6583", "", "0.8485"), aside=True),
        Line("SPICE", ("0.2000", "0.2000-0.2000", "0.2000")),
        Line("  paper: MLP + GPT-2", ("0.1110", "", "0.1220"), aside=True),
        Line("  paper: transformer", ("0.1086", "", "0.1214"), aside=True),
    ]


def test_json_holds_full_precision() -> None:
    content = json.loads(scorecard(scores=SCORES.add({"X": mean([1 / 3, 1 / 3])})).to_json())
    assert content["scores"] == {"CIDEr": 0.5, "SPICE": 0.2, "X": 1 / 3, "loss": 1.25}
    assert content["intervals"]["CIDEr"] == [0.25, 0.75]
    assert content["not_computed"] == {"METEOR": "no java | here"}
    assert content["domains"] == {"in-domain": {"pictures": 1, "scores": {"CIDEr": 0.75, "SPICE": 0.2}}}
    assert content["health"] == {"captions": 2, "words per caption": 7.5}
    assert content["details"] == {"checkpoint": "step 7", "words": "ptb"}
    assert "baseline" not in content


def test_markdown_is_one_table() -> None:
    text = scorecard(paper="").to_markdown("Captions")
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table == [
        "| metric | score | 95% interval | in-domain |",
        "| --- | ---: | ---: | ---: |",
        "| CIDEr | 0.5000 | 0.2500-0.7500 | 0.7500 |",
        "| SPICE | 0.2000 | 0.2000-0.2000 | 0.2000 |",
    ]
    for fact in (
        "- METEOR: not computed: no java | here",
        "- captions: 2",
        "- words per caption: 7.50",
        "- loss: 1.2500 nats per token",
        "- in-domain: 1 pictures",
    ):
        assert fact in text


def test_a_baseline_has_a_table_of_gains() -> None:
    baseline = Scores(("1", "2"), {"CIDEr": mean([0.15, 0.65])}, {"SPICE": "too late"})
    card = scorecard(paper="", domains={}, baseline=baseline)
    scores, gains = card.tables()
    assert scores.header == ("metric", "score", "95% interval")
    assert gains.header == ("metric", "baseline", "gain", "95% interval", "p")
    [line] = gains.lines  # the baseline has no SPICE
    assert line.cells[:3] == ("0.4000", "+0.1000", "+0.1000 +0.1000")
    assert float(line.cells[3]) == pytest.approx(0.5, abs=0.06)  # of four ways to change sides two are as far apart
    content = json.loads(card.to_json())
    assert content["differences"]["CIDEr"]["value"] == pytest.approx(0.1)
    assert content["not_computed"] == {"METEOR": "no java | here", "SPICE of the baseline": "too late"}
    assert card.facts()["SPICE of the baseline"] == "not computed: too late"


def test_what_is_not_finite_is_null_everywhere() -> None:
    nan = {"X": mean([float("nan"), 1.0])}
    card = scorecard(
        scores=SCORES.add(nan),
        domains={"in-domain": INSIDE.add({"X": mean([float("inf")])})},
        health={"words per caption": float("nan")},
        losses={"loss": float("-inf")},
        baseline=SCORES.add(nan),
    )
    content = json.loads(card.to_json(), parse_constant=pytest.fail)
    assert content["scores"]["X"] is content["scores"]["loss"] is content["domains"]["in-domain"]["scores"]["X"] is None
    assert content["intervals"]["X"] == [None, None]
    assert content["health"] == {"words per caption": None}
    assert content["baseline"]["X"] is content["differences"]["X"]["value"] is None
    assert content["baseline"]["CIDEr"] == 0.5
