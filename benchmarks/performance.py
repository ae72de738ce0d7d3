"""Fill the tables of docs/performance.md from what `device.py`, `jobs.py`, `tpu_compile.py` and `scaling.py` printed.

    python benchmarks/performance.py

Reads benchmarks/results/*.jsonl: a file for each machine, in which a later line of a case replaces an earlier one,
which then is history; a line is of the commit that the line "device" before it names. What stands between
`<!-- tables: NAME -->` and `<!-- end -->` in the page is replaced: NAME is "devices", "scaling" or "tpu".
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Lines = Mapping[str, Line]

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
NOT_MEASURED = "not measured"
LAYOUTS = ("data", "fsdp")
COMPILERS = {"cpu": "CPUs", "tpu": "TPU v5e"}
JOBS = {
    "caption": "`clipcap caption`, photos, beams of 5",
    "embed": "`clipcap embed`, photos, ViT-B/32",
    "train": "`clipcap train`, MLP mapper and GPT-2, batch 40",
}
VARIANTS = {"mlp": "MLP mapper and GPT-2", "transformer": "transformer mapper, GPT-2 frozen"}
FORMS = {kind: f"{name}, batch 256" for kind, name in VARIANTS.items()} | {
    "search": "a search for 128",
    "tower": "ViT-B/32, 256 pictures",
}


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(), RESULTS))


def filled(page: str, results: Path) -> str:
    """The page with its tables made anew."""
    machines = [read(path) for path in sorted(results.glob("*.jsonl"))]
    tables = {
        "devices": "\n".join(
            line for lines in machines if "product" in lines.get("device", {}) for line in machine(lines)
        ),
        "scaling": "\n".join(line for lines in machines for line in scaling(lines)),
        "tpu": "\n".join(line for lines in machines for line in chips(lines)),
    }
    for name, table in tables.items():
        place = re.compile(rf"(?<=<!-- tables: {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        page, count = place.subn(functools.partial(_text, f"{table}\n"), page)
        if count != 1:
            raise ValueError(f"{PAGE} has {count} places for the tables {name!r}: one is needed")
    return page


def _text(text: str, _: re.Match[str]) -> str:
    """A replacement that is taken as it is, backslashes too."""
    return text


def read(path: Path) -> dict[str, Line]:
    """The last line of each case, or topology and program, with its `commit` and the lines `before`."""
    found: dict[str, Line] = {}
    commit = None
    for line in map(json.loads, path.read_text().splitlines()):
        name = line.get("case") or " ".join((line["topology"], line["program"]))
        commit = line["commit"] if name == "device" and "commit" in line else commit
        before = [*found[name]["before"], found[name]] if name in found else []
        found[name] = {**line, "commit": commit, "before": before}
    return found


def table(header: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Markdown; the columns' names are parted by bars. Nothing, if there are no rows."""
    names, found = header.split("|"), list(rows)
    if found:
        yield ""
        for row in (names, ["---"] * len(names), *found):
            yield "| " + " | ".join(row) + " |"


