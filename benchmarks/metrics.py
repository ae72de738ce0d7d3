"""BLEU, ROUGE-L and CIDEr: clipcap_jax against pycocoevalcap with its Java tokenizer, in one run.

    python benchmarks/metrics.py CAPTIONS.json REFERENCES.json

CAPTIONS is a COCO results file, REFERENCES a COCO captions file. Needs Java and `pip install clipcap_jax[java]`.
Last, it times what a validation of 1,000 captions costs during training, where the references are read once.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from clipcap_jax.metrics import References

VALIDATION_IMAGES = 1_000


def score_with_ours(captions: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    return References(references).score(captions).overall


def score_with_pycocoevalcap(captions: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    tokenizer = PTBTokenizer()
    gts = tokenizer.tokenize({image: [{"caption": text} for text in texts] for image, texts in references.items()})
    res = tokenizer.tokenize({image: [{"caption": captions[image]}] for image in references})
    bleu, _ = Bleu(4).compute_score(gts, res, verbose=0)
    rouge, _ = Rouge().compute_score(gts, res)
    cider, _ = Cider().compute_score(gts, res)
    return {f"Bleu_{order}": score for order, score in enumerate(bleu, start=1)} | {"ROUGE_L": rouge, "CIDEr": cider}


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The best of a few runs: what others on the machine cost is not ours to measure."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("references", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    captions = {str(entry["image_id"]): entry["caption"] for entry in json.loads(arguments.captions.read_text())}
    references = defaultdict(list)
    for entry in json.loads(arguments.references.read_text())["annotations"]:
        references[str(entry["image_id"])].append(entry["caption"])

    expected = score_with_pycocoevalcap(captions, references)
    for name, score in score_with_ours(captions, references).items():
        print(f"{name:8} {score:.16f}  differs from pycocoevalcap's by {abs(score - expected[name]):.0e}")
    ours = seconds(lambda: score_with_ours(captions, references), arguments.repeats)
    theirs = seconds(lambda: score_with_pycocoevalcap(captions, references), arguments.repeats)
    print(f"{len(captions)} captions, {sum(map(len, references.values()))} references, best of {arguments.repeats}:")
    print(f"clipcap_jax {ours:.2f} s, pycocoevalcap {theirs:.2f} s, ratio {theirs / ours:.1f}")

    some = dict(list(references.items())[:VALIDATION_IMAGES])
    prepared = References(some)
    validation = seconds(lambda: prepared.score({image: captions[image] for image in some}), arguments.repeats)
    print(f"one validation of {len(some)} captions: {validation * 1000:.0f} ms")


if __name__ == "__main__":
    main()
