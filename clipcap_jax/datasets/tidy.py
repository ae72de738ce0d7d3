"""From rows to what is prepared, for every data set alike; docs/data.md has these rules in words.

`tidy` is the one place that says which copy of a picture stays, what an id is, what an empty caption is and what splits
are called; `find_pictures` finds the files that records name.
"""

import ast
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from clipcap_jax.datasets.readers import TextFile
from clipcap_jax.datasets.source import Problem, Record, Source, leads_out, picture_parts
from clipcap_jax.errors import UserError

# What ends the name of a picture; anything else after a dot is a part of the name.
_SUFFIX = re.compile(r"\.(avif|bmp|gif|jfif|jpe|jpeg|jpg|png|ppm|tif|tiff|webp)$", re.IGNORECASE)
_SPLITS = {
    "training": "train",
    "restval": "train",
    "validation": "val",
    "valid": "val",
    "dev": "val",
    "testing": "test",
}

# The text of a list, as Python, JSON or NumPy write it.
_LIST = r"\s*(?:array\()?(?:[\[{]\s*(?:['\"].*|[\]}]\s*)|\(\s*['\"].*['\"]\s*,?\s*\)\s*)"
# What a caption may be, but seldom is.
_ODD = {
    "are the text of a list": rf"^{_LIST}$",
    "stand for no value": r"^\s*(?:nan|none|null|<na>|n/a|na|nil|undefined)\s*$",
    "hold HTML": r"&(?:amp|quot|apos|lt|gt|nbsp|#\d+);|</?(?:a|b|br|div|i|p|span)\b[^<>]*>",
    "hold an escape such as \\n": r"\\(?:[nrt]|u[0-9a-f]{4}|x[0-9a-f]{2})",
    "hold a character that was lost": "\ufffd",
    "are a link": r"^\s*https?://\S+\s*$",
}
_ANY_ODD = re.compile("|".join(f"({pattern})" for pattern in _ODD.values()), re.IGNORECASE | re.DOTALL)


def without_suffix(name: str) -> str:
    """The name of a picture without its suffix, if that is a known one."""
    return _SUFFIX.sub("", name)


def name_pictures(rows: Sequence[Record | Problem]) -> None:
    """Gives an image_id to the records that have none: the file name without its suffix.

    Two files that differ in the suffix alone are two pictures: these keep it.
    """
    files = defaultdict(set)
    nameless = [row for row in rows if isinstance(row, Record) and not row.image_id]
    for record in nameless:
        files[without_suffix(record.image)].add(record.image)
    for record in nameless:
        stem = without_suffix(record.image)
        record.image_id = stem if stem and len(files[stem]) == 1 else record.image


def usual_split(split: str, where: str) -> str:
    """What a split is called here: "Validation" is "val".

    Raises:
      UserError: it is "all", which TFDS reads as all splits together.
    """
    if split.lower() == "all":
        raise UserError(f"{where}: no split can be called {split!r}, which means all of them. Call it something else.")
    usual = _SPLITS.get(split.lower(), split.lower())
    return usual if usual in ("train", "val", "test") else split


def clean_captions(texts: Sequence[str], where: str, image_id: str) -> tuple[list[str], list[Problem]]:
    """Captions with their white space tidied, and what is wrong with the others.

    A text that is a list of texts, as Python or JSON write it, is read as that list.
    """
    captions, problems, empty = [], [], 0
    for text in texts:
        parts = _parts(text)
        if parts is None:
            problems.append(Problem(where, "caption is no text", f"image_id {image_id}: {text!r:.80}"))
        for part in parts or ():
            if part := " ".join(part.split()):
                captions.append(part)
            else:
                empty += 1
    if not texts:
        problems.append(Problem(where, "no caption", f"image_id {image_id}"))
    if empty:
        problems.append(Problem(where, "empty caption", f"image_id {image_id}", empty))
    return captions, problems


def _parts(text: str) -> list[str] | None:
    """The texts of a list that is written in one, or the text itself; None where that is cut off or something else."""
    if not text.lstrip().startswith(("[", "{", "(", "array(")) or not re.fullmatch(_LIST, text, re.DOTALL):
        return [text]
    try:
        parts = json.loads(text)
    except (ValueError, RecursionError):
        try:
            parts = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
        if str(parts) != text.strip():  # as in "['a' 'b']", which is two texts for NumPy and one for Python
            return None
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        return None
    try:
        "".join(parts).encode()
    except UnicodeEncodeError:
        return None
    return list(parts) or [""]


