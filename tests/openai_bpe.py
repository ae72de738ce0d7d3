"""OpenAI's tokenizers of GPT-2 and of CLIP, without their speed."""

import gzip
import html
import itertools
import json
from pathlib import Path

import regex  # type: ignore[import-untyped]

# Printable bytes stand for themselves, the others for the characters from 256 on.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
CHARACTERS = [chr(byte if byte in _PRINTABLE else 256 + _OTHERS.index(byte)) for byte in range(256)]


def _joined(pieces: list[str], ranks: dict[tuple[str, ...], int]) -> list[str]:
    while len(pieces) > 1:
        best = min(itertools.pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        joined, i = [], 0
        while i < len(pieces):
            width = 2 if tuple(pieces[i : i + 2]) == best else 1
            joined.append("".join(pieces[i : i + width]))
            i += width
        pieces = joined
    return pieces


class Gpt2Bpe:
    """As openai/gpt-2, src/encoder.py."""

    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, folder: Path):
        self.ids = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        merges = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        self.ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}

    def encode(self, text: str) -> list[int]:
        words = ([CHARACTERS[byte] for byte in word.encode()] for word in self.words.findall(text))
        return [self.ids[piece] for word in words for piece in _joined(word, self.ranks)]


class ClipBpe:
    """As openai/CLIP, clip/simple_tokenizer.py, without ftfy; the start and end tokens are left to others."""

    words = regex.compile(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
    )

    def __init__(self, path: Path):
        merges = gzip.decompress(path.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
        self.ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges)}
        letters = [CHARACTERS[byte] for byte in _PRINTABLE + _OTHERS]
        pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in self.ranks)]
        self.ids = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}

    def encode(self, text: str) -> list[int]:
        text = regex.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip().lower()
        ids = []
        for word in self.words.findall(text):
            *letters, last = (CHARACTERS[byte] for byte in word.encode())
            ids += [self.ids[piece] for piece in _joined([*letters, last + "</w>"], self.ranks)]
        return ids
