"""Which values of params.yaml the arms of answered questions compare: "By parameter" in the list of answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from coordexp.config.block import field_specs
from coordexp.config.loading import load_params
from coordexp.config.presets import leaves
from coordexp.config.question import UNASKED, Arm, load_question, question_names
from coordexp.config.schema import Params
from coordexp.reporting.markdown import table

Compared = Mapping[str, Mapping[str, list[str]]]  # key of params.yaml -> value -> names of questions


def compared_values(answered: Mapping[str, Mapping[str, Any]], root: Path) -> Compared:
    """The values of each key that differ between arms of one question, or that an arm states.

    Args:
        answered: name of a question -> its arms that ran, by name, with `presets` and `changes`.
        root: the repository, for the committed values and the presets.
    """
    committed = dict(leaves(load_params(root / "params.yaml").model_dump()))
    known = question_names(root)
    found: dict[str, dict[str, list[str]]] = {}
    for name, arms in answered.items():
        common = load_question(name, root).changes if name in known else ()
        told = [Arm.model_validate(arm) for arm in arms.values()]
        changed = [_values([*common, *arm.stated(root)], committed) for arm in told]
        # The start of a schedule acts in the arm that sets its fraction; that arm states it at its committed value.
        stated = {change.partition("=")[0] for arm in told for change in arm.changes}
        for key in committed:
            values = {values.get(key, _shown(committed[key])) for values in changed}
            for value in values if len(values) > 1 or key in stated else ():
                found.setdefault(key, {}).setdefault(value, []).append(name)
    return found


def compared_markdown(compared: Compared, root: Path) -> list[str]:
    """The table of compared values with links to the pages, and what is not compared yet."""
    committed = dict(leaves(load_params(root / "params.yaml").model_dump()))
    rows = []
    for key in (key for key in committed if key in compared):
        values = sorted(compared[key], key=_order)
        names = dict.fromkeys(name for value in values for name in compared[key][value])
        shown = (f"**{value}**" if value == _shown(committed[key]) else value for value in values)
        rows.append([f"`{key}`", ", ".join(shown), ", ".join(f"[{name}]({name}.md)" for name in sorted(names))])
    lines = [
        "## By parameter",
        "Values of `params.yaml` that arms of a question compare, some with other keys at once. The committed value is "
        "bold.",
        table(["key", "compared", "questions"], rows, "lll") if rows else "None yet.",
    ]
    if missing := _missing(compared, committed):
        lines.append(f"Not compared yet: {', '.join(missing)}.")
    lines.append(
        "Some keys are not varied, for a reason ([parameters](../../docs/parameters.md#keys-that-no-question-varies))."
    )
    return lines


def _missing(compared: Compared, committed: Mapping[str, Any]) -> list[str]:
    """Keys, and choices of a key, that no arm has."""
    keys = [f"`{key}`" for key in committed if key not in compared and key not in UNASKED]
    for spec in field_specs(Params):
        values = compared.get(spec.key, spec.choices)
        keys += [f"`{spec.key}: {name}`" for name in spec.choices if name not in values]
    return keys


def _values(changes: Iterable[str], committed: Mapping[str, Any]) -> dict[str, str]:
    """The values that the changes leave, by key; a later one replaces an earlier one, and other files do not count."""
    pairs = (change.partition("=") for change in changes)
    return {key: _shown(type(committed[key])(text)) for key, _, text in pairs if key in committed}


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _order(text: str) -> tuple[bool, float, str]:
    """Numbers by size, before words."""
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text
