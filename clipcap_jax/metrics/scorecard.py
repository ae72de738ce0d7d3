"""All that is said about a set of captions: tables for the screen, for Markdown and for a page, and JSON."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from clipcap_jax import files
from clipcap_jax.metrics import significance
from clipcap_jax.metrics.paper import OVERALL, ROWS
from clipcap_jax.metrics.references import Scores
from clipcap_jax.metrics.significance import Difference, Interval
from clipcap_jax.metrics.words import name_of


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table; `aside` if it holds no score of these captions, but something to read beside one."""

    label: str
    cells: tuple[str, ...]
    aside: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns, the one of the labels first, and lines with a cell for each of the others."""

    header: tuple[str, ...]
    lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True)
class Scorecard:
    """Scores and what is needed to judge them.

    Attributes:
      scores: of all captions.
      domains: of each domain's captions alone, by domain.
      health: as `health.health` gives it.
      details: what else to know, such as the data set and the checkpoint, by name; what was counted as words is added.
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

    def tables(self) -> list[Table]:
        """The scores, with the paper's below them, and, where there is a baseline, what is gained over it."""
        tables = [Table(("metric", "score", "95% interval", *self.domains), tuple(self._score_lines()))]
        if self.baseline:
            tables.append(Table(("metric", "baseline", "gain", "95% interval", "p"), tuple(self._gain_lines())))
        return tables

    def _score_lines(self) -> Iterator[Line]:
        domains = {name: scores.overall for name, scores in self.domains.items()}
        for metric, score in self.scores.overall.items():
            interval = self.intervals[metric]
            parts = [_number(scores[metric]) for scores in domains.values()]
            yield Line(metric, (_number(score), f"{_number(interval.low)}-{_number(interval.high)}", *parts))
            for row, printed in ROWS.get(self.paper, {}).items():
                if any(metric in scores for scores in printed.values()):
                    whole, *parts = (_number(printed.get(name, {}).get(metric)) for name in (OVERALL, *domains))
                    yield Line(f"  paper: {row}", (whole, "", *parts), aside=True)

    def _gain_lines(self) -> Iterator[Line]:
        assert self.baseline
        for metric, found in self.differences.items():
            before, interval = self.baseline.measures[metric].overall, found.interval
            cells = (
                _number(before),
                f"{found.value:+.4f}",
                f"{interval.low:+.4f} {interval.high:+.4f}",
                f"{found.p:.3f}",
            )
            yield Line(metric, cells)

    @property
    def _not_computed(self) -> dict[str, str]:
        missing = dict(self.scores.not_computed)
        if self.baseline:
            for name, reason in self.baseline.not_computed.items():
                if missing.get(name) != reason:
                    missing[f"{name} of the baseline"] = reason
        return missing

    @property
    def notes(self) -> list[str]:
        """What to know before the scores are believed."""
        known = self.scores.notes
        parts = [
            f"Of {name}: {note}" for name, part in self.domains.items() for note in part.notes if note not in known
        ]
        return [*known, *parts]

    @property
    def _details(self) -> dict[str, str]:
        return {**self.details, "words": name_of(self.scores.words)}

    def facts(self) -> dict[str, str]:
        """Everything that is no score, by name; of a score that was not computed, why."""
        losses = {name: f"{loss:.4f} nats per token" for name, loss in self.losses.items()}
        health = {
            name: f"{value:,}" if isinstance(value, int) else f"{value:.2f}" for name, value in self.health.items()
        }
        domains = {name: f"{len(scores.images):,} pictures" for name, scores in self.domains.items()}
        reasons = {name: f"not computed: {reason}" for name, reason in self._not_computed.items()}
        notes = {"note": " ".join(self.notes)} if self.notes else {}
        return {**notes, **self._details, **health, **domains, **losses, **reasons}

    def to_json(self) -> str:
        """All numbers at full precision, under pycocoevalcap's names; null where one is not finite."""
        content: dict[str, Any] = {
            "scores": {**self.scores.overall, **self.losses},
            "not_computed": self._not_computed,
            "intervals": {name: [interval.low, interval.high] for name, interval in self.intervals.items()},
            "domains": {
                name: {"pictures": len(scores.images), "scores": scores.overall}
                for name, scores in self.domains.items()
            },
            "health": dict(self.health),
            "details": self._details,
            "notes": self.notes,
        }
        if self.baseline:
            content["baseline"] = self.baseline.overall
            content["differences"] = {name: dataclasses.asdict(found) for name, found in self.differences.items()}
        return files.to_json(content, indent=2)

    def to_markdown(self, title: str) -> str:
        """The tables and the facts."""
        facts = "\n".join(f"- {name}: {value}" for name, value in self.facts().items())
        return "\n\n".join([f"# {title}", *map(_markdown, self.tables()), facts]) + "\n"


def _markdown(table: Table) -> str:
    rows = [table.header, ("---", *["---:"] * (len(table.header) - 1))]
    rows += [(line.label.strip(), *line.cells) for line in table.lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
