"""Errors a user can cause, and the process exit codes they map to (public: scripts may rely on them).

Every message says what was found, where (file:line or full dotted key), what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 2  # bad configuration or data
EXIT_SKIPPED = 3  # done, but inputs that cannot be used were left out and named (`--on-error skip`)
EXIT_INTERRUPTED = 75  # run the same command again: it resumes


class CoordExpError(Exception):
    """Base of all errors that a user can mend."""


class ConfigError(CoordExpError):
    """A parameter is unknown, of the wrong type, out of range, or removed."""


class DataError(CoordExpError):
    """A record, annotation, image or prediction breaks its contract."""


class PictureError(DataError):
    """One picture cannot be read, or not be given to a model; the others can."""


class DamagedArtefactError(DataError):
    """A stored file is not the one that was written: a bit changed, it was cut or edited, or it is gone."""


class CheckpointError(CoordExpError):
    """A checkpoint directory is missing something, or does not fit the tokenizer or the task."""


class TrainingError(CoordExpError):
    """Training cannot go on: a loss is not finite, or one of its processes failed."""


class ServerError(CoordExpError):
    """A vLLM server does not start, does not answer, or answers what is no answer."""


class ProcessError(CoordExpError):
    """A process that was to decode ended before its work was done."""


class BusyError(CoordExpError):
    """Another process is at the same work."""


class Interrupted(CoordExpError):
    """The stage was asked to stop and saved its state; running it again resumes."""


def closest(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest valid name, or the empty string."""
    found = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
