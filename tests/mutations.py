"""What chance makes of a whole file: noise, and damage that gets past the checksums and lengths that show noise.

`mutate` knows by a file's name how it is built. All chance comes from the generator that it is given.
"""

import gzip
import io
import json
import pickletools
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[Random, bytes], bytes]

# Where widths, counts, offsets and lengths tip over.
NUMBERS = [0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]
# Each is noted if it is opened (see fuzz.py).
FORBIDDEN = ["/etc/passwd", "/dev/zero", "../secret"]
_NAMES = [*FORBIDDEN, "", ".", "..", "a/../../secret", "a//b", "..\\secret", "C:\\a", "a\0b", "a" * 300, "\udcff", "/"]
_TEXTS = ['"', '""', ",", "\t", "\n", "\r", "\0", "\ufeff", "\u2028", "\ud83d", "é" * 200, "[" * 2000, "'", "\\", "{}"]
# Values as JSON has them, or almost.
_JSON = [
    *("null", "true", "-1", "0", "1.5", "1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000, "1e-400", str(2**63)),
    *('""', '"x"', '"\\ud83d"', '"\\u0000"', "[]", "{}", '["a", "b"]', '{"a": 1, "a": 2}', "[[[]]]", "", "'x'"),
    *("[" * 100_000, '{"a":' * 100_000, '"' + "x" * 100_000 + '"', '"all"', '"val"', "\"['a', 'b']\""),
    *(json.dumps(name) for name in _NAMES),
]
# Opcodes: calls of what must not be called, and the largest of what a few bytes can ask for.
_PICKLED = [
    b"cos\nsystem\n(S'true'\ntR",
    b"cbuiltins\neval\n(S'1'\ntR",
    b"\x8c\x08builtins\x8c\x04exec\x93\x8c\x001\x85R",
    b"ccollections\nOrderedDict\n)R",
    b"c_codecs\nencode\n(Va\nVlatin1\ntR",
    b"(lp0\n",
    b"(dp0\n",
    b"r\xff\xff\xff\x03",  # a memo of 2^26 entries
    b"r\xff\xff\xff\x7f",
    b"j\xff\xff\xff\x7f",
    b"B\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 7 + b"\x7f",
    b"\x96" + b"\xff" * 7 + b"\x3f",
    b"\x96\0\0\0\x40\0\0\0\0",  # an array of a gigabyte
    b"cantigravity\nfly\n",  # which must not be imported
    b"\x8b\xff\xff\xff\x7f",
    b"I" + b"9" * 5000 + b"\n",
    b"Gn\xff\xff\xff\xff\xff\xff\xff",
    b"G\x7f\xf8\0\0\0\0\0\0",
    *(b"\x8a\x08" + number.to_bytes(8, "little") for number in NUMBERS),
    *(bytes([code]) for code in b"NJK\x88\x89]})(ltdabesuoQRpqh0123.2\x85\x86\x87\x81\x82\x92\x94\x90\x91\x8f"),
]


def mutate(random: Random, name: str, data: bytes) -> bytes:
    """A file that was `data`, by what the end of its name says it is; in half of all cases by nothing but noise."""
    mutation = next((_BY_SUFFIX[suffix] for suffix in _BY_SUFFIX if name.endswith(suffix)), noise)
    try:
        return (noise if random.random() < 0.5 else mutation)(random, data)
    except (ValueError, IndexError, EOFError, zlib.error, zipfile.BadZipFile, tarfile.TarError, struct.error):
        return noise(random, data)  # it is in a file of that format, but is none itself


def noise(random: Random, data: bytes) -> bytes:
    """One to eight changes of bytes, wherever they are."""
    made = bytearray(data)
    for _ in range(random.choice([1, 1, 1, 2, 3, 8])):
        start = random.randint(0, len(made))
        if random.random() < 0.5:  # most of what matters is at the beginning
            start = min(start, random.randint(0, 64))
        end = min(start + random.choice([1, 1, 2, 4, 16, 256]), len(made))
        some = random.randint(0, len(made))
        choice = random.randrange(8)
        if choice == 0 and start < end:
            made[start] ^= 1 << random.randrange(8)
        elif choice == 1:
            del made[start:end]
        elif choice == 2:
            made[start:start] = random.randbytes(random.choice([1, 2, 4, 100]))
        elif choice == 3:
            made[start:start] = made[some : some + end - start]
        elif choice == 4:
            made[start:end] = made[some : some + end - start]
        elif choice == 5 and random.random() < 0.3:
            del made[start:]
        else:
            size = random.choice([1, 2, 4, 8])
            number = random.choice(NUMBERS) % (1 << 8 * size)
            made[start : start + size] = number.to_bytes(size, random.choice(["big", "little"]))
    return bytes(made)


def _png(random: Random, data: bytes) -> bytes:
    """A chunk that is changed, left out, doubled or moved, with checksums that are right."""
    chunks, position = [], 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    index = random.randrange(len(chunks))
    kind, content = chunks[index]
    if kind in (b"IDAT", b"fdAT", b"zTXt", b"iCCP") and random.random() < 0.5:
        start = 4 if kind == b"fdAT" else 0
        content = content[:start] + zlib.compress(noise(random, zlib.decompress(content[start:])))
    changed = [(kind, content if content != chunks[index][1] else noise(random, content))]
    moved, renamed = [random.choice(chunks), chunks[index]], [(random.choice(chunks)[0], content)]
    chunks[index : index + 1] = random.choice(
        [changed, changed, changed, chunks[index : index + 1] * 2, [], moved, renamed]
    )
    return data[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _gzip(random: Random, data: bytes) -> bytes:
    return gzip.compress(_text(random, gzip.decompress(data)), 1, mtime=0)


def _zip(random: Random, data: bytes) -> bytes:
    """A member under another name, with other content, twice, or of another size than it says."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    index = random.randrange(len(members))
    name, content = members[index]
    choice = random.randrange(6)
    if choice == 0:
        members[index] = random.choice(_NAMES).replace("\udcff", "ÿ"), content
    elif choice == 1:
        members.append(random.choice(members))
    elif choice < 5:
        members[index] = name, mutate(random, name, content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
            if random.random() < 0.1:
                info.external_attr = random.choice([0o120777, 0o20666, 0o10666, 0o40777]) << 16  # links, devices
            archive.filelist = [other for other in archive.filelist if other.filename != name]  # else it warns
            archive.NameToInfo.pop(name, None)
            archive.writestr(info, content)
    made = bytearray(file.getvalue())
    if choice == 5:
        # Method, sizes or disk numbers of a header, of those before a member or in the directory at the end.
        start = random.choice([made.find(b"PK\1\2") + 10, 8, made.find(b"PK\5\6")])
        offset = random.choice([0, 10, 12, 14, 16])
        made[start + offset : start + offset + 4] = (random.choice(NUMBERS) % 2**32).to_bytes(4, "little")
    return bytes(made)


def _tar(random: Random, data: bytes) -> bytes:
    """A field of a header is changed, and its checksum is right."""
    made = bytearray(data)
    headers = [start for start in range(0, len(made), 512) if made[start + 257 : start + 262] == b"ustar"]
    start = random.choice(headers)
    sizes = [b"%011o" % number for number in NUMBERS if number < 8**11]
    sizes += [b"\x80" + bytes(3) + number.to_bytes(8, "big") for number in NUMBERS] + [
        b"\xff" * 12,
        b"",
        b"99999999999",
    ]
    names = [name.encode(errors="surrogateescape") for name in _NAMES] + [b"000000001.jpg", b"000000001.json", b".jpg"]
    place, length, values = random.choice(
        [
            (0, 100, names),
            (124, 12, sizes),
            (136, 12, sizes),
            (156, 1, [bytes([code]) for code in b"01234567SgxLKVMNDA\0\xff"]),
            (157, 100, names),
            (257, 8, [b"ustar  \0", b"ustar\x0000", b"\0" * 8]),
            (345, 155, names),
            (386, 96, [b"%011o\0%011o\0" % (0, 8**10), b"\xff" * 96]),  # the map of a sparse file
        ]
    )
    made[start + place : start + place + length] = random.choice(values)[:length].ljust(length, b"\0")
    made[start + 148 : start + 156] = b" " * 8
    made[start + 148 : start + 156] = b"%06o\0 " % sum(made[start : start + 512])
    return bytes(made)


def _json(random: Random, data: bytes) -> bytes:
    """A value is replaced, left out or renamed, wherever it is in the file."""
    content = json.loads(data)
    mark, value = "<here>", random.choice(_JSON)
    places: list[tuple[Any, Any]] = []
    inner = [content]
    for each in inner:
        if isinstance(each, dict | list):
            keys = list(each) if isinstance(each, dict) else range(len(each))
            places += [(each, key) for key in keys]
            inner += [each[key] for key in keys]
    if not places or random.random() < 0.02:
        return value.encode(errors="surrogatepass")
    holder, key = random.choice(places)
    choice = random.randrange(5)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        value, keys = json.dumps(random.choice([*holder, *_NAMES])), list(holder)
        moved = {mark if other == key else other: holder[other] for other in keys}
        holder.clear()
        holder.update(moved)
    elif choice == 2:
        holder[key] = random.choice(inner)
    else:
        holder[key] = mark
    try:
        made = json.dumps(content)
    except (ValueError, RecursionError):  # it holds itself
        made = "{}"
    return made.replace(f'"{mark}"', value).encode(errors="surrogatepass")


def _jsonl(random: Random, data: bytes) -> bytes:
    return _line(random, data, _json)


def _text(random: Random, data: bytes) -> bytes:
    """Quotes, commas, ends of lines and their like, in a line or as lines."""

    def insert(random: Random, line: bytes) -> bytes:
        start = random.randint(0, len(line))
        text = random.choice([*_TEXTS, *_NAMES, str(random.choice(NUMBERS))]).encode(errors="surrogatepass")
        return line[:start] + text + line[start + random.choice([0, 0, 1, 5]) :]

    return _line(random, data, insert)


def _line(random: Random, data: bytes, mutation: Mutation) -> bytes:
    lines = data.split(b"\n")
    index = random.randrange(len(lines))
    line = lines[index]
    choice = random.randrange(8)
    if choice == 0:
        lines[index : index + 1] = []
    elif choice == 1:
        lines.insert(random.randint(0, len(lines)), line)
    else:
        lines[index] = mutation(random, line)
    return b"\n".join(lines)


def _pickle(random: Random, data: bytes) -> bytes:
    """Opcodes are changed, left out, doubled or put in; of what follows each other in a file, in the first."""
    starts = [position for _, _, position in pickletools.genops(data) if position is not None]
    end = starts[-1] + 1
    codes = [data[start:stop] for start, stop in zip(starts, [*starts[1:], end], strict=True)]
    rest = data[end:]
    if rest and random.random() < 0.6:
        return data[:end] + mutate(random, ".pkl", rest)
    for _ in range(random.choice([1, 1, 2, 4])):
        index = random.randrange(len(codes) + 1)
        choice = random.randrange(4)
        if choice == 0:
            codes[index : index + 1] = []
        elif choice == 1:
            codes.insert(index, random.choice(codes))
        elif choice == 2:
            codes[index : index + 1] = [random.choice(_PICKLED)]
        else:
            codes.insert(index, random.choice(_PICKLED))
    return b"".join(codes) + rest


def _npy(random: Random, data: bytes) -> bytes:
    """Another type, shape or order in the header, whose length is right."""
    length = int.from_bytes(data[8:10], "little")
    shapes = [f"({a}, {b})" for a in NUMBERS for b in (0, 1, 4, 2**62)] + ["()", "(-1, 4)", "(4,)", "(True, 4)", "4"]
    types = ["'|O'", "'<f8'", "'>f2'", "'<U4'", "[('a', '<f4')]", "'<c16'", "'|V4'", "'|b1'", "'<M8[s]'", "'<f16'"]
    old, new = random.choice(
        [
            (b"(3, 4)", random.choice(shapes)),
            (b"'<f4'", random.choice(types)),
            (b"False", random.choice(["True", "0", "None", "'x'", "[" * 2000, "1" * 5000])),
            (b"{", random.choice(["", "{'a': 1, ", "(" * 500, "{**{}, ", "{__import__('os'): "])),
        ]
    )
    header = data[10 : 10 + length].replace(old, new.encode())
    return data[:6] + b"\2\0" + struct.pack("<I", len(header)) + header + data[10 + length :]


def _safetensors(random: Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = _json(random, data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


_BY_SUFFIX: dict[str, Mutation] = {
    ".png": _png,
    ".gz": _gzip,
    ".zip": _zip,
    ".pt": lambda random, data: (_zip if data.startswith(b"PK") else _pickle)(random, data),
    ".tar": _tar,
    ".json": _json,
    ".jsonl": _jsonl,
    ".pkl": _pickle,
    ".npy": _npy,
    ".safetensors": _safetensors,
    **dict.fromkeys((".csv", ".tsv", ".txt", ".bpe"), _text),
}