def machine(lines: Lines) -> Iterator[str]:
    """The section of one machine."""
    about = lines["device"]
    versions = about["versions"]
    driver = f", driver {about['driver']}" if about["driver"] else ""
    yield f"### {about['device']}, {about['date']}"
    yield ""
    commits = dict.fromkeys(line["commit"] for line in (*about["before"], about))
    yield (
        f"Commit {', then '.join(commits)}; {about['cores']} CPU cores{driver}, "
        f"Python {about['python']}, "
        + ", ".join(f"{name} {versions[name]}" for name in ("jax", "flax", "torch", "transformers") if name in versions)
        + f". In {about['dtype']}, a large product runs at {about['product'] / 1e12:.3g} TFLOP/s; a copy moves "
        f"{about['copy'] / 1e9:.0f} GB/s."
    )
    yield from table(
        "training, pairs/s|batch|ours|of the floor|PyTorch, as the original|ratio|PyTorch, compiled|ratio|"
        "ours: compile|ours: memory",
        (
            training_row(lines, kind, batch)
            for kind in VARIANTS
            for batch in (40, 256, 1024)
            if f"training/{kind}/{batch}/ours" in lines
        ),
    )
    yield from table(
        "captioning, captions/s|ours|of the floor|the original, one at a time|ratio|transformers' generate|ratio|"
        "ours: compile|ours: memory",
        (captioning_row(lines, count) for count in (1, 32, 128, 512) if f"captioning/{count}/ours" in lines),
    )
    yield from table(
        "pixels to embeddings, pictures/s|ours|of the floor|PyTorch|ratio|ours: compile",
        (tower_row(lines, tower) for tower in ("ViT-B-32", "RN50x4") if f"towers/{tower}/ours" in lines),
    )
    yield from table("another form|at commit|ms|times as fast", variant_rows(lines))
    yield from table("captions padded to, MLP mapper and GPT-2, batch 256|pairs/s|of the floor", length_rows(lines))
    yield from table(
        "difference from the original's own outputs|logits|loss|gradients|beams that are the same", parity_rows(lines)
    )
    yield from table(
        "whole jobs|a second|fewest and most|decoding alone|the program alone|of the slower", job_rows(lines)
    )
    yield from history(lines, list(dict.fromkeys(commits)))
    yield ""
    yield from starts(lines)
    yield from repeated(lines)
    yield ""


