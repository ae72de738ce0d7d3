"""Reading captions files for the `records` data sets: JSON lines, CSV and COCO JSON.

A JSONL line is an object, a CSV file has a header. Both use these fields; others are ignored and reported:

    image          file name in the image folder      one of the two is needed; the image_id is made from
    image_id       unique name of the picture         the file name, or is taken for it
    caption        one text; a picture may have several lines or rows
    captions       a list of texts (JSONL only)
    split          "train", "val", "test" or any other word
    embedding_row  the picture's row in the matrix of embeddings, from 0
    domain         a group of pictures to score apart

COCO JSON has a list `images` of objects with `id`, `file_name` and, if wanted, `split`, `embedding_row` and `domain`,
and a list `annotations` of objects with `image_id` and `caption`.
"""

import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from clipcap_jax.datasets.source import Problem, Record
from clipcap_jax.errors import UserError

_FIELDS = ("image", "image_id", "caption", "captions", "split", "embedding_row", "domain")


@dataclasses.dataclass
class CaptionsFile:
    """What a captions file holds.

    Attributes:
      records: in the order of the file, one for each picture; white space in captions is tidied. Records whose captions
        are all empty are still among them, without captions.
      problems: what was left out, and why.
      in_order: whether the n-th picture of the file is the n-th of `records`.
      unused_fields: fields of the file that mean nothing here.
    """

    records: list[Record]
    problems: list[Problem]
    in_order: bool
    unused_fields: list[str]


