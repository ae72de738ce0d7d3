"""Each of the field's data sets, by the command: from its owners' files, with real captions, to what training reads."""

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tiny import Clipcap

from clipcap_jax.datasets import open_split
from clipcap_jax.inputs.batches import CaptionData


class Picture(NamedTuple):
    """A photo of COCO's, and what is said about it."""

    number: int
    image: bytes
    captions: list[str]


class Expected(NamedTuple):
    image: bytes
    captions: tuple[str, ...]
    domain: str = ""


Examples = dict[tuple[str, str], Expected]  # by split and image_id


@pytest.fixture(scope="session")
def pictures(shared: Path) -> list[Picture]:
    folder = shared / "data" / "coco_photos"
    content = json.loads((folder / "captions.json").read_text())
    captions: dict[int, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
    return [
        Picture(image["id"], (folder / "images" / image["file_name"]).read_bytes(), captions[image["id"]])
        for image in content["images"]
    ]


def tidied(captions: Sequence[str]) -> tuple[str, ...]:
    return tuple(" ".join(caption.split()) for caption in captions)


def write_images(folder: Path, images: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)


def coco_name(picture: Picture) -> str:
    return f"COCO_val2014_{picture.number:012}.jpg"


def coco_splits(shared: Path, pictures: Sequence[Picture]) -> dict[int, str]:
    """As Karpathy's lists have them; what is in none of them but in val2014 is his restval."""
    splits = {picture.number: "restval" for picture in pictures}
    for split in ("val", "test"):
        lines = (shared / "data" / "coco_captions" / f"karpathy_{split}_images.txt").read_text().splitlines()
        splits |= {number: split for line in lines if (number := int(line.split()[1])) in splits}
    assert set(splits.values()) == {"restval", "val", "test"}
    return splits


def coco_examples(splits: dict[int, str], pictures: Sequence[Picture]) -> Examples:
    return {
        (splits[picture.number].replace("restval", "train"), str(picture.number)): Expected(
            picture.image, tidied(picture.captions)
        )
        for picture in pictures
    }


def write_karpathy(folder: Path, shared: Path, pictures: Sequence[Picture]) -> Examples:
    splits = coco_splits(shared, pictures)
    images = [
        {
            "filepath": "val2014",
            "filename": coco_name(picture),
            "cocoid": picture.number,
            "split": splits[picture.number],
            "sentences": [{"raw": caption, "tokens": caption.split()} for caption in picture.captions],
        }
        for picture in pictures
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    write_images(folder / "val2014", {coco_name(picture): picture.image for picture in pictures})
    return coco_examples(splits, pictures)


def write_official_coco(folder: Path, shared: Path, pictures: Sequence[Picture]) -> Examples:
    splits = coco_splits(shared, pictures)
    for part, chosen in (("train2014", []), ("val2014", pictures)):
        content = {
            "images": [{"id": picture.number, "file_name": coco_name(picture)} for picture in chosen],
            "annotations": [
                {"image_id": picture.number, "id": i, "caption": caption}
                for picture in reversed(chosen)
                for i, caption in enumerate(picture.captions)
            ],
        }
        (folder / f"captions_{part}.json").write_text(json.dumps(content))
    for split in ("val", "test"):
        lines = [f"val2014/{coco_name(p)} {p.number}" for p in pictures if splits[p.number] == split]
        (folder / f"karpathy_{split}_images.txt").write_text("\n".join(lines))
    write_images(folder / "val2014", {coco_name(picture): picture.image for picture in pictures})
    return coco_examples(splits, pictures)


def write_flickr8k(folder: Path, shared: Path, _: Sequence[Picture]) -> Examples:
    lines = (shared / "data" / "flickr8k" / "captions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[::200]]
    with tarfile.open(shared / "data" / "flickr8k" / "images_128.tar") as tar:
        files = {Path(member.name).name: member for member in tar.getmembers()}
        images = {row["image"]: tar.extractfile(files[row["image"]]).read() for row in rows}  # type: ignore[union-attr]
    write_images(folder / "Flicker8k_Dataset", images)
    tokens = [f"{row['image']}#{i}\t{text}\n" for row in rows for i, text in enumerate(row["captions"])]
    (folder / "Flickr8k.token.txt").write_text("".join(sorted(tokens, key=lambda line: line.split("\t")[0][-1:])))
    for split, part in (("train", "train"), ("val", "dev"), ("test", "test")):
        names = [row["image"] for row in rows if row["split"] == split]
        (folder / f"Flickr_8k.{part}Images.txt").write_text("\n".join(names))
    return {
        (row["split"], Path(row["image"]).stem): Expected(images[row["image"]], tidied(row["captions"])) for row in rows
    }


def write_flickr30k(folder: Path, shared: Path, pictures: Sequence[Picture]) -> Examples:
    """Flickr30k's captions; the photos are COCO's."""
    examples, entries, images = {}, [], {}
    for split, photos in (("val", pictures[:20]), ("test", pictures[20:40])):
        path = shared / "data" / "flickr30k_captions" / f"flickr30k_karpathy_{split}_captions.json"
        for (name, captions), photo in zip(json.loads(path.read_text()).items(), photos, strict=False):
            sentences = [{"raw": caption} for caption in captions]
            entries.append({"filename": name, "split": split, "sentences": sentences})
            images[name] = photo.image
            examples[split, Path(name).stem] = Expected(photo.image, tidied(captions))
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": entries, "dataset": "flickr30k"}))
    write_images(folder / "flickr30k-images", images)
    return examples


def write_webdataset(folder: Path, _: Path, pictures: Sequence[Picture]) -> Examples:
    """Every third link is dead. Two shards of train and one of val, their samples in any order."""
    examples = {}
    for split, shard, rows in (
        ("train", 0, range(40)),
        ("train", 1, range(40, 80)),
        ("val", 0, range(80, 100)),
    ):
        (folder / split).mkdir(exist_ok=True)
        alive = [row for row in rows if row % 3]
        with tarfile.open(folder / split / f"{shard:05}.tar", "w") as tar:
            for row in reversed(alive):
                key, caption = f"{shard:05}{row:04}", pictures[row].captions[0]
                fields = {"url": f"http://example.com/{row}.jpg", "key": key, "status": "success"}
                for suffix, data in (
                    ("json", json.dumps(fields).encode()),
                    ("txt", caption.encode()),
                    ("jpg", pictures[row].image),
                ):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                examples[split, key] = Expected(pictures[row].image, tidied([caption]))
        counts = {"count": len(rows), "successes": len(alive), "failed_to_resize": 0}
        counts["failed_to_download"] = len(rows) - len(alive)
        (folder / split / f"{shard:05}_stats.json").write_text(json.dumps(counts))
    return examples


def write_list(folder: Path, _: Path, pictures: Sequence[Picture]) -> Examples:
    """The owners' list and a folder of pictures; every third link is dead."""
    rows = [f"http://example.com/{picture.number}.jpg\t{picture.captions[0].strip()}\n" for picture in pictures]
    (folder / "cc12m.tsv").write_text("".join(rows))
    alive = {f"{row:08}": picture for row, picture in enumerate(pictures) if row % 3}
    write_images(folder / "train", {f"{key}.jpg": picture.image for key, picture in alive.items()})
    return {("train", key): Expected(picture.image, tidied(picture.captions[:1])) for key, picture in alive.items()}


def write_nocaps(folder: Path, shared: Path, pictures: Sequence[Picture]) -> Examples:
    """nocaps' captions and domains; the photos are COCO's."""
    corpus = json.loads((shared / "data" / "nocaps" / "nocaps_val_corpus.json").read_text())[::50][: len(pictures)]
    names = json.loads((shared / "data" / "nocaps" / "nocaps_val_image_ids.json").read_text())
    files = {row["img_id"]: Path(row["image"]).stem for row in names}
    examples: Examples = {}
    images: list[dict[str, Any]] = []
    annotations = []
    for row, picture in zip(corpus, pictures, strict=False):
        number, domain = int(row["image_id"].removesuffix(".jpg")), row["split"].replace("_", "-")
        name = files[number]
        images.append({"id": number, "open_images_id": name, "file_name": f"{name}.jpg", "domain": domain})
        annotations += [{"image_id": number, "caption": caption} for caption in row["caption"]]
        write_images(folder / "val", {f"{name}.jpg": picture.image})
        examples["val", str(number)] = Expected(picture.image, tidied(row["caption"]), domain)
    assert {example.domain for example in examples.values()} == {"in-domain", "near-domain", "out-domain"}
    content = {"images": images, "annotations": annotations[::-1]}
    for example in examples:  # the captions of a picture come in the order of the file
        examples[example] = examples[example]._replace(captions=examples[example].captions[::-1])
    (folder / "nocaps_val_4500_captions.json").write_text(json.dumps(content))
    return examples


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("coco", write_karpathy),
        ("coco", write_official_coco),
        ("flickr8k", write_flickr8k),
        ("flickr30k", write_flickr30k),
        ("cc3m", write_webdataset),
        ("cc12m", write_list),
        ("nocaps", write_nocaps),
    ],
)
def test_every_field_of_every_example_comes_back(
    clipcap: Clipcap,
    shared: Path,
    pictures: list[Picture],
    name: str,
    write: Callable[[Path, Path, Sequence[Picture]], Examples],
    tmp_path: Path,
) -> None:
    folder, data_dir = tmp_path / "manual", tmp_path / "data"
    folder.mkdir()
    expected = write(folder, shared, pictures)
    options = ("--manual-dir", folder, "--data-dir", data_dir, "--max-skipped", 0, "--processes", 1)
    assert clipcap("prepare", name, *options) == 0
    found = {}
    for split in {split for split, _ in expected}:
        opened = open_split(name, split, str(data_dir))
        data = CaptionData(opened, 16)  # as training reads it
        assert len(data) == len(opened)
        for i, example in enumerate(opened):
            assert data.image_ids[i] == example.image_id
            assert data.captions[i] == example.captions
            assert data.image(i) == example.image
            # Of a tar, there is no file to show.
            place = Path(opened.root, example.image_path)
            assert example.image_path == "" if name == "cc3m" else place.read_bytes() == example.image
            found[split, example.image_id] = Expected(example.image or b"", example.captions, example.domain)
    assert found == expected
