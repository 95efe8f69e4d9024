"""One name per category, before training: unify names that evaluation cannot distinguish.

Evaluation looks up a prediction by its normalized name (`records.descriptions.normalise_desc`), so it cannot
distinguish "Person" from "person".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from coordexp.errors import DataError
from coordexp.records.categories import Category, clashing, shown_clash
from coordexp.records.descriptions import clean_desc, normalise_desc
from coordexp.records.policy import RecordSet
from coordexp.records.schema import ObjectRecord, Record

_LISTS = ("absent", "not_exhaustive")  # keys with lists of names in a record's metadata


@dataclass(slots=True)
class SettledNames:
    """The categories of each set without clashes, and the spelling of names."""

    categories: dict[str, tuple[Category, ...]] = field(default_factory=dict)  # by set
    spelling: dict[str, str] = field(default_factory=dict)  # name as found -> name as written; only changed names
    unused: dict[str, list[str]] = field(default_factory=dict)  # set -> omitted categories, in words
    merged: dict[str, list[str]] = field(default_factory=dict)  # set -> names with another spelling, in words
    refused: dict[str, list[str]] = field(default_factory=dict)  # set -> clashes that the user must resolve

    def notes(self) -> list[str]:
        """One line per change."""
        listed = (
            (name, text) for found in (self.unused, self.merged) for name, texts in found.items() for text in texts
        )
        return [f"{name}: {text}" for name, text in listed]


def settle_names(sets: Mapping[str, Sequence[RecordSet]]) -> SettledNames:
    """Unify the names of data sets, each with the records of its splits.

    Within a set, of two categories with the same name, the one without annotations is omitted; two annotated ones are
    an error. Across sets, and among undeclared names, one spelling is kept: that of the first set, where a declared
    spelling takes precedence over the most frequent one.
    """
    result = SettledNames()
    kept: dict[str, str] = {}  # normalised name -> spelling
    for name, splits in sets.items():
        annotated: Counter[tuple[int | None, str]] = Counter()
        for split in splits:
            annotated.update(split.annotated)
        # The last split is val, whose ids an evaluation server uses.
        declared = next((split.categories for split in reversed(splits) if split.categories), ())
        result.categories[name] = _one_of_each(name, declared, annotated, result)
        for found in _by_preference(result.categories[name], declared, annotated):
            spelling = kept.setdefault(normalise_desc(found), found)
            if spelling != found:
                result.spelling[found] = spelling
                result.merged.setdefault(name, []).append(f"{found!r} is written {spelling!r}")
        written = (replace(c, name=result.spelling.get(c.name, c.name)) for c in result.categories[name])
        result.categories[name] = tuple(written)
    return result


def refuse_clashes(names: SettledNames) -> None:
    """Raise DataError if a set has annotations of two categories with the same name."""
    if names.refused:
        raise DataError("\n".join(f"{name}: {text}" for name, texts in names.refused.items() for text in texts))


def respelled(records: Iterable[Record], spelling: Mapping[str, str]) -> Iterable[Record]:
    """The records with the final spelling of all names."""
    return (_respelled(record, spelling) for record in records) if spelling else records


def _one_of_each(
    name: str, declared: Sequence[Category], annotated: Mapping[tuple[int | None, str], int], result: SettledNames
) -> tuple[Category, ...]:
    left_out = {c.id for c in declared if c.is_root and (c.id, clean_desc(c.name)) not in annotated}
    for c in declared:
        if c.id in left_out:
            text = f"category {c.id} {c.name!r} is the parent of the others and has no annotation: omitted"
            result.unused.setdefault(name, []).append(text)
    for group in clashing(c for c in declared if c.id not in left_out):
        used = [c for c in group if (c.id, clean_desc(c.name)) in annotated]
        if len(used) > 1:
            text = f"{shown_clash(used)}, and both have annotations: rename one, or give the objects of both one id."
            result.refused.setdefault(name, []).append(text)
            continue
        stays = used[0] if used else group[0]
        gone = [c for c in group if c is not stays]
        left_out |= {c.id for c in gone}
        text = f"{shown_clash(group)}; {stays.id} {stays.name!r} is kept, the other has no annotation"
        result.unused.setdefault(name, []).append(text)
    return tuple(c for c in declared if c.id not in left_out)


def _by_preference(
    categories: Iterable[Category], declared: Iterable[Category], annotated: Mapping[tuple[int | None, str], int]
) -> list[str]:
    """Every name of a set once; the preferred spelling comes before others."""
    counts: Counter[str] = Counter()
    for (_, desc), count in annotated.items():
        counts[desc] += count
    names = [str(clean_desc(c.name)) for c in categories]
    names += [desc for desc, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return list(dict.fromkeys([*names, *(c.name for c in declared)]))


def _respelled(record: Record, spelling: Mapping[str, str]) -> Record:
    objects = tuple(_named(o, spelling) for o in record.objects)
    metadata = dict(record.metadata)
    for key in _LISTS:
        if key in metadata:
            metadata[key] = sorted({spelling.get(n, n) for n in metadata[key]})
    if "phrase" in metadata:
        metadata["phrase"] = spelling.get(metadata["phrase"], metadata["phrase"])
    return replace(record, objects=objects, metadata=metadata)


def _named(obj: ObjectRecord, spelling: Mapping[str, str]) -> ObjectRecord:
    return replace(obj, desc=spelling[obj.desc]) if obj.desc in spelling else obj