def tidy(
    rows: Sequence[Record | Problem], captioned: bool = True, splits: Collection[str] = ()
) -> tuple[list[Record], list[Problem], list[str]]:
    """Each picture once, with tidied captions and its id; what was left out; and notes on what is odd.

    Rows that `join` are put together, where they agree. Of two records of a picture, be it one id or one file, the
    first stays; but a picture that is in train and in another split stays in the other.

    Args:
      rows: as a file has them.
      captioned: whether a record without captions is a problem.
      splits: the only ones that there may be; any if empty.

    Raises:
      UserError: a split is called "all", where any may be.
    """
    name_pictures(rows)
    problems: list[Problem] = []
    by_id: dict[str, Record] = {}
    by_file: dict[str, Record] = {}
    renamed: Counter[tuple[str, str]] = Counter()
    odd: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        if splits and _SPLITS.get(row.split.lower(), row.split.lower()) not in splits:
            problems.append(Problem(row.where, "wrong split", f"{row.split!r} is none of {', '.join(splits)}"))
            continue
        if (split := usual_split(row.split, row.where)) != row.split:
            renamed[row.split, split] += 1
            row.split = split
        rivals = [rival for rival in (by_id.get(row.image_id), by_file.get(row.image)) if rival is not None]
        first = next((rival for rival in rivals if rival.split != "train" or row.split in ("train", "")), None)
        joins = first is not None and row.joins and not _difference(row, first)
        if first is not None and not joins:
            problems.append(_twice(row, first))
            continue
        for text in row.captions:
            if match := _ANY_ODD.search(text):
                kind = [*_ODD][(match.lastindex or 1) - 1]
                odd[kind] += 1
                examples.setdefault(kind, f"{text!r:.60} in {row.where}")
        row.captions, found = clean_captions(row.captions, row.where, row.image_id)
        problems += [problem for problem in found if captioned or problem.reason != "no caption"]
        if first is not None:
            first.captions += row.captions
            continue
        for rival in rivals:
            if by_id.pop(rival.image_id, None) is not None:
                del by_file[rival.image]
                problems.append(_twice(rival, row))
        by_id[row.image_id] = by_file[row.image] = row
    records = [record for record in by_id.values() if record.captions or not captioned]
    told = {names: count for names, count in renamed.items() if names != ("restval", "train")}  # that is Karpathy's
    notes = [f"split {name!r} was taken for {split!r}: {count:,}" for (name, split), count in told.items()]
    notes += [f"captions that {kind}: {count:,}, such as {examples[kind]}" for kind, count in odd.items()]
    return records, problems, notes


def _difference(record: Record, first: Record) -> str:
    """In what two rows of one picture contradict each other; "" where they do not."""
    for field in ("image_id", "split", "image", "embedding_row", "domain"):
        here, there = getattr(record, field), getattr(first, field)
        if here != there:
            return f"{field} of {record.image_id} is {here!r}, but {there!r} in {first.where}"
    return ""


def _twice(record: Record, first: Record) -> Problem:
    other = f" as {first.image_id}" * (record.image_id != first.image_id)
    if record.split != first.split:
        detail = f"{record.image_id} is in {record.split!r}, but in {first.split!r}{other} in {first.where}"
        return Problem(record.where, "image in two splits", detail)
    if other:
        detail = f"{record.image} is {record.image_id}, but is there{other} in {first.where}"
        return Problem(record.where, "image under two ids", detail)
    if record.joins:
        return Problem(record.where, "contradiction", _difference(record, first))
    return Problem(record.where, "duplicate image_id", f"{record.image_id}, as in {first.where}")


# COCO's pictures are called by one of these in its 2014 and 2017 layouts.
_COCO = re.compile(r"(^|/)(train|val|test)20\d\d/|(^|/)COCO_")
_NUMBERED = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})\.jpg")


