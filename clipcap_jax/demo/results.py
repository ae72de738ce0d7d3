"""What the page shows of a picture: captions and how likely they are, or what is wrong."""

import collections
import html
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipcap_jax.captioning.captioner import Caption, Captioner
from clipcap_jax.errors import UserError

EMPTY = "<p>Captions appear here as soon as there is a picture.</p>"


def answer(captioners: Mapping[str, Captioner], picture: Path | None, asked: Mapping[str, Any]) -> str:
    """The captions of each captioner under its name, as HTML; or the message of the error in their place.

    Args:
      captioners: by what the page calls them.
      picture: its file; None: there is none.
      asked: arguments of `Captioner.caption`.
    """
    if picture is None:
        return EMPTY
    parts = []
    for name, captioner in captioners.items():
        try:
            shown = _table(captioner, _captions(captioner, picture, asked), asked)
        except UserError as error:
            shown = alert(str(error))
        parts.append(f"<section><h2>{_escape(name)}</h2>{shown}</section>")
    return f'<div class="clipcap-results">{"".join(parts)}</div>'


def alert(message: str) -> str:
    """A message that screen readers say at once."""
    return f'<p class="clipcap-alert" role="alert">{_escape(message)}</p>'


def _captions(captioner: Captioner, picture: Path, asked: Mapping[str, Any]) -> list[Caption]:
    found = captioner.caption(picture, errors="return", **asked)  # an error that is raised names the file
    if isinstance(found, UserError):
        raise found
    return found


def _table(captioner: Captioner, found: list[Caption], asked: Mapping[str, Any]) -> str:
    times = collections.Counter(caption.text for caption in found)  # the same may be drawn again
    captions = list({caption.text: caption for caption in found}.values())
    penalty = asked.get("length_penalty", captioner.decode.length_penalty)
    rows = zip(captions, shares([log_prob(captioner, caption, penalty) for caption in captions]), strict=True)
    body = "".join(
        f"<tr><td>{_escape(caption.text)}{_notes(caption, times[caption.text])}</td><td>{share:.1%}</td>"
        f"<td>{caption.score:.3f}</td></tr>"
        for caption, share in rows
    )
    head = '<th scope="col">Caption</th><th scope="col">Probability</th><th scope="col">Score</th>'
    note = "<small>Probabilities are among these alone.</small>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


def _notes(caption: Caption, times: int) -> str:
    notes = [f"{times} times"] * (times > 1) + ["cut by the length limit"] * (not caption.finished)
    return f" <small>({', '.join(notes)})</small>" if notes else ""


def log_prob(captioner: Captioner, caption: Caption, length_penalty: float) -> float:
    """Of the whole caption, in nats: what its score was made of, with as many tokens as its text takes."""
    tokenizer = captioner.metadata.tokenizer
    ended = caption.finished and tokenizer.stop_id(captioner.decode.stop) == tokenizer.end_id
    tokens = len(tokenizer.encode([caption.text])[0]) + ended
    return float(caption.score * max(tokens, 1) ** length_penalty)


def shares(log_probs: list[float]) -> list[float]:
    """Probabilities that sum to 1."""
    likelihoods = [math.exp(value - max(log_probs)) for value in log_probs]
    return [likelihood / sum(likelihoods) for likelihood in likelihoods]


def _escape(text: str) -> str:
    """For HTML; braces too, which Gradio takes for its own."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;")
