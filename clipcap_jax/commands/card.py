"""The model card of a captioner on the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from clipcap_jax import hub
from clipcap_jax.commands.info import made_of

_TASK = "image-to-text"


def make_card(name: str, found: dict[str, Any], scores: Mapping[str, Any], license: str | None) -> str:
    """A README.md, with the metadata that the hub reads at its top.

    Args:
      name: the repository, "user/name".
      found: what `info.describe` says of the checkpoint.
      scores: of its evaluations, as `info.evaluations` gives them.
      license: its short name on the hub; None: not given.
    """
    tables = [_table(content) for content in scores.values()]
    loader = jinja2.PackageLoader("clipcap_jax")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True)
    step, total = found["step"], found["total_steps"]
    return environment.get_template("card.md").render(
        metadata=_metadata(name, found, tables, license),
        name=name,
        title=name.partition("/")[2],
        reads_pictures=found["config"]["model"]["clip"] is not None,
        embedding_width=found["embedding_width"],
        encoder=found["encoder"],
        made_of=made_of(found),
        checkpoint=f"step {step:,} of {total:,}" if total else "weights that were not trained here",
        tables=tables,
        max_tokens=found["config"]["evaluate"]["decode"]["max_tokens"],
        license=license,
    )


def _table(content: Mapping[str, Any]) -> dict[str, Any]:
    details, intervals = content.get("details", {}), content.get("intervals", {})
    data, _, split = details.get("data set", "a data set that is not named").rpartition("/")
    lines = [
        (metric, f"{value:.4f}", " to ".join(f"{end:.4f}" for end in intervals.get(metric, ()) if end is not None))
        for metric, value in content["scores"].items()
        if value is not None
    ]
    return {"data": data, "split": split, "lines": lines} | {
        name: details.get(name, "") for name in ("decoding", "words")
    }


def _metadata(name: str, found: dict[str, Any], tables: list[dict[str, Any]], license: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type=_TASK,
            dataset_type=table["data"],
            dataset_name=table["data"],
            dataset_split=table["split"],
            metric_type=metric.lower(),
            metric_name=metric,
            metric_config=table["decoding"] or None,  # there may be several evaluations of a split
            metric_value=float(value),
        )
        for table in tables
        for metric, value, interval in table["lines"]
        if interval  # a loss is no score
    ]
    sources = found["config"]["train"]["pretrained"].values()
    data = ModelCardData(
        license=license,
        library_name="clipcap_jax",
        pipeline_tag=_TASK,
        tags=["image-captioning", "clipcap", "jax"],
        base_model=[source.partition("@")[0] for source in sources if _is_on_hub(source)] or None,
        model_name=name.partition("/")[2] if results else None,  # it is of the results alone
        eval_results=results or None,
    )
    return data.to_yaml()


def _is_on_hub(source: str) -> bool:
    return (hub.is_name(source) or source.startswith("gpt2")) and not Path(source).exists()
