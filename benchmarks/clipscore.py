"""CLIPScore and RefCLIPScore with ViT-B/32: clipcap_jax against PyTorch, in one run.

    python benchmarks/clipscore.py --photos FOLDER --captions CAPTIONS.json --tokenizer FOLDER

CAPTIONS is a COCO captions file of the photos, whose first captions are scored against the others; the tokenizer is
CLIP's, in any form that `ClipTokenizer.load` reads. Needs `pip install clipcap_jax[torch]`. Both sides compute in
float32 with the same random weights of full size, and begin with encoded photos. PyTorch's is transformers'
`CLIPModel`: one picture, caption or reference at a time, and in batches, with photos decoded ahead by as many threads
as ours and the texts of a batch padded to the longest. Ours is timed once compiled; the first run, with compiling, is
printed too. On a machine that is busy with other work, OMP_WAIT_POLICY=PASSIVE keeps PyTorch's threads from waiting for
each other at the cost of all.
"""

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPConfig, CLIPModel

from clipcap_jax import pictures
from clipcap_jax.evaluation.clipscore import ClipScorer
from clipcap_jax.models.clip_vit import PIXEL_MEAN, PIXEL_STD
from clipcap_jax.text.clip_tokenizer import ClipTokenizer

Scores = tuple[np.ndarray, np.ndarray]


def random_clip() -> Any:
    """ViT-B/32, which is transformers' default, with noise on everything, so that embeddings differ."""
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig()).eval()
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape)
    return model


@torch.no_grad()
def score_with_torch(
    model: Any,
    tokenizer: ClipTokenizer,
    photos: list[bytes],
    captions: list[str],
    references: list[list[str]],
    batch_size: int,
    workers: int,
) -> Scores:
    def load(photo: bytes) -> np.ndarray:
        return pictures.preprocess(pictures.decode(photo), 224)

    def embed_pictures() -> torch.Tensor:
        loaded = pictures.load_ahead(load, photos, workers=workers, ahead=2 * batch_size)
        found = []
        for start in range(0, len(photos), batch_size):
            pixels = torch.from_numpy(np.stack([next(loaded) for _ in photos[start : start + batch_size]]))
            pixels = (pixels.float() / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
            found.append(model.get_image_features(pixel_values=pixels.permute(0, 3, 1, 2)).pooler_output)
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    def embed_texts(texts: list[str]) -> torch.Tensor:
        tokens = tokenizer.encode([f"A photo depicts {text}" for text in texts], 77)
        found = []
        for start in range(0, len(texts), batch_size):
            rows = [torch.tensor(ids) for ids in tokens[start : start + batch_size]]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=tokenizer.size - 1)
            found.append(model.get_text_features(input_ids=ids).pooler_output)
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    written = embed_texts(captions)
    score = (2.5 * (embed_pictures() * written).sum(1).clip(0)).numpy()
    embedded = torch.split(embed_texts([text for texts in references for text in texts]), list(map(len, references)))
    best = np.array([(of_picture @ one).max() for of_picture, one in zip(embedded, written, strict=True)])
    return score, 2 * score * best / (score + best)


def seconds(work: Callable[[], Scores]) -> tuple[float, Scores]:
    start = time.perf_counter()
    scores = work()
    return time.perf_counter() - start, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()

    stored = json.loads(arguments.captions.read_text())
    names = {image["id"]: image["file_name"] for image in stored["images"]}
    texts: dict[str, list[str]] = {name: [] for name in names.values()}
    for annotation in stored["annotations"]:
        texts[names[annotation["image_id"]]].append(annotation["caption"])
    texts = dict(list(texts.items())[: arguments.pictures])
    photos = [(arguments.photos / name).read_bytes() for name in texts]
    captions, references = [of_photo[0] for of_photo in texts.values()], [of_photo[1:] for of_photo in texts.values()]

    model, tokenizer = random_clip(), ClipTokenizer.load(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
        scorer = ClipScorer.load(folder, arguments.tokenizer)

    def ours() -> Scores:
        return scorer.score(
            list(texts),
            photos.__getitem__,
            captions,
            references,
            batch_size=arguments.batch_size,
            workers=arguments.workers,
        )

    def torch_in(batch_size: int) -> Callable[[], Scores]:
        return lambda: score_with_torch(model, tokenizer, photos, captions, references, batch_size, arguments.workers)

    first, scores = seconds(ours)
    ways = {
        "clipcap_jax": ours,
        "PyTorch, one at a time": torch_in(1),
        f"PyTorch, batches of {arguments.batch_size}": torch_in(arguments.batch_size),
    }
    best, difference = dict.fromkeys(ways, float("inf")), 0.0
    for _ in range(arguments.repeats):  # in turn, so that what others do on the machine falls on all alike
        for way, work in ways.items():
            taken, found = seconds(work)
            best[way] = min(best[way], taken)
            difference = max(difference, np.abs(np.subtract(found, scores)).max())
    print(f"{len(captions)} photos and captions, {sum(map(len, references))} references, best of {arguments.repeats};")
    print(f"CLIPScore {scores[0].mean():.4f}, RefCLIPScore {scores[1].mean():.4f}, differences up to {difference:.0e}")
    for way, taken in best.items():
        ratio = "" if way == "clipcap_jax" else f", {taken / best['clipcap_jax']:.2f} times our time"
        print(f"{way:26} {taken:7.2f} s {len(captions) / taken:7.2f} captions/s{ratio}")
    print(f"{'the first, with compiling':26} {first:7.2f} s")


if __name__ == "__main__":
    main()
