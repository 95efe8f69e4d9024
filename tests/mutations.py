"""Seeded damage to foreign files: to their bytes, and to the values in them, at any depth."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP = "[" * 5000 + "]" * 5000
# Replacement values of every type and of unusual sizes.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**25, 0.5, -2.5, 1e308, 1e-320),
    *("", "x", "1", "0.9", "true", "../x", "/etc/passwd", "\x00", "\x1b[2J", "ż" * 300, "a\nb"),
    *([], {}, [[]], [None], {"": {}}, {"a": 1}, [1, "a"], ["a", "b", "c", "d"], [1e9, 2e9, 1, 2]),
)


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with each of its keys or indices."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list) and value:
            yield from places(value)


def mutated(tree: Any, rng: random.Random, faults: int = 1) -> Any:
    """A copy of a JSON tree with values replaced, wrapped, removed, renamed or exchanged."""
    tree = copy.deepcopy(tree)
    for _ in range(faults):
        if not (found := list(places(tree))):
            break
        holder, key = rng.choice(found)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1:
                holder[key] = [holder[key]]
            case 2 if isinstance(holder, dict):
                holder[key + rng.choice("sx_")] = holder.pop(key)
            case 3:
                other, place = rng.choice(found)
                holder[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else other[place : place + 1])
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD))
    return tree


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The bytes of a text file: truncated, with flipped bits, in another encoding, or with unexpected content."""
    at = rng.randrange(len(content) + 1)
    match rng.randrange(9):
        case 0:
            return content[:at]
        case 1:
            flipped = bytearray(content)
            for _ in range(rng.randrange(1, 4)):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 2:
            return content.decode(errors="replace").encode("utf-16")
        case 3:
            return content[:at] + rng.choice([b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"NaN", b"\n"]) + content[at:]
        case 4:
            return content[:at] + DEEP.encode() + content[at:]
        case 5:
            return rng.choice(
                [b"", b"null", b"[]", b"3", b'"x"', b"NaN", DEEP.encode(), b"9" * 5000, b"\xff\xd8\xff\xe0"]
            )
        case 6:
            return content[at:]
        case 7:
            end = min(len(content), at + rng.randrange(1, 200))
            return content[:at] + content[at:end] * 2 + content[end:]
        case _:
            numbers = [i for i, byte in enumerate(content) if 48 <= byte <= 57]
            place = rng.choice(numbers) if numbers else 0
            return (
                content[:place]
                + rng.choice([b"1e999", b"-", b"0x1", b"9" * 4400, b"1.5", b"true"])
                + content[place + 1 :]
            )


def broken(value: Any, rng: random.Random) -> bytes:
    """The JSON text of a value that is damaged in one of these ways."""
    if rng.random() < 0.7:
        return json.dumps(mutated(value, rng, rng.randrange(1, 4))).encode()
    return damaged(json.dumps(value).encode(), rng)
