"""The questions in configs/questions/: selecting them, and from a question's file to its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coordexp.config.question import QUESTIONS, TRAINED, UNASKED, Question, load_question, question_names
from coordexp.errors import ConfigError
from coordexp.evaluation.evaluator import rounded
from coordexp.experiments.compare import run_study
from coordexp.experiments.dependencies import ParameterFiles
from coordexp.experiments.report import write_report
from coordexp.experiments.runs import Repository
from coordexp.infra.files import write_text
from coordexp.infra.provenance import write_json
from coordexp.reporting.questions import (
    ANSWERS,
    BUDGETS,
    INDEX,
    KEPT_NUMBERS,
    answer_sentence,
    index_markdown,
    rule_words,
    stored_answers,
    write_answer,
)

RULE = ("arm", "baseline", "metric", "expected", "than", "margin")


def choose_questions(
    root: Path, names: Sequence[str], every: bool, arms: Sequence[str], seeds: int | None, profile: str
) -> dict[str, Question]:
    """The named questions, or all of the profile, restricted to the given arms, seeds and profile.

    Raises:
        ConfigError: an unknown question or arm, or names together with `every`.
    """
    if bool(names) == every or (arms and len(names) != 1):
        raise ConfigError("answer: expected IDs or --all; --arm needs one ID. `coordexp answer --list` lists the IDs.")
    asked = {name: load_question(name, root) for name in names or question_names(root)}
    if every:
        own = profile or ParameterFiles.of(root).profile_name
        asked = {name: question for name, question in asked.items() if question.profile in ("", own)}
    changes: dict[str, Any] = {"profile": profile} if profile else {}
    changes |= {"seeds": seeds} if seeds else {}
    return {name: _changed(question.only(arms), changes) for name, question in asked.items()}


def _changed(question: Question, changes: Mapping[str, Any]) -> Question:
    """The question with these changes; one without training is never repeated."""
    repeated = {**changes, "seeds": 1} if question.budget == "decoding" else changes
    return question.model_copy(update=dict(repeated))


def question_lines(root: Path, profile: str) -> list[str]:
    """Every question with its arms, budget, decision rule and, if it has been run, its answer.

    At the end, the parameters without a question, with the reason.
    """
    answers = {row.name: row for row in stored_answers(root)}
    lines = []
    for name in question_names(root):
        question = load_question(name, root)
        on = f" (profile {question.profile})" if question.profile not in ("", profile) else ""
        lines.append(f"{name}: {question.question}{on}")
        times = f"{question.seeds} seeds" if question.seeds > 1 else "once"
        times += " of stage 2" if question.repeat == "stage2" else ""
        lines.append(f"  arms: {', '.join(question.arms)}; {times}; {BUDGETS[question.budget]}")
        rules = [rule_words(claim.model_dump()) for claim in question.claims.values()]
        more = f", and {len(rules) - 1} more" if len(rules) > 1 else ""
        lines.append(f"  rule: {rules[0]}{more}" if rules else "  no rule: measurement only")
        lines.append(f"  {answers[name].answer}  {answers[name].page}" if name in answers else "  not answered yet")
    return [*lines, "", "Parameters without a question:", *(f"  {key}: {why}" for key, why in UNASKED.items())]


def answer_question(repository: Repository, question: Question, name: str) -> tuple[Path, str]:
    """Run missing experiments and write the pages after each seed; returns the page and the answer in a sentence.

    Raises:
        ConfigError, Interrupted, CoordExpError: as `run_study`; also if a rule changed after it was evaluated.
    """
    whole = load_question(name, repository.root)
    own, asked = (_profile(repository.root, one) for one in (whole, question))
    place, tried = (ANSWERS, "") if asked == own else (ANSWERS / asked, f" --profile {asked}")
    folder = repository.root / place
    rules = _evaluated_rules(folder / f"{name}.json")
    _check_rules(rules, folder / f"{name}.json", question, name)
    left_out = [arm for arm in whole.arms if arm not in question.arms]
    dropped = [claim.text for key, claim in whole.claims.items() if key not in question.claims]
    about: dict[str, Any] = {"left_out": left_out, "left_out_claims": dropped, "planned_seeds": whole.seeds}
    about["first_claim"] = next(iter(whole.claims), "")

    def told(found: Mapping[str, Any], runs: Mapping[str, Sequence[Any]]) -> None:
        numbers = {**found, **about, "rules": rules | _rules(found["claims"])}
        write_json(folder / f"{name}.json", numbers)
        logs = {arm: [run.log for run in repeated] for arm, repeated in runs.items()}
        write_report(numbers, logs, folder / "details")
        write_answer(numbers, folder, f"coordexp answer {name}{tried}")

    numbers = run_study(repository, question, name, told)
    if asked == own:
        write_text(repository.root / INDEX, index_markdown(repository.root))
    return place / f"{name}.md", answer_sentence(numbers | about)


def _profile(root: Path, question: Question) -> str:
    return ParameterFiles.of(root, question.profile).profile_name


def _evaluated_rules(path: Path) -> dict[str, dict[str, Any]]:
    """The rules by which stored numbers were evaluated, by claim, also of arms that the last run left out."""
    before = KEPT_NUMBERS.read_object(path) if path.is_file() else {}
    return _rules(before.get("claims", [])) | before.get("rules", {})


def _rules(claims: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(claim.get("claim")): {part: claim.get(part) for part in RULE} for claim in claims}


def _check_rules(rules: Mapping[str, Mapping[str, Any]], path: Path, question: Question, name: str) -> None:
    """Raise ConfigError if a claim was evaluated by another rule before.

    The rules are preregistered: a rule that is changed after its numbers are known can be fitted to them.
    """
    sides = {*question.arms, *TRAINED, ""}
    for key, then in rules.items():
        claim = question.claims.get(key)
        now = rounded(claim.model_dump(include={*RULE})) if claim else None
        if now != then and {then["arm"], then["baseline"]} <= sides:  # else left out by --arm
            changed = [f"{p} {then[p]!r}, now {now[p]!r}" for p in RULE if now[p] != then[p]] if now else ["it is gone"]
            raise ConfigError(
                f"{QUESTIONS / name}.yaml: claims.{key} differs from the rule by which {path} was evaluated: "
                f"{'; '.join(changed)}. A rule is fixed before its numbers are known: undo the change, or use another "
                "name for the question."
            )
