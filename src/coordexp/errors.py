"""Errors that a user can cause, and their process exit codes (public: scripts may rely on them).

Every message states what was found, where (file:line or full dotted key), what was expected, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USAGE = 2  # bad configuration or data
EXIT_SKIPPED = 3  # done, but unusable inputs were skipped and reported (`--on-error skip`)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again, and it resumes


class CoordExpError(Exception):
    """Base class of all errors that a user can fix."""


class ConfigError(CoordExpError):
    """A parameter is unknown, has the wrong type, is out of range, or was removed."""


class DataError(CoordExpError):
    """A record, annotation, image or prediction violates its contract."""


class PictureError(DataError):
    """One image cannot be read or cannot be fed to a model; the others are not affected."""


class DamagedArtefactError(DataError):
    """A stored file differs from what was written: it was corrupted, truncated, edited, or deleted."""


class CheckpointError(CoordExpError):
    """A checkpoint directory is missing something, or does not fit the tokenizer or the task."""


class TrainingError(CoordExpError):
    """Training cannot continue: a loss is not finite, or one of its processes failed."""


class ServerError(CoordExpError):
    """A vLLM server does not start, does not reply, or sends an invalid reply."""


class ProcessError(CoordExpError):
    """A worker process ended before its work was done."""


class BusyError(CoordExpError):
    """Another process is doing the same work."""


class Interrupted(CoordExpError):
    """The stage received a signal to stop and saved its state; the same command resumes it."""


def closest(name: str, valid: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the closest valid name, or the empty string."""
    found = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
