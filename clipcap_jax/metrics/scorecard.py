"""All that is said about a set of captions, as one table for the screen, for Markdown, for a page and as JSON."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from clipcap_jax.metrics import significance
from clipcap_jax.metrics.paper import OVERALL, ROWS
from clipcap_jax.metrics.references import Scores
from clipcap_jax.metrics.significance import Difference, Interval


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table, with a cell a column or with one text alone.

    `aside` if it holds no score of these captions, but something to read beside one.
    """

    label: str
    cells: tuple[str, ...]
    aside: bool = False


@dataclasses.dataclass(frozen=True)
class Scorecard:
    """Scores and what is needed to judge them.

    Attributes:
      scores: of all captions.
      domains: of each domain's captions alone, by domain.
      health: as `health.health` gives it.
      details: what else to know, such as the data set and the checkpoint, by name.
      paper: the key of the rows of `paper.ROWS` to show beside the scores; "": none.
      losses: nats per token by name, where there is a model to ask.
      baseline: scores of other captions of the same images, to compare with.
    """

    scores: Scores
    domains: Mapping[str, Scores]
    health: Mapping[str, float]
    details: Mapping[str, str]
    paper: str = ""
    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    baseline: Scores | None = None

    @functools.cached_property
    def intervals(self) -> dict[str, Interval]:
        """Of the scores of all captions, 95%."""
        return significance.intervals(self.scores)

    @functools.cached_property
    def differences(self) -> dict[str, Difference]:
        """What these captions gain over the baseline's."""
        return significance.differences(self.baseline, self.scores) if self.baseline else {}

    @property
    def header(self) -> tuple[str, ...]:
        """The table's columns."""
        return (
            "metric",
            "score",
            "95% interval",
            *self.domains,
            *(("gain", "its interval", "p") if self.baseline else ()),
        )

    def lines(self) -> Iterator[Line]:
        """The table: a line for each score, the paper's below it, then what was not computed and why."""
        overall, domains = self.scores.overall, {name: scores.overall for name, scores in self.domains.items()}
        for metric, score in overall.items():
            interval = self.intervals[metric]
            cells = [_number(score), f"{_number(interval.low)}-{_number(interval.high)}"]
            cells += [_number(scores[metric]) if metric in scores else "" for scores in domains.values()]
            if difference := self.differences.get(metric):
                low, high = difference.interval.low, difference.interval.high
                cells += [f"{difference.value:+.4f}", f"{low:+.4f} {high:+.4f}", f"{difference.p:.3f}"]
            yield self._line(metric, cells)
            for row, printed in ROWS.get(self.paper, {}).items():
                if any(metric in scores for scores in printed.values()):
                    cells = [_number(printed.get(name, {}).get(metric)) for name in (OVERALL, *domains)]
                    yield self._line(f"  paper: {row}", [cells[0], "", *cells[1:]], aside=True)
        for metric, reason in self.scores.not_computed.items():
            yield Line(metric, (reason,), aside=True)

    def _line(self, label: str, cells: Sequence[str], *, aside: bool = False) -> Line:
        return Line(label, (*cells, *[""] * (len(self.header) - 1 - len(cells))), aside)

    def facts(self) -> dict[str, str]:
        """Everything that is no score, by name."""
        losses = {name: f"{loss:.4f} nats per token" for name, loss in self.losses.items()}
        health = {
            name: f"{value:,}" if isinstance(value, int) else f"{value:.2f}" for name, value in self.health.items()
        }
        domains = {name: f"{len(scores.images):,} pictures" for name, scores in self.domains.items()}
        return {**self.details, **health, **domains, **losses}

    def to_json(self) -> str:
        """All numbers at full precision, under pycocoevalcap's names."""
        content: dict[str, Any] = {
            "scores": {**self.scores.overall, **self.losses},
            "not_computed": self.scores.not_computed,
            "intervals": {name: [interval.low, interval.high] for name, interval in self.intervals.items()},
            "domains": {
                name: {"pictures": len(scores.images), "scores": scores.overall}
                for name, scores in self.domains.items()
            },
            "health": dict(self.health),
            "details": dict(self.details),
        }
        if self.baseline:
            content["baseline"] = self.baseline.overall
            content["differences"] = {name: dataclasses.asdict(found) for name, found in self.differences.items()}
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)

    def to_markdown(self, title: str) -> str:
        """The table and the facts."""
        rows = [self.header, ("---", *("---:" for _ in self.header[1:]))]
        for line in self.lines():
            rows.append((line.label.strip(), *line.cells, *[""] * (len(self.header) - 1 - len(line.cells))))
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts().items())
        return f"# {title}\n\n{table}\n\n{facts}\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
