"""`coordexp verify`: check all stored files against their hashes, and find intact copies of damaged ones.

Every file is compared once, by its bytes and never by its time stamp:

    DVC's cache     the name of an entry is the md5 of its content
    the workspace   every output recorded in dvc.lock, by its md5; other files below data/ and runs/ by the lists of
                    hashes that the stages write (infra/artefacts.py)
    .resume         saved states, fresh rollouts and stored answers by their lists, journals line by line
    images          those of the data sets and of the shards, by the sha256 that the raw stage recorded

If the workspace is linked to the cache (`cache.type` hardlink, symlink, reflink), both may be the same file. DVC trusts
linked files, so it reports a damaged one as up to date and checks it out again. Here it is reported in both places.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coordexp.config.loading import read_yaml
from coordexp.errors import CoordExpError, DamagedArtefactError
from coordexp.experiments.dvc_cache import DvcCache, Run
from coordexp.infra.artefacts import HASHES, damage, sealed_row, verified
from coordexp.infra.files import remove, write_text
from coordexp.infra.foreign import Gate
from coordexp.infra.resume import RESUME
from coordexp.records.images import MANIFEST, image_roots, image_sha256, record_source
from coordexp.records.manifest import IMAGES, read_facts
from coordexp.rollout.engine import journal_rows
from coordexp.training.state_files import generations

_TREES = ("data", "runs")
_SEALED = Gate("a file with its hash in it", DamagedArtefactError, "Run the stage that writes it again.")


@dataclass(frozen=True, slots=True)
class Fault:
    """A damaged file: its location, the damage, and the remedy or repair."""

    where: str
    what: str
    remedy: str
    is_repaired: bool = False

    def __str__(self) -> str:
        return f"{'repaired' if self.is_repaired else 'DAMAGED'}  {self.where}: {self.what}. {self.remedy}"


@dataclass(slots=True)
class Verified:
    """What was checked, one line per area, and all faults."""

    looked_at: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        """Whether all faults are repaired."""
        return all(fault.is_repaired for fault in self.faults)


Outputs = Mapping[str, tuple[str, Mapping[str, Any]]]  # path of an output -> its stage, and its entry in dvc.lock


@dataclass(frozen=True, slots=True)
class _Stored:
    """A repository, a function that runs programs in it, its DVC cache, and the outputs in dvc.lock."""

    root: Path
    run: Run
    cache: DvcCache
    outputs: Outputs


def recorded_outputs(root: Path, run: Run) -> Outputs:
    """The outputs in dvc.lock, without those that git tracks."""
    lock = root / "dvc.lock"
    stages = read_yaml(lock)["stages"] if lock.is_file() else {}
    outs = {out["path"]: (name, out) for name, stage in stages.items() for out in stage.get("outs", [])}
    of_git = run("git", "ls-files", "-z", "--", *outs).stdout.split("\0") if outs else []
    return {path: entry for path, entry in outs.items() if not any(_within(name, path) for name in of_git)}


def verify(root: Path, run: Run, repair: bool, say: Callable[[str], None]) -> Verified:
    """Verify everything that is stored in a repository.

    With `repair`, damaged entries are removed from DVC's cache, damaged files from the workspace, and damaged states
    from `.resume`. Files with an intact copy in the workspace, the cache or DVC's remote are restored.
    """
    found, stored = Verified(), _Stored(root, run, DvcCache.of(root, run), recorded_outputs(root, run))
    say("DVC's cache ...")
    bad = _check_cache(stored.cache, found)
    say("workspace ...")
    broken = _check_workspace(stored, found)
    if repair:
        _repair(stored, bad, broken)
        _report_repairs(stored, bad, broken, found)
    say(".resume ...")
    _check_resume(root / RESUME, repair, found)
    say("images ...")
    _check_images(root, found)
    return found


def _check_cache(cache: DvcCache, found: Verified) -> dict[str, Path]:
    """The damaged entries by md5."""
    bad, n_bytes, n = {}, 0, 0
    for path in cache.entries():
        n, n_bytes = n + 1, n_bytes + path.stat().st_size
        named = path.parent.name + path.name
        if cache.md5_of(path) != named.removesuffix(".dir"):
            bad[named] = path
            found.faults.append(Fault(str(path), "the md5 of its content differs from its name", _AGAIN))
    found.looked_at.append(f"DVC's cache: {n} entries, {_size(n_bytes)}, {len(bad)} damaged")
    return bad


_AGAIN = "`coordexp verify --repair` removes it"


def _check_workspace(stored: _Stored, found: Verified) -> dict[str, tuple[str, str]]:
    """The damaged files: path -> stage that writes it, and the md5 it should have."""
    root, cache = stored.root, stored.cache
    broken: dict[str, tuple[str, str]] = {}
    n_files, listed = 0, set()
    for path, (stage, out) in stored.outputs.items():
        files = cache.files_of(out)
        if not (root / path).exists() or files is None:
            continue  # not checked out; or the cache lacks its list, and only its own hashes can be checked
        listed.add(path)
        changed = {name for name, md5 in files.items() if not _is(cache, root / name, md5)}
        n_files += len(files)
        if changed and _is_another_result(root / path, changed, path):
            found.looked_at.append(f"{path}: intact, but not the result in dvc.lock: see `dvc status`")
            continue
        for name in sorted(changed):
            broken[name] = stage, files[name]
            what = "the content differs from dvc.lock" if (root / name).exists() else "missing"
            found.faults.append(Fault(name, what, "`coordexp verify --repair` restores it, or names a command"))
    lists = [path for tree in _TREES for path in sorted((root / tree).rglob(HASHES))]
    own = [path.parent for path in lists if not any(path.is_relative_to(root / out) for out in listed)]
    for folder in own:
        found.faults += [Fault(*line.partition(": ")[::2], "") for line in damage(folder)]
    found.looked_at.append(
        f"workspace: {len(listed)} outputs of dvc.lock with {n_files} files, {len(own)} other folders with hashes, "
        f"{len(broken)} files damaged"
    )
    return broken


def _is(cache: DvcCache, path: Path, md5: str) -> bool:
    try:
        return path.is_file() and cache.md5_of(path) == md5
    except OSError:  # unreadable
        return False


def _is_another_result(path: Path, changed: Iterable[str], name: str) -> bool:
    """Whether an output that differs from dvc.lock is an intact, later result of its stage."""
    if (path / HASHES).is_file():
        return f"{name}/{HASHES}" in changed and not any(damage(path))
    try:
        return bool(_SEALED.read_sealed(path))
    except DamagedArtefactError:
        return False


def _repair(stored: _Stored, bad: Mapping[str, Path], broken: Mapping[str, tuple[str, str]]) -> None:
    root, run, cache, outputs = stored.root, stored.run, stored.cache, stored.outputs
    good = _copies(stored, {*bad, *(md5 for _, md5 in broken.values())})
    for path in bad.values():
        path.unlink()
    for md5, path in good.items():
        if not cache.holds(md5):
            cache.add(path, md5)
    for name, (_, md5) in broken.items():
        if cache.holds(md5) or _is_damaged(root / name):  # otherwise DVC would treat it as its own, intact link
            remove(root / name)
    cache.forget()
    wanted = {path for path, (_, out) in outputs.items() if any(_within(name, path) for name in broken)}
    wanted |= {path for path, (_, out) in outputs.items() if out.get("md5") in bad}
    lacking = {path for path in wanted if not _is_there(cache, outputs[path][1])}
    if lacking and run("dvc", "remote", "list").stdout.strip():
        run("dvc", "fetch", *sorted(lacking))
    whole = sorted(path for path in wanted if _is_there(cache, outputs[path][1]))
    if whole:
        run("dvc", "checkout", "--force", *whole)


def _is_damaged(path: Path) -> bool:
    """Whether a file that differs from dvc.lock is certainly damaged, by its own hash."""
    try:
        verified(path)
    except DamagedArtefactError:
        return True
    return False


def _copies(stored: _Stored, wanted: set[str]) -> dict[str, Path]:
    """Intact files of the workspace and of fetched revisions, by md5, for the wanted md5s."""
    root, cache = stored.root, stored.cache
    found: dict[str, Path] = {}
    for _, out in stored.outputs.values():
        for name, md5 in (cache.files_of(out) or {}).items():
            if md5 in wanted and _is(cache, root / name, md5):
                found[md5] = root / name
    for path in (root / "runs" / "revisions").rglob("*"):
        if path.is_file() and (md5 := cache.md5_of(path)) in wanted:
            found.setdefault(md5, path)
    return found


def _is_there(cache: DvcCache, out: Mapping[str, Any]) -> bool:
    files = cache.files_of(out)
    return files is not None and all(map(cache.holds, files.values()))


def _report_repairs(
    stored: _Stored, bad: Mapping[str, Path], broken: Mapping[str, tuple[str, str]], found: Verified
) -> None:
    """Replace each fault by one with the outcome of the repair."""
    root, cache = stored.root, stored.cache
    of_entry = {str(path): md5 for md5, path in bad.items()}
    for place, fault in enumerate(found.faults):
        if md5 := of_entry.get(fault.where):
            kept = cache.holds(md5)
            users = [stage for stage, out in stored.outputs.values() if md5 in _named(cache, out)]
            again = f"; make it again: dvc repro {' '.join(sorted(set(users)))}" if users and not kept else ""
            remedy = "restored from an intact copy" if kept else f"removed from the cache{again}"
            found.faults[place] = Fault(fault.where, fault.what, remedy, kept or not users)
        elif fault.where in broken:
            stage, md5 = broken[fault.where]
            if _is(cache, root / fault.where, md5):
                found.faults[place] = Fault(fault.where, fault.what, "restored from an intact copy", True)
            else:
                is_gone = not os.path.lexists(root / fault.where)
                gone, again = (", and the file was removed", "") if is_gone else ("", "--force --single-item ")
                remedy = f"there is no intact copy{gone}; make it again: dvc repro {again}{stage}"
                found.faults[place] = Fault(fault.where, fault.what, remedy)


def _named(cache: DvcCache, out: Mapping[str, Any]) -> set[str]:
    return {out.get("md5", ""), *(cache.files_of(out) or {}).values()}


def _within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}/")


def _check_resume(resume: Path, repair: bool, found: Verified) -> None:
    """Check saved states and other folders with hashes; remove damaged ones, so that runs use earlier states."""
    states = {state for folder in resume.glob("*") for state in generations(folder)}
    folders = sorted(states | {path.parent for path in resume.rglob(HASHES)})
    for folder in folders:
        for line in list(damage(folder))[:1]:
            where, _, what = line.partition(": ")
            remedy = "removed: the run resumes from the previous state, or from step 0" if repair else _AGAIN
            found.faults.append(Fault(where, what.partition(". ")[0], remedy, repair))
            if repair:
                remove(folder)
    n_lines = sum(_check_journal(path, repair, found) for path in sorted(resume.rglob("generations*.jsonl")))
    found.looked_at.append(f".resume: {len(folders)} folders with hashes, {n_lines} answers in journals")


def _check_journal(path: Path, repair: bool, found: Verified) -> int:
    rows, damaged = journal_rows(path)
    if damaged:
        what = f"{len(damaged)} lines are damaged; the first: {damaged[0]}"
        found.faults.append(Fault(str(path), what, "Their answers are generated again", True))
    if damaged and repair:
        write_text(path, "".join(json.dumps(sealed_row(row)) + "\n" for row in rows.values()))
    return len(rows)


def _check_images(root: Path, found: Verified) -> None:
    """Check the images of each raw folder, in files and in shards, by their recorded sha256."""
    n = 0
    for manifest in sorted((root / "data").glob(f"*/raw/{MANIFEST}")):
        folder = manifest.parent
        try:
            roots = image_roots(folder) if (folder / IMAGES).is_file() else {}
            facts = read_facts(folder) if roots else {}
        except CoordExpError as error:
            found.faults.append(Fault(str(folder), str(error), ""))
            continue
        for name, recorded in ((f"{s}/{f.name}", f) for s, rows in facts.items() for f in rows.values()):
            if recorded.sha256:
                n += 1
                found.faults += _image_fault(folder, name, recorded.sha256)
    found.looked_at.append(f"images: {n}")


def _image_fault(folder: Path, name: str, expected: str) -> list[Fault]:
    try:
        source = record_source(folder, name)
        digest = image_sha256(source)
    except DamagedArtefactError as error:
        return [Fault(name, str(error), "")]
    except CoordExpError as error:
        return [Fault(name, str(error).rstrip("."), "Restore it from the source of the data set")]
    if digest == expected:
        return []
    what = f"sha256 {digest[:16]}, but the raw stage recorded {expected[:16]}"
    remedy = "Restore it from the source of the data set; if the change is intended, run dvc repro --force raw"
    return [Fault(f"{name} ({os.fspath(source) if isinstance(source, Path) else source})", what, remedy)]


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
