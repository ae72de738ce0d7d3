"""The rows of ClipCap's own tables (arXiv 2111.09734, table 1), on the scale that pycocoevalcap has."""

_MLP, _TRANSFORMER = "MLP + GPT-2", "transformer"

OVERALL = ""  # where others have the name of a domain

# data set -> row -> domain -> scores
ROWS: dict[str, dict[str, dict[str, dict[str, float]]]] = {
    "coco": {
        _MLP: {OVERALL: {"Bleu_4": 0.3215, "METEOR": 0.271, "CIDEr": 1.0835, "SPICE": 0.2012}},
        _TRANSFORMER: {OVERALL: {"Bleu_4": 0.3353, "METEOR": 0.2745, "CIDEr": 1.1308, "SPICE": 0.2105}},
    },
    "nocaps": {
        _MLP: {
            "in-domain": {"CIDEr": 0.7973, "SPICE": 0.122},
            "near-domain": {"CIDEr": 0.6769, "SPICE": 0.1126},
            "out-domain": {"CIDEr": 0.4935, "SPICE": 0.097},
            OVERALL: {"CIDEr": 0.657, "SPICE": 0.111},
        },
        _TRANSFORMER: {
            "in-domain": {"CIDEr": 0.8485, "SPICE": 0.1214},
            "near-domain": {"CIDEr": 0.6682, "SPICE": 0.1092},
            "out-domain": {"CIDEr": 0.4914, "SPICE": 0.0957},
            OVERALL: {"CIDEr": 0.6583, "SPICE": 0.1086},
        },
    },
    "conceptual": {
        _MLP: {OVERALL: {"ROUGE_L": 0.2671, "CIDEr": 0.8726, "SPICE": 0.185}},
        _TRANSFORMER: {OVERALL: {"ROUGE_L": 0.2512, "CIDEr": 0.7182, "SPICE": 0.1607}},
    },
}

# What each was measured on: the splits of `clipcap prepare`.
_SPLITS = {"coco/test": "coco", "nocaps/val": "nocaps", "cc3m/val": "conceptual"}


def rows_for(split: str) -> str:
    """The key into `ROWS` of a whole split such as "coco/test", or of embeddings of it; "" where the paper has none."""
    return _SPLITS.get(split.removeprefix("embeddings/"), "")
