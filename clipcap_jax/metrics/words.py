"""What a word is: what n-grams are made of, and what every score counts.

`ptb` splits as pycocoevalcap does and every paper; its words are what stands between spaces. In scripts without spaces
that is a whole sentence, and no caption shares one with a reference: there `characters`, or a segmenter of one's own.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias, get_args

from clipcap_jax.errors import UserError
from clipcap_jax.metrics import ptb

Named = Literal["ptb", "characters", "spaces"]
NAMED: tuple[str, ...] = get_args(Named)
# Or a function that gives the words of a text, none of which holds a space.
Words: TypeAlias = Named | Callable[[str], Iterable[str]]

_UNSPACED = (
    "\u0e00-\u0eff"  # Thai, Lao
    "\u0f00-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Tibetan, Burmese
    "\u1780-\u17ff"  # Khmer
    "\u1950-\u19df\u1a20-\u1aaf\uaa80-\uaadf"  # Tai Le, New Tai Lue, Tai Tham, Tai Viet
    "\u3005-\u3007\u3041-\u312f\u31a0-\u31ff\uff66-\uff9f"  # kana, bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
_LETTER = rf"(?![\W\d])[{_UNSPACED}]"
_MARKS = "".join(mark for mark in map(chr, range(0xE00, 0x1AB0)) if unicodedata.category(mark)[0] == "M")
_MARKS += "\u3099\u309a\ufe00-\ufe0f"  # of kana, and of variants
_CHARACTER = re.compile(f"({_LETTER}[{_MARKS}]*)")


def name_of(words: Words) -> str:
    """To be recorded beside scores."""
    return words if isinstance(words, str) else getattr(words, "__qualname__", repr(words))


def split_all(texts: Sequence[str], words: Words) -> list[str]:
    """The words of each text, joined by spaces.

    Args:
      texts: raw, in the order in which pycocoevalcap would get them (see `ptb.tokenize`).
      words: "ptb"; "characters": each letter of a script without spaces is a word, with its marks, punctuation as East
        Asia has it is none, and the rest is split as by "ptb"; "spaces": the text is segmented already; or a function.

    Raises:
      UserError: there are no such words.
    """
    if words == "ptb":
        return ptb.tokenize_all(texts)
    if words == "characters":
        return list(map(_by_character, texts, [*texts[1:], ""]))
    split = str.split if words == "spaces" else words
    if not callable(split):
        raise UserError(f"words are {words!r}: they can be 'ptb', 'characters', 'spaces' or a function")
    return [" ".join(split(text)) for text in texts]


def _by_character(text: str, following: str) -> str:
    pieces = _CHARACTER.split(text)  # every second one is such a character
    last = len(pieces) - 1
    found = [piece if i % 2 else ptb.tokenize(piece, following if i == last else "") for i, piece in enumerate(pieces)]
    return " ".join(word for words in found for word in words.split(" ") if word and not _is_punctuation(word))


def _is_punctuation(word: str) -> bool:
    """Of East Asia's: what "ptb" itself knows of it are words there, as in the Java program."""
    return all(character > "\u2fff" and unicodedata.category(character)[0] == "P" for character in word)


def are_unspaced(texts: Sequence[str]) -> bool:
    """Whether most of them are, most of their letters, in scripts that put no spaces between words."""
    foreign = [text for text in texts if not text.isascii()]  # of English few, so that this costs no time
    unspaced = [text for text in foreign if 2 * len(re.findall(_LETTER, text)) > sum(map(str.isalpha, text))]
    return 2 * len(unspaced) > len(texts)