class _BadRecord(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail


def read_captions(path: Path) -> CaptionsFile:
    """Reads a `.jsonl`, `.csv`, `.tsv` or COCO `.json` file.

    Raises:
      UserError: the file is missing, is none of these, is not UTF-8, or lacks what every record needs.
    """
    if not path.is_file():
        raise UserError(f"The captions file {path} does not exist.")
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv, ".json": _read_coco}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: a captions file is .jsonl, .csv, .tsv or (in COCO's format) .json.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 (byte {data[error.start]:#x}). Convert the file to UTF-8.") from None
    return _collect(readers[path.suffix.lower()](path, text))


_Row = tuple[str, Mapping[str, Any] | _BadRecord]  # where, and the fields or why there are none


def _collect(rows: Iterator[_Row]) -> CaptionsFile:
    """Makes records of rows, with the rows of one picture joined."""
    file = CaptionsFile([], [], in_order=True, unused_fields=[])
    by_id: dict[str, Record] = {}
    for where, fields in rows:
        try:
            if isinstance(fields, _BadRecord):
                raise fields
            file.unused_fields += [key for key in fields if key not in _FIELDS and key not in file.unused_fields]
            record = _record(where, fields)
        except _BadRecord as bad:
            file.problems.append(Problem(where, bad.reason, bad.detail))
            file.in_order = False
            continue
        texts = [" ".join(caption.split()) for caption in record.captions]
        record.captions = [text for text in texts if text]
        if not texts:
            file.problems.append(Problem(where, "no caption", f"image_id {record.image_id}"))
        file.problems += [Problem(where, "empty caption", f"image_id {record.image_id}")] * texts.count("")
        first = by_id.setdefault(record.image_id, record)
        if first is record:
            file.records.append(record)
        elif "captions" in fields:
            file.problems.append(Problem(where, "duplicate image_id", f"{record.image_id}, as in {first.where}"))
            file.in_order = False
        elif difference := _difference(record, first):
            file.problems.append(Problem(where, *difference))
        else:
            first.captions += record.captions
    return file


def _record(where: str, fields: Mapping[str, Any]) -> Record:
    """Raises _BadRecord where a field is missing or of the wrong type."""
    image, image_id = _text(fields, "image"), _text(fields, "image_id")
    if not image and not image_id:
        raise _BadRecord("missing field", "neither 'image' nor 'image_id'")
    captions = fields["captions"] if "captions" in fields else [fields.get("caption")]
    if captions == [None]:
        raise _BadRecord("missing field", "neither 'caption' nor 'captions'")
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise _BadRecord("wrong type", "'caption' must be a text, 'captions' a list of texts")
    split = _text(fields, "split")
    if not re.fullmatch(r"([A-Za-z]\w*)?", split):
        raise _BadRecord("wrong split", f"{split!r} is not a word")
    row = fields.get("embedding_row")
    if isinstance(row, str) and row.strip().isdecimal():
        row = int(row)
    if row is not None and (not isinstance(row, int) or isinstance(row, bool)):
        raise _BadRecord("wrong type", f"'embedding_row' must be a whole number, is {row!r}")
    record = Record(
        where=where,
        image=image or image_id,
        image_id=image_id or os.path.splitext(image)[0],
        captions=captions,
        split=split,
        embedding_row=row,
        domain=_text(fields, "domain"),
    )
    try:
        "".join([record.image, record.image_id, record.domain, *captions]).encode()
    except UnicodeEncodeError:  # JSON can spell half a character: "\ud83d"
        raise _BadRecord("broken text", "a character is cut in half") from None
    return record


def _text(fields: Mapping[str, Any], key: str) -> str:
    value = fields.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _BadRecord("wrong type", f"{key!r} must be a text, is {value!r}")
    return str(value).strip()


def _difference(record: Record, first: Record) -> tuple[str, str] | None:
    """Reason and detail where two rows of one picture contradict each other."""
    if record.split != first.split:
        detail = f"{record.image_id} is in {record.split!r}, but in {first.split!r} in {first.where}"
        return "image in two splits", detail
    for field in ("image", "embedding_row", "domain"):
        here, there = getattr(record, field), getattr(first, field)
        if here != there:
            return "contradiction", f"{field} of {record.image_id} is {here!r}, but {there!r} in {first.where}"
    return None


def _read_jsonl(path: Path, text: str) -> Iterator[_Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            fields = _BadRecord("bad JSON", str(error).replace("line 1 ", ""))
        if not isinstance(fields, dict | _BadRecord):
            fields = _BadRecord("bad JSON", "the line is not an object {...}")
        yield f"{path.name}:{number}", fields


def _read_csv(path: Path, text: str) -> Iterator[_Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = reader.fieldnames or []
        if "caption" not in columns or not {"image", "image_id"} & set(columns):
            raise UserError(
                f"{path}:1: the first row must name the columns, among them 'caption' and 'image' or 'image_id'. "
                f"It has: {', '.join(columns) or 'nothing'}."
            )
        for row in reader:
            fields: Mapping[str, Any] | _BadRecord
            if None in row:
                fields = _BadRecord("too many columns", f"more than {len(columns)}; put a text with commas in quotes")
            elif None in row.values():
                fields = _BadRecord("too few columns", f"fewer than {len(columns)}")
            else:
                fields = {key: value for key, value in row.items() if value or key == "caption"}
            yield f"{path.name}:{reader.line_num}", fields
    except csv.Error as error:
        raise UserError(f"{path} is not CSV near line {reader.line_num}: {error}.") from None


def _read_coco(path: Path, text: str) -> Iterator[_Row]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    images, annotations = (_objects(content, key, path) for key in ("images", "annotations"))
    captions: dict[str, list[Any]] = {str(image["id"]): [] for image in images if "id" in image}
    for index, annotation in enumerate(annotations):
        if (image_id := str(annotation.get("image_id"))) in captions:
            captions[image_id].append(annotation.get("caption"))
        else:
            bad = _BadRecord("caption of an unknown image", f"image_id {image_id}, id {annotation.get('id')}")
            yield f"{path.name}: annotations[{index}]", bad
    for index, image in enumerate(images):
        fields = {
            "image": image.get("file_name"),
            "image_id": image.get("id"),
            "captions": captions.get(str(image.get("id")), []),
        }
        fields |= {key: image.get(key) for key in ("split", "embedding_row", "domain")}
        yield f"{path.name}: images[{index}]", fields


def _objects(content: Any, key: str, path: Path) -> list[dict[str, Any]]:
    entries = content.get(key) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} is not in COCO's captions format: it lacks the list of objects {key!r}.")
    return entries
