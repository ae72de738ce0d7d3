"""Flickr8k (Hodosh et al. 2013) and Flickr30k (Young et al. 2014), five captions a picture.

Captions and splits come from Karpathy's dataset_flickr8k.json or dataset_flickr30k.json, or from the owners' files.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from clipcap_jax.datasets.readers import TextFile, find_file, make_record, not_there, read_karpathy
from clipcap_jax.datasets.source import Problem, Record, Source
from clipcap_jax.datasets.tidy import check_counts, find_pictures, published, tidy
from clipcap_jax.errors import UserError

COUNTS = {
    "flickr8k": {"train": 6000, "val": 1000, "test": 1000},
    "flickr30k": {"train": 29_000, "val": 1014, "test": 1000},
}
_CAPTIONS = {"flickr8k": ("Flickr8k.token.txt",), "flickr30k": ("results_20130124.token", "results.csv")}
_LISTS = {
    "flickr8k": {
        "train": "Flickr_8k.trainImages.txt",
        "val": "Flickr_8k.devImages.txt",
        "test": "Flickr_8k.testImages.txt",
    },
    "flickr30k": {split: f"karpathy_{split}_images.txt" for split in ("train", "val", "test")},
}
# As the archives unpack: the owners' (the first is their spelling), then Kaggle's.
_FOLDERS = {
    "flickr8k": ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"),
    "flickr30k": ("flickr30k-images", "flickr30k_images/flickr30k_images", "flickr30k_images", "images"),
}

LISTINGS = {
    "flickr8k": """\
  Flicker8k_Dataset/1000268201_693b08cb0e.jpg ...   (or Images/) ask the owners for the pictures:
      https://hockenmaier.cs.illinois.edu/8k-pictures.html
  dataset_flickr8k.json                             from, or still in,
      https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip

or, in place of dataset_flickr8k.json, all of these from, or still in, the owners' Flickr8k_text.zip
  Flickr8k.token.txt
  Flickr_8k.trainImages.txt, Flickr_8k.devImages.txt, Flickr_8k.testImages.txt""",
    "flickr30k": """\
  flickr30k-images/1000092795.jpg ...   (or flickr30k_images/) ask the owners for the pictures:
      https://shannon.cs.illinois.edu/DenotationGraph/
  dataset_flickr30k.json                from, or still in,
      https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip

or, in place of dataset_flickr30k.json, all of
  results_20130124.token                (the owners') or results.csv (Kaggle's)
  karpathy_train_images.txt, karpathy_val_images.txt, karpathy_test_images.txt, a file name a line""",
}
_CITATIONS = {
    "flickr8k": """\
@article{hodosh2013framing,
  title={Framing Image Description as a Ranking Task: Data, Models and Evaluation Metrics},
  author={Hodosh, Micah and Young, Peter and Hockenmaier, Julia},
  journal={Journal of Artificial Intelligence Research}, volume={47}, pages={853--899}, year={2013}
}""",
    "flickr30k": """\
@article{young2014image,
  title={From image descriptions to visual denotations},
  author={Young, Peter and Lai, Alice and Hodosh, Micah and Hockenmaier, Julia},
  journal={Transactions of the Association for Computational Linguistics}, volume={2}, pages={67--78}, year={2014}
}""",
}


def flickr_source(name: str, manual_dir: str | Path) -> Source:
    """Flickr8k or Flickr30k, as the data set of that name.

    Args:
      name: "flickr8k" or "flickr30k".
      manual_dir: a folder with the files in `LISTINGS`; captions are taken from Karpathy's file if it is there.

    Returns:
      Its image_id is the file name without ".jpg".

    Raises:
      UserError: a file is missing, or is not what its name says.
    """
    folder = Path(manual_dir).resolve()
    notes: list[str] = []
    if file := find_file(folder, f"dataset_{name}.json", "caption_datasets.zip"):
        files = [file]
        rows = read_karpathy(file, name)
    else:
        captions = [find_file(folder, candidate, "Flickr8k_text.zip") for candidate in _CAPTIONS[name]]
        found = [next(filter(None, captions), None)]
        found += [find_file(folder, candidate, "Flickr8k_text.zip") for candidate in _LISTS[name].values()]
        files = [file for file in found if file is not None]
        if len(files) < len(found):
            raise not_there(folder, name, LISTINGS[name])
        rows, notes = _read_official(*files)
    where = next((folder / candidate for candidate in _FOLDERS[name] if (folder / candidate).is_dir()), None)
    if where is None:
        raise not_there(folder, f"the pictures of {name}", LISTINGS[name])
    rows, found_notes = find_pictures(rows, where)
    records, problems, more = tidy(rows, splits=COUNTS[name])
    return published(
        name,
        files,
        where,
        records,
        problems,
        [*notes, *found_notes, *more, *check_counts(name, records, COUNTS[name])],
        description=f"{name.capitalize()} with the usual splits.",
        homepage="https://hockenmaier.cs.illinois.edu",
        citation=_CITATIONS[name],
    )


def _read_official(captions: TextFile, *lists: TextFile) -> tuple[list[Record | Problem], list[str]]:
    """The pictures that the lists of train, val and test name, and a note on those that none names."""
    rows: list[Record | Problem] = []
    by_name: dict[str, list[str]] = {}
    for where, name, caption in _caption_lines(captions):
        if name:
            by_name.setdefault(name, []).append(caption)
        else:
            rows.append(Problem(where, "bad line", caption))
    named = set()
    for split, file in zip(("train", "val", "test"), lists, strict=True):
        for where, line in file.lines():
            name = line.split()[0].rpartition("/")[2]
            name = name if name.endswith(".jpg") else f"{name}.jpg"
            named.add(name)
            rows.append(make_record(where, {"image": name, "captions": by_name.get(name, []), "split": split}))
    if not named & by_name.keys():
        raise UserError(f"{captions} and {lists[0]} have no picture in common: they are not of one data set.")
    # Flickr8k has 91 pictures (one under a name that does not exist) in no split, Flickr30k 769.
    unused = len(by_name.keys() - named)
    return rows, [f"pictures of {captions.name} that are in no split: {unused:,}"] if unused else []


def _caption_lines(file: TextFile) -> Iterator[tuple[str, str, str]]:
    """Where, file name and caption of each line; no file name where the line is wrong."""
    for where, line in file.lines():
        if file.name == "results.csv":
            # "1000092795.jpg| 0| Two young guys ...". One line of Kaggle's lacks its second bar:
            # "2199200615.jpg| 4   A dog runs across the grass ."
            if line.replace(" ", "") == "image_name|comment_number|comment":
                continue
            match = re.fullmatch(r"([^|]+?)\s*\|\s*\d+\s*(?:\||\s)(.*)", line)
        else:  # "1000092795.jpg#0<tab>Two young guys ..."
            match = re.fullmatch(r"([^#\t]+)#\d+\t(.*)", line)
        yield (where, match[1], match[2]) if match else (where, "", line)
