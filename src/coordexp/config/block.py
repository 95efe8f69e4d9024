"""The base class of parameter blocks, and a description in words of what each field accepts.

Error messages and the generated parameter reference share these words, so the two cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

NOUNS = {bool: "true or false", int: "an integer", float: "a number", str: "non-empty text"}

Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
# YAML has lists but no tuples, so the conversion is not strict; the items still are.
IouList = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False, min_length=1)]
TextList = Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
_Decay = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[_Decay, _Decay], Field(strict=False)]


class Block(BaseModel):
    """A frozen block of parameters. An unknown key, a missing key, and a value of another type are errors."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class FieldSpec:
    """One parameter, as documents and messages show it."""

    key: str  # full dotted key
    expected: str  # "a number in [0, 1]"
    description: str
    choices: tuple[str, ...]  # all values of a key that takes one of several words, else empty


def field_specs(block: type[Block], prefix: str = "") -> Iterator[FieldSpec]:
    """Yield the leaves of a block in the order of declaration, with dotted keys for nested blocks."""
    for name, field in block.model_fields.items():
        if inner := nested_block(field):
            yield from field_specs(inner, f"{prefix}{name}.")
        elif kinds := block_kinds(field):
            for inner in kinds.values():
                yield from field_specs(inner, f"{prefix}{name}.")
        elif inner := named_blocks(field):
            yield from field_specs(inner, f"{prefix}{name}.<name>.")
        else:
            yield FieldSpec(prefix + name, expectation(field), field.description or "", choices(field))


def nested_block(field: FieldInfo) -> type[Block] | None:
    """The block class of a field that holds a block, else None."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Block) else None


def block_kinds(field: FieldInfo) -> dict[str, type[Block]]:
    """The block classes of a field that holds one of several, by the value of its discriminator key."""
    if not isinstance(field.discriminator, str):
        return {}
    blocks = get_args(field.annotation)
    return {get_args(block.model_fields[field.discriminator].annotation)[0]: block for block in blocks}


def named_blocks(field: FieldInfo) -> type[Block] | None:
    """The block class of a field that maps user-chosen names to blocks (or is null), else None."""
    kinds = [kind for kind in get_args(field.annotation) if get_origin(kind) is dict]
    kind = kinds[0] if accepts_null(field) and kinds else field.annotation
    args = get_args(kind)
    if get_origin(kind) is dict and isinstance(args[1], type) and issubclass(args[1], Block):
        return args[1]
    return None


def accepts_null(field: FieldInfo) -> bool:
    """Whether a field may be null."""
    return type(None) in get_args(field.annotation)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The words of which a field accepts one, if it accepts nothing else."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def expectation(field: FieldInfo) -> str:
    """What a field accepts, in words: the type, then the range or the choices."""
    kind = field.annotation
    if inner := named_blocks(field):
        words = f"a block of one or more names, each a block with the keys {', '.join(inner.model_fields)}"
        return f"null, or {words}" if accepts_null(field) else words
    if inner := nested_block(field):
        return f"a block with the keys {', '.join(inner.model_fields)}"
    if kinds := block_kinds(field):
        return f"a block with the key {field.discriminator}: {' or '.join(kinds)}"
    if names := choices(field):
        return f"one of {', '.join(names)}"
    if get_origin(kind) is tuple:
        noun = "a non-empty list" if any(isinstance(m, MinLen) for m in field.metadata) else "a list"
        size = noun if ... in get_args(kind) else f"a list of {len(get_args(kind))}"
        return f"{size}, each item {expectation(list_item(field))}"
    assert kind in NOUNS, f"no words for the type {kind!r}"
    steps = [f", a multiple of {m.multiple_of}" for m in field.metadata if isinstance(m, MultipleOf)]
    return NOUNS[kind] + _interval(field) + "".join(steps)


def list_item(field: FieldInfo) -> FieldInfo:
    """The field of one item of a list-valued field."""
    return FieldInfo.from_annotation(get_args(field.annotation)[0])


def _interval(field: FieldInfo) -> str:
    """The range of a number: " in [0, 1)", " >= 1", or nothing."""
    rules = field.metadata
    lows = [("[", ">=", r.ge) if isinstance(r, Ge) else ("(", ">", r.gt) for r in rules if isinstance(r, Ge | Gt)]
    highs = [("]", "<=", r.le) if isinstance(r, Le) else (")", "<", r.lt) for r in rules if isinstance(r, Le | Lt)]
    match lows, highs:
        case [(opening, _, low)], [(closing, _, high)]:
            return f" in {opening}{low}, {high}{closing}"
        case ([(_, sign, bound)], []) | ([], [(_, sign, bound)]):
            return f" {sign} {bound}"
    return ""
