"""Changes of small files that keep their structure: lengths, checksums and magic numbers still fit.

A mutation takes bytes and a random generator and gives bytes; one that cannot read the bytes changes them blindly.
"""

import contextlib
import io
import json
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

NUMBERS = (0, 1, -1, 2, 127, 255, 65_535, 2**31 - 1, 2**31, 2**32 - 1, 10**9, 10**12, 2**62, 2**63 - 1, 2**63, 2**64)
TEXTS = (
    *(
        "",
        " ",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "\x00",
        "\n",
        "\x1b[31m",
        "\u202e",
        "é",
        "e\u0301",
        "日本",
    ),
    *(
        "\ud800",
        "\udcff",
        "٣",
        "²",
        "ß",
        "İ",
        "\N{MATHEMATICAL DOUBLE-STRUCK DIGIT ONE}",
        "-1",
        "1e400",
        "nan",
        "inf",
        "0x10",
        "1_0",
        "None",
        "null",
        "true",
        "x" * 5000,
    ),
    *("float32", "object", "dtype", "class", "arguments", "SqueezeExcite", "__class__", "seresnet50", "n01440764"),
    *(
        "(",
        "[",
        "{",
        "((((",
        "'",
        '"',
        ",",
        ":",
        "=",
        "-",
        "--",
        "%s",
        "{0}",
        "$HOME",
        "`id`",
        "os.system",
        "1:2:3",
        "0:1:1",
    ),
)
ODD: tuple[Any, ...] = (
    *NUMBERS,
    *(0.5, -0.0, 1e308, 1e-308, float("nan"), float("inf"), 10**400, None, True, False, [], {}, [[]], {"": {}}),
    *([1, 2], [1, [2, [3]]], {"dtype": "float32"}, {"dtype": []}, {"class": "ECA", "arguments": {"kernel_size": "x"}}),
    *({"class": [], "arguments": {}}, {"class": "os.system", "arguments": {"command": "id"}}, list(range(1000))),
)


def odd(rng: random.Random) -> Any:
    """A value that a reader may not expect."""
    return rng.choice(TEXTS) if rng.random() < 0.4 else rng.choice(ODD)


def blind(data: bytes, rng: random.Random) -> bytes:
    """Changes bytes: flips, numbers, insertions, deletions, repetitions, a cut."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, length = rng.randrange(len(out) + 1), rng.choice((1, 2, 4, 8, rng.randrange(1, 65)))
        kind = rng.randrange(8)
        if kind <= 1 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2 and at < len(out):
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 3:
            size = rng.choice((1, 2, 4, 8))
            number = (rng.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
            out[at : at + size] = number
        elif kind == 4:
            out[at:at] = rng.randbytes(length)
        elif kind == 5:
            del out[at : at + length]
        elif kind == 6:
            start = rng.randrange(len(out) + 1)
            out[at:at] = out[start : start + length] * rng.choice((1, 1, 50))
        elif rng.random() < 0.3:
            del out[at:]
    return bytes(out)


def sometimes_blind(mutation: Mutation, share: float = 0.3) -> Mutation:
    """The mutation, or a blind one; that also where the bytes are too damaged for the first."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if rng.random() >= share:
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return mutation(data, rng)
        return blind(data, rng)

    return mutate


def value(given: Any, rng: random.Random) -> Any:
    """Changes one place of a JSON value."""
    if isinstance(given, dict) and given and rng.random() < 0.9:
        out, key = dict(given), rng.choice(list(given))
        kind = rng.randrange(8)
        if kind == 0:
            del out[key]
        elif kind == 1:
            out[rng.choice(TEXTS)] = out.pop(key)
        elif kind == 2:
            out[rng.choice([*given, *TEXTS])] = odd(rng)
        else:
            out[key] = value(out[key], rng)
        return out
    if isinstance(given, list) and given and rng.random() < 0.8:
        items, at = list(given), rng.randrange(len(given))
        kind = rng.randrange(6)
        if kind == 0:
            del items[at]
        elif kind == 1:
            items[at:at] = [items[at]] * rng.choice((1, 2, 40))
        elif kind == 2:
            items.append(odd(rng))
        else:
            items[at] = value(items[at], rng)
        return items
    if isinstance(given, int) and not isinstance(given, bool) and rng.random() < 0.5:
        return given + rng.choice((-1, 1, 7, -given, given))
    if isinstance(given, str) and rng.random() < 0.4:
        at = rng.randrange(len(given) + 1)
        return given[:at] + rng.choice(TEXTS) + given[at + rng.randrange(2) :]
    if rng.random() < 0.02:
        for _ in range(rng.choice((3, 40, 5000))):
            given = [given]
        return given
    return odd(rng)