def number(value: float) -> str:
    """With three digits that count, and thousands apart."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rate(line: Line) -> str:
    return number(line["rate"]) if "rate" in line else line.get("error", NOT_MEASURED)


def rate_now(lines: Lines, ours: Line) -> str:
    """With the commit, if it is an earlier one."""
    earlier = ours and ours["commit"] != lines["device"]["commit"]
    return rate(ours) + (f" at {ours['commit']}" if earlier else "")


def share(line: Line) -> str:
    return f"{line['share']:.0%}" if "share" in line else NOT_MEASURED


def ratio(ours: Line, theirs: Line) -> str:
    return f"{ours['rate'] / theirs['rate']:.2f}" if "rate" in ours and "rate" in theirs else NOT_MEASURED


def compile_time(line: Line) -> str:
    return f"{line['compile']:.0f} s" if "compile" in line else NOT_MEASURED


def memory(line: Line) -> str:
    return f"{line['peak'] / 1e9:.1f} GB" if line.get("peak") else NOT_MEASURED


def training_row(lines: Lines, kind: str, batch: int) -> list[str]:
    ours, original, compiled = (
        lines.get(f"training/{kind}/{batch}/{way}", {}) for way in ("ours", "original", "compiled")
    )
    row = [VARIANTS[kind], str(batch), rate_now(lines, ours), share(ours)]
    row += [rate(original), ratio(ours, original), rate(compiled), ratio(ours, compiled)]
    return [*row, compile_time(ours), memory(ours)]


def captioning_row(lines: Lines, count: int) -> list[str]:
    ours, generate = (lines.get(f"captioning/{count}/{way}", {}) for way in ("ours", "generate"))
    original = lines.get("captioning/1/original", {})
    row = [f"{count} at once", rate_now(lines, ours), share(ours), rate(original), ratio(ours, original)]
    return [*row, rate(generate), ratio(ours, generate), compile_time(ours), memory(ours)]


def tower_row(lines: Lines, tower: str) -> list[str]:
    ours, theirs = (lines.get(f"towers/{tower}/{way}", {}) for way in ("ours", "torch"))
    return [
        tower.replace("-32", "/32"),
        rate_now(lines, ours),
        share(ours),
        rate(theirs),
        ratio(ours, theirs),
        compile_time(ours),
    ]


def length_rows(lines: Lines) -> Iterator[list[str]]:
    for tokens in (12, 16, 20, 48, 64):
        if line := lines.get(f"lengths/mlp/{tokens}"):
            yield [f"{tokens} tokens", rate(line), share(line)]


def variant_rows(lines: Lines) -> Iterator[list[str]]:
    for name, line in lines.items():
        if not name.startswith("variants/"):
            continue
        _, kind, form = name.split("/", 2)
        base = lines.get(f"variants/{kind}/as it is", {})
        time = f"{1e3 * line['seconds']:.2f}" if "seconds" in line else line["error"]
        yield [f"{FORMS[kind]}: {form}", line["commit"], time, ratio(line, base)]


def parity_rows(lines: Lines) -> Iterator[list[str]]:
    for dtype in ("float32", "bfloat16"):
        for kind in VARIANTS:
            if line := lines.get(f"parity/{kind}/{dtype}"):
                found = [
                    f"{line[name]:.1e}" if name in line else line["error"] for name in ("logits", "loss", "gradients")
                ]
                yield [f"{VARIANTS[kind]}, {dtype}", *found, line.get("beams", NOT_MEASURED)]


def job_rows(lines: Lines) -> Iterator[list[str]]:
    """What `jobs.py` says of processes beside their parts."""
    for name, what in JOBS.items():
        if name in lines:
            line, parts = lines[name], dict(lines[name]["parts"])
            decoding = number(parts.pop("decoding")) if "decoding" in parts else ""
            spread = " to ".join(map(number, line["spread"]))
            yield [what, number(line["rate"]), spread, decoding, *map(number, parts.values()), share(line)]


def starts(lines: Lines) -> Iterator[str]:
    if "start/first" in lines:
        first, second = (f"{lines[f'start/{name}']['seconds']:.1f} s" for name in ("first", "second"))
        yield f"`clipcap caption` of one photo, ViT-B/32 and GPT-2, took {first}, and {second} with its programs kept."
    if line := lines.get("start/demo"):
        least, most = (f"{seconds:.1f}" for seconds in line["spread"])
        yield f"The first step of the demo, of the config `shapes` from nothing, came after {least} to {most} s."


def history(lines: Lines, commits: Sequence[str]) -> Iterator[str]:
    """What was measured at several commits."""
    rows = []
    for name, line in lines.items():
        rates = {of["commit"]: of["rate"] for of in (*line["before"], line) if "rate" in of}
        if len(rates) > 1 and name.endswith("/ours"):
            first, *_, last = rates.values()
            shown = (number(rates[commit]) if commit in rates else "" for commit in commits)
            rows.append([name.removesuffix("/ours"), *shown, f"{last / first:.2f}"])
    yield from table("|".join(["ours, a second, at commit", *commits, "times as fast"]), rows)


def repeated(lines: Lines) -> Iterator[str]:
    if same := lines.get("captioning/same"):
        found = f"{same['same']} of {same['of']}" if "same" in same else same["error"]
        yield f"Captions in float32 that are the original's, token by token: {found}."
    for name, how in (("", "Three steps"), ("/deterministic", "With `--xla_gpu_deterministic_ops`, three steps")):
        if "losses_equal" in (line := lines.get(f"parity/repeated{name}", {})):
            bits = "the same bits" if line["losses_equal"] and not line["parameters_differing"] else "other bits"
            yield f"{how} from one state, taken twice, gave {bits}."


def scaling(lines: Lines) -> Iterator[str]:
    """Steps over several devices; what these exchange, and what each of them holds."""
    steps = {name: line for name, line in lines.items() if name.startswith("steps/")}
    runs = list(dict.fromkeys(name.split("/")[2] for name in steps))
    for unit, of in (("ms a step", "seconds"), ("core-ms a step", "busy")):
        yield from table(
            "|".join([f"{unit}: processes x devices of each", *runs]),
            ([layout, *(milliseconds(steps.get(f"steps/{layout}/{run}"), of) for run in runs)] for layout in LAYOUTS)
            if runs
            else (),
        )
    yield from table(
        "compiled for|layout|devices|a device sends|at least|ratio|largest array of an exchange",
        (bytes_row(name, line) for name, line in lines.items() if name.startswith("bytes/")),
    )
    memories = [(name.split("/")[1:], line) for name, line in lines.items() if name.startswith("memory/")]
    counts = sorted({int(case[3]) for case, _ in memories})
    rows: dict[tuple[str, ...], dict[int, str]] = {}
    for (compiler, model, layout, count), line in memories:
        rows.setdefault((COMPILERS[compiler], model, layout), {})[int(count)] = fitting(line)
    yield from table(
        "|".join(["compiled for", "model", "layout", *(f"{count} device{'s' * (count > 1)}" for count in counts)]),
        ([*case, *(found.get(count, NOT_MEASURED) for count in counts)] for case, found in rows.items()),
    )


def milliseconds(line: Line | None, of: str) -> str:
    return number(1e3 * line[of]) if line else NOT_MEASURED


def bytes_row(name: str, line: Line) -> list[str]:
    _, compiler, layout, count = name.split("/")
    largest = max((found["largest"] for found in line["collectives"]), key=lambda array: array["bytes"])
    sent, least = (f"{line[key] / 1e6:,.0f} MB" for key in ("sent", "least"))
    row = [COMPILERS[compiler], layout, count, sent, least, f"{line['sent'] / line['least']:.2f}"]
    return [*row, f"{largest['of']}, {largest['bytes'] / 1e6:,.0f} MB"]


def fitting(line: Line) -> str:
    """GiB of a device."""
    return (
        f"{held(line['memory']) / 2**30:.2f} GiB" if line["fits"] else f"does not fit: {line['needed'] / 2**30:.3g} GiB"
    )


def chips(lines: Lines) -> Iterator[str]:
    """A table of what the compiler says of each program on each topology."""
    yield from table(
        "topology|program|rows a chip|compile|memory a chip|collectives|FLOPs with an operand in float32|"
        "copies in loops, over 1 MB each",
        (chip_row(line) for line in lines.values() if "topology" in line),
    )


def held(used: Line) -> int:
    """Bytes of a device. What JAX calls the peak leaves some out: it can be less than the temporaries alone."""
    total: int = used["arguments"] + used["outputs"] + used["temporaries"] - used["aliased"]
    return total


def chip_row(line: Line) -> list[str]:
    hosts = f", {line['hosts']} hosts" if line.get("hosts", 1) > 1 else ""
    start = [
        line["topology"] + hosts,
        f"{line['program']}, {line.get('dtype', '')}".rstrip(", "),
        str(line.get("rows", "")),
    ]
    if "error" in line:
        return [*start, "", line["error"].splitlines()[0][:160], "", "", ""]
    compiled = f"{line['compile']:.0f} s" if "compile" in line else ""
    available = f"{line['available'] / 2**30:.4g} GiB"
    if not line["fits"]:
        return [*start, compiled, f"does not fit: {line['needed'] / 2**30:.3g} of {available}", "", "", ""]
    collectives = "; ".join(
        f"{found['count']} {found['kind']}, {found['bytes'] / 1e6:.0f} MB, {found['runs']}" + largest_array(found)
        for found in line["collectives"]
    )
    float32 = line["float32"]["flops"] / max(1, line["products"]["flops"])
    copies = (
        f"{line['copies']['bytes'] / 1e6:,.0f} MB in {line['copies']['count']}" if line["copies"]["count"] else "none"
    )
    memory = f"{held(line['memory']) / 2**30:.2f} of {available}"
    return [*start, compiled, memory, collectives or "none", f"{float32:.1%}", copies]


def largest_array(found: Line) -> str:
    return f", at most {found['largest']['of']} at once" if "largest" in found else ""


if __name__ == "__main__":
    main()
