"""Read-only folders, also for tests that root runs."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# linux/capability.h: version 3 of the interface, 64 bits in two words; the capability that ignores permissions.
VERSION, WORDS, DAC_OVERRIDE = 0x20080522, 6, 1 << 1


@contextmanager
def permissions_hold() -> Iterator[None]:
    """Make permissions effective for this thread within the block, even for root."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(VERSION, 0), (ctypes.c_uint32 * WORDS)()
    if libc.capget(header, sets) != 0:
        pytest.skip("root's capabilities cannot be read here")
    effective = sets[0]
    sets[0] = effective & ~DAC_OVERRIDE
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0