def find_pictures(rows: Sequence[Record | Problem], folder: Path) -> tuple[list[Record | Problem], list[str]]:
    """The rows; those whose `image` is an id or a number of COCO's have the path of that picture in its place.

    A file that is there under nearly the name is not taken, but told: one problem takes the place of all rows whose
    names differ in the same way. Pictures that are not there at all are left to `source.read_picture`.

    Returns:
      Rows, and a note on those that were found.
    """
    name_pictures(rows)
    missing = _missing(rows, folder)
    if not missing:
        return list(rows), []
    files: dict[tuple[str, str], str] = {}  # by all that may be meant by a name
    ambiguous = set()
    for path in _files(folder):
        for key in _keys(path):
            other = files.setdefault(key, path)
            if other != path and not (key[0] == "number" and _COCO.search(path) and _COCO.search(other)):
                ambiguous.add(key)
    near: dict[str, dict[str, tuple[Record, str]]] = defaultdict(dict)
    gone, found = set(), 0
    for record in missing:
        keys = [key for key in _keys(record.image) if key in files and key not in ambiguous]
        if os.path.dirname(record.image) and not _COCO.search(record.image):
            keys = [key for key in keys if key[0] != "number"]  # a number means a picture in COCO's folders alone
        if not keys:
            continue
        path = files[keys[0]]
        if keys[0][0] == "number" or record.image == record.image_id == without_suffix(path):
            record.image = path
            found += 1
        else:
            near[_how(record.image, path)].setdefault(record.image, (record, path))
            gone.add(id(record))
    problems = []
    for how, names in near.items():
        record, path = next(iter(names.values()))
        more = f", as in {len(names):,} names" * (len(names) > 1)
        detail = f"{record.image} is not there, but {path} is: they differ in {how}{more}"
        problems.append(Problem(record.where, "image missing", detail, len(names)))
    notes = [f"pictures found by their id or number under another name: {found:,}"] if found else []
    return [*problems, *(row for row in rows if id(row) not in gone)], notes


def _missing(rows: Sequence[Record | Problem], folder: Path) -> list[Record]:
    """Those whose file is not there. Folders are listed, as asking for each file takes long on a network."""
    listed: dict[str, set[str]] = {}
    missing = []
    for row in rows:
        if isinstance(row, Problem) or leads_out(row.image):
            continue
        place, name = os.path.split(row.image)
        if place not in listed:
            try:
                listed[place] = set(os.listdir(folder / place))
            except (OSError, ValueError):
                listed[place] = set()
        if name not in listed[place]:
            missing.append(row)
    return missing


def _files(folder: Path, below: str = "", depth: int = 3) -> Iterator[str]:
    """The files in a folder, as paths from there; links are followed, so the depth has an end."""
    try:
        entries = sorted(os.scandir(folder / below), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        path = os.path.join(below, entry.name)
        if not path.isprintable():
            continue  # as names that are no UTF-8 are
        if entry.is_dir():
            yield from _files(folder, path, depth - 1) if depth else ()
        elif entry.is_file():
            yield path


_CHANGES = {
    "slashes": lambda name: name.replace("\\", "/"),
    "Unicode normal form": lambda name: unicodedata.normalize("NFC", name),
    "upper and lower case": str.casefold,
    "the suffix": without_suffix,
}


def _keys(name: str) -> list[tuple[str, str]]:
    """All that may be meant by a name, the surest first."""
    number = _NUMBERED.fullmatch(os.path.basename(name)) or re.fullmatch("([0-9]{1,12})", name)
    keys = [("number", str(int(number[1])))] if number else []
    for change in _CHANGES.values():
        name = change(name)
    return [("path", name), *keys, ("name", os.path.basename(name))]


def _how(name: str, path: str) -> str:
    """In what a name differs from that of the file."""
    for how, change in _CHANGES.items():
        name, path = change(name), change(path)
        if name == path:
            return how
    return "the folder"


def published(
    name: str,
    files: Sequence[TextFile],
    folder: Path,
    records: Sequence[Record],
    problems: Sequence[Problem],
    notes: Sequence[str],
    **about: str,
) -> Source:
    """A data set from its owners' files.

    Args:
      name, problems, notes, about: as in `Source`.
      files: that tell of the pictures.
      folder: that the pictures lie in.
      records: their `image` starts from there.
    """
    return Source(
        name=name,
        origin={"annotations": [file.digest() for file in files]},
        found={"annotations": [file.name for file in files], "images": str(folder)},
        root=str(folder),
        parts=picture_parts(records, folder),
        has_images=True,
        problems=problems,
        notes=notes,
        **about,  # type: ignore[arg-type]  # description, homepage, citation
    )


def check_counts(dataset: str, records: Sequence[Record], counts: Mapping[str, int]) -> list[str]:
    """A note where this is only a part of the data set.

    Raises:
      UserError: it is the whole of it, but its splits are not those that were published.
    """
    found = Counter(record.split for record in records)
    if found == counts:
        return []
    said = ", ".join(f"{split} {found[split]:,} of {count:,}" for split, count in counts.items())
    if found.total() == sum(counts.values()):
        raise UserError(f"The splits of {dataset} are not those that were published: {said}.")
    return [f"this is not the {dataset} that was published: {said}"]