def _json(data: bytes, rng: random.Random) -> bytes:
    changed = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        changed = value(changed, rng)
    return json.dumps(changed, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


as_json = sometimes_blind(_json, 0.15)
"""Changes values, types and keys of JSON."""


def _safetensors(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header, body = as_json(data[8 : 8 + length], rng), data[8 + length :]
    if rng.random() < 0.3:
        body = blind(body, rng)
    return struct.pack("<Q", len(header)) + header + body


safetensors = sometimes_blind(_safetensors)
"""Changes the JSON of the header, whose length stays right."""

_DESCRIPTIONS = (
    "<f4",
    ">f8",
    "|b1",
    "|O",
    "<U9",
    "|V2",
    "<c8",
    "|S3",
    "[('a', '<f4')]",
    "<M8[s]",
    "<f2",
    "|i1",
    "{}",
    "<i9",
)


def _npy(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[8:10], "little")
    text, body = data[10 : 10 + length].decode("latin1"), data[10 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        text = re.sub(r"'descr': [^,]*", lambda _: f"'descr': {rng.choice(_DESCRIPTIONS)!r}", text)
    elif kind <= 2:
        sizes = [
            rng.choice([*NUMBERS, 3, 4, 5, "True", "1.0", "'a'", "()"]) for _ in range(rng.choice((0, 1, 2, 3, 33, 70)))
        ]
        text = re.sub(r"'shape': \([^)]*\)", f"'shape': ({''.join(f'{size},' for size in sizes)})", text)
    elif kind == 3:
        text = text.replace("False", rng.choice(("True", "0", "None", "[]")))
    elif kind == 4:
        text = blind(text.encode("latin1"), rng).decode("latin1")
    else:
        body = blind(body, rng)
    raw = text.encode("latin1")
    return data[:6] + bytes((rng.choice((1, 1, 1, 1, 2, 3)), 0)) + struct.pack("<H", len(raw) & 0xFFFF) + raw + body


npy = sometimes_blind(_npy, 0.2)
"""Changes the header of an array of NumPy's, whose length stays right."""


def members(data: bytes) -> list[tuple[str, bytes]]:
    """Names and contents of a ZIP archive's members."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def archive(content: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A ZIP archive of these members."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that occur twice
        for name, each in content:
            made.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), each, method)
    return out.getvalue()


def zipped(member: Callable[[str], Mutation], share: float = 0.3) -> Mutation:
    """Changes members of a ZIP archive, whose checksums stay right.

    Args:
      member: the mutation of a member by its name.
      share: of blind mutations of the whole.
    """

    def mutate(data: bytes, rng: random.Random) -> bytes:
        content = members(data)
        at = rng.randrange(len(content))
        name, raw = content[at]
        kind = rng.randrange(12)
        if kind == 0:
            content[at] = (rng.choice(TEXTS).replace("\x00", "") + rng.choice(("", ".npy")) or "x", raw)
        elif kind == 1:
            content.append((name if rng.random() < 0.5 else f"{name}/{rng.choice(TEXTS)}", raw))
        elif kind == 2:
            del content[at]
        elif kind == 3:
            other = rng.randrange(len(content))
            content[at] = (name, content[other][1])
        else:
            content[at] = (name, member(name)(raw, rng))
        methods = (zipfile.ZIP_STORED,) * 6 + (
            zipfile.ZIP_DEFLATED,
            zipfile.ZIP_DEFLATED,
            zipfile.ZIP_BZIP2,
            zipfile.ZIP_LZMA,
        )
        return archive(content, rng.choice(methods))

    return sometimes_blind(mutate, share)


def _png(data: bytes, rng: random.Random) -> bytes:
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    at = rng.randrange(len(chunks))
    kind, content = chunks[at]
    choice = rng.randrange(6)
    if choice == 0:
        chunks.insert(rng.randrange(len(chunks)), chunks[at])
    elif choice == 1:
        del chunks[at]
    elif kind == b"IDAT" and choice <= 4:
        chunks[at] = (kind, zlib.compress(blind(zlib.decompress(content), rng)))
    else:
        chunks[at] = (kind, blind(content, rng))
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return data[:8] + b"".join(parts)


def image(data: bytes, rng: random.Random) -> bytes:
    """Changes an image; chunks of a PNG keep their checksums."""
    return sometimes_blind(_png)(data, rng) if data.startswith(b"\x89PNG") else blind(data, rng)


def _table(data: bytes, rng: random.Random) -> bytes:
    rows = data.split(b"\n")
    at = rng.randrange(len(rows))
    kind = rng.randrange(7)
    if kind == 0:
        rows[at:at] = [rows[at]] * rng.choice((1, 3, 200))
    elif kind == 1:
        del rows[at]
    elif kind == 2:
        rows[at] = blind(rows[at], rng)
    else:
        words = re.split(rb"([,\t :=]+)", rows[at])
        place = rng.randrange(len(words))
        new = rng.choice(TEXTS) if rng.random() < 0.6 else str(rng.choice(NUMBERS))
        if rng.random() < 0.02:
            new *= 200_000 // max(1, len(new))
        words[place] = new.encode("utf-8", "surrogatepass")
        rows[at] = b"".join(words)
    return b"\n".join(rows)


table = sometimes_blind(_table, 0.15)
"""Changes lines and words of text."""

_CRC32C = []
for _byte in range(256):
    for _ in range(8):
        _byte = _byte >> 1 ^ (0x82F63B78 if _byte & 1 else 0)
    _CRC32C.append(_byte)


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, which TensorStore's files end with (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _sealed(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(blind(data[:-4], rng))
    out[4:12] = struct.pack("<Q", len(out) + 4)  # after the magic number
    return bytes(out) + struct.pack("<I", crc32c(out))


sealed = sometimes_blind(_sealed)
"""Changes a file of an OCDBT database, whose length and checksum stay right."""
