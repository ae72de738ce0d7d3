from clipcap_jax.metrics.paper import ROWS, rows_for

# Table 1 of arXiv 2111.09734, its lines and its columns in its order, in percent.
COCO = ("Bleu_4", "METEOR", "CIDEr", "SPICE")
NOCAPS = ("in-domain", "near-domain", "out-domain", "")
CONCEPTUAL = ("ROUGE_L", "CIDEr", "SPICE")
TABLE = {
    "MLP + GPT-2": {
        "coco": (32.15, 27.1, 108.35, 20.12),
        "nocaps CIDEr": (79.73, 67.69, 49.35, 65.7),
        "nocaps SPICE": (12.2, 11.26, 9.7, 11.1),
        "conceptual": (26.71, 87.26, 18.5),
    },
    "transformer": {
        "coco": (33.53, 27.45, 113.08, 21.05),
        "nocaps CIDEr": (84.85, 66.82, 49.14, 65.83),
        "nocaps SPICE": (12.14, 10.92, 9.57, 10.86),
        "conceptual": (25.12, 71.82, 16.07),
    },
}


def test_the_papers_numbers() -> None:
    assert {name for rows in ROWS.values() for name in rows} == TABLE.keys()
    for name, table in TABLE.items():
        coco, nocaps, conceptual = (ROWS[data][name] for data in ("coco", "nocaps", "conceptual"))
        assert coco == {"": percent(COCO, table["coco"])}
        assert {domain: scores["CIDEr"] for domain, scores in nocaps.items()} == percent(NOCAPS, table["nocaps CIDEr"])
        assert {domain: scores["SPICE"] for domain, scores in nocaps.items()} == percent(NOCAPS, table["nocaps SPICE"])
        assert {key for scores in nocaps.values() for key in scores} == {"CIDEr", "SPICE"}
        assert conceptual == {"": percent(CONCEPTUAL, table["conceptual"])}


def percent(names: tuple[str, ...], values: tuple[float, ...]) -> dict[str, float]:
    return {name: round(value / 100, 6) for name, value in zip(names, values, strict=True)}


def test_which_splits_the_paper_has() -> None:
    assert {rows_for(split) for split in ("coco/test", "embeddings/coco/test", "cc3m/val", "nocaps/val")} == set(ROWS)
    assert rows_for("coco/test[:10]") == rows_for("coco/val") == rows_for("shapes/test") == ""
