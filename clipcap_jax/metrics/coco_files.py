"""COCO's files of captions, as its evaluation code and the servers of COCO and nocaps take them.

A results file is a list of `{"image_id": 391895, "caption": "a man"}`. A captions file is
`{"images": [{"id": 391895, "file_name": "..."}], "annotations": [{"image_id": 391895, "caption": "a man"}, ...]}`; of
nocaps' images each has a `domain` too. Ids are whole numbers or strings; here they are strings.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from clipcap_jax.errors import UserError, counted, first
from clipcap_jax.files import to_json


@dataclasses.dataclass(frozen=True)
class CaptionsFile:
    """A captions file; each by image id, in the file's order.

    Attributes:
      images: all that it lists, with captions or without.
      captions: of every image that has some.
      domains: of nocaps' images, such as "near-domain".
      file_names: of the pictures, where the file says them.
    """

    images: set[str]
    captions: dict[str, list[str]]
    domains: dict[str, str]
    file_names: dict[str, str]


def read_results(path: Path) -> dict[str, str]:
    """The captions of a results file, by image id.

    An empty caption is one without words, and scores as such.

    Raises:
      UserError: it is not such a file, an image occurs twice, or a caption is not text.
    """
    entries = _load(path)
    if isinstance(entries, dict) and "annotations" in entries:
        raise UserError(f"{path} is a file of references; the captions to score are a list: {_RESULTS}")
    if not isinstance(entries, list):
        raise UserError(f"{path} is not a results file: {_RESULTS}")
    if not entries:
        raise UserError(f"{path} holds no captions")
    _check(path, "", entries, ("image_id", "caption"))
    repeated = [image for image, count in Counter(str(entry["image_id"]) for entry in entries).items() if count > 1]
    if repeated:
        raise UserError(f"{path}: {counted(len(repeated), 'image')} with more than one caption: {first(repeated)}")
    return {str(entry["image_id"]): entry["caption"] for entry in entries}


def read_captions(path: Path) -> CaptionsFile:
    """What a captions file says.

    Raises:
      UserError: it is not such a file, or an entry of it is not as it should be.
    """
    content = _load(path)
    if isinstance(content, list):
        raise UserError(f"{path} is a list, as results files are; references are {_CAPTIONS}. Are the files exchanged?")
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise UserError(f"{path} is not a captions file: {_CAPTIONS}")
    annotations, images = content["annotations"], _images(path, content)
    _check(path, "annotations", annotations, ("image_id", "caption"))
    captions: dict[str, list[str]] = {}
    for entry in annotations:
        captions.setdefault(str(entry["image_id"]), []).append(entry["caption"])
    return CaptionsFile(
        {str(image["id"]) for image in images},
        captions,
        domains={str(image["id"]): image["domain"] for image in images if isinstance(image.get("domain"), str)},
        file_names={
            str(image["id"]): image["file_name"] for image in images if isinstance(image.get("file_name"), str)
        },
    )


def read_images(path: Path) -> list[str]:
    """The ids of the images that a captions file lists, or one without captions, in its order.

    Raises:
      UserError: it is not such a file.
    """
    content = _load(path)
    if not isinstance(content, dict) or "images" not in content:
        raise UserError(f"{path} lists no images: {_CAPTIONS}")
    return [str(image["id"]) for image in _images(path, content)]


def write_results(path: Path, captions: dict[str, str]) -> None:
    """Writes a results file; ids as numbers, as the servers take nothing else, or as texts where one is no number."""
    ids = [coco_id(image) for image in captions]
    ids = ids if all(isinstance(image_id, int) for image_id in ids) else list(captions)
    entries = [{"image_id": image_id, "caption": text} for image_id, text in zip(ids, captions.values(), strict=True)]
    path.write_text(to_json(entries, indent=0), encoding="utf-8")


def by_number(captions: dict[str, str]) -> dict[str, str]:
    """By COCO's numbers instead of the paths of pictures, if all are named as COCO's are, and no two the same."""
    found = [re.fullmatch(r"(?:COCO_\w+_)?([0-9]{12})", PurePosixPath(path).stem) for path in captions]
    numbers = {str(int(match[1])): text for match, text in zip(found, captions.values(), strict=True) if match}
    return numbers if len(numbers) == len(captions) else captions


def coco_id(image_id: str) -> str | int:
    """The id as a number where it is one, of up to 18 digits."""
    return int(image_id) if re.fullmatch(r"0|[1-9][0-9]{,17}", image_id) else image_id


_FORMATS = "Captions are read from COCO's .json, and from .jsonl, .csv, .tsv and .txt with image and caption."
_RESULTS = '[{"image_id": 391895, "caption": "a man on a motorcycle"}, ...]'
_CAPTIONS = '{"images": [{"id": 391895}, ...], "annotations": [{"image_id": 391895, "caption": "a man"}, ...]}'


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}. {_FORMATS}") from error


def _images(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    images = content.get("images", [])
    if not isinstance(images, list):
        raise UserError(f"{path}: images is no list")
    _check(path, "images", images, ("id",))
    return images


def _is_text(value: Any) -> bool:
    """JSON may hold halves of characters, which no file can be written with."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_id(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int) and not isinstance(value, bool))


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "caption": ("text", _is_text),
    "image_id": ("a whole number or text", _is_id),
    "id": ("a whole number or text", _is_id),
}


def _check(path: Path, where: str, entries: Sequence[Any], keys: Iterable[str]) -> None:
    if odd := [i for i, entry in enumerate(entries) if not isinstance(entry, dict)]:
        raise UserError(f"{path}: {len(odd)} entries are no objects {{...}}: " + first([f"{where}[{i}]" for i in odd]))
    for key in keys:
        kind, is_right = _KINDS[key]
        if odd := [i for i, entry in enumerate(entries) if not is_right(entry.get(key))]:
            raise UserError(
                f"{path}: {key} is not {kind} in {len(odd)} entries: "
                + first([f"{where}[{i}] has {json.dumps(entries[i].get(key))}" for i in odd])
            )
