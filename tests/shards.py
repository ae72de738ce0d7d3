"""Pictures with numbers, and shards of them as img2dataset writes them."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

Sample = Mapping[str, bytes]  # suffix and content


def jpeg(number: int) -> bytes:
    """A picture that shows its number: its grey is the last byte, its size the others."""
    file = io.BytesIO()
    Image.new("L", (8 + number // 256, 8), number % 256).save(file, "JPEG", quality=100)
    return file.getvalue()


def number_of(image: bytes) -> int:
    picture = Image.open(io.BytesIO(image))
    return 256 * (picture.width - 8) + picture.tobytes()[0]


def sample(number: int, caption: str | None = None, **fields: Any) -> dict[str, bytes]:
    """As img2dataset writes it, in its order."""
    meta = {
        "caption": f"Picture {number}.",
        "url": f"http://example.com/{number}.jpg",
        "key": f"{number:09}",
        "status": "success",
        "error_message": None,
        "width": 8,
        "height": 8,
    } | fields
    text = f"Picture {number}." if caption is None else caption
    return {"jpg": jpeg(number), "json": json.dumps(meta, indent=4).encode(), "txt": text.encode()}


def write_tar(path: Path, samples: Mapping[str, Sample]) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_folder(path: Path, samples: Mapping[str, Sample]) -> None:
    path.mkdir(parents=True)
    for key, files in samples.items():
        for suffix, data in files.items():
            (path / f"{key}.{suffix}").write_bytes(data)


def write_stats(path: Path, successes: int, dead: int = 0, unusable: int = 0) -> None:
    stats = {
        "count": successes + dead + unusable,
        "successes": successes,
        "failed_to_download": dead,
        "failed_to_resize": unusable,
        "duration": 1.5,
        "status_dict": {"success": successes, "HTTP Error 404: Not Found": dead},
    }
    path.write_text(json.dumps(stats, indent=4))


def keyed(*numbers: int) -> dict[str, Sample]:
    return {f"{number:09}": sample(number) for number in numbers}


WRITERS = {"tar": lambda path, samples: write_tar(path.with_suffix(".tar"), samples), "files": write_folder}
