"""Files are written atomically, whatever stops the writer."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coordexp.infra.files import lacking_room, replace_folder, replacing, write_text

SOURCE = str(Path(__file__).parents[2] / "src")


def python(code: str, *args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env={"PYTHONPATH": SOURCE}, stdout=subprocess.PIPE, text=True)


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old"
    assert path.read_text() == "half"
    with pytest.raises(TypeError), replacing(path) as temporary:
        temporary.write_text(3)  # type: ignore[arg-type]
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_a_linked_file_is_replaced_not_written_through(tmp_path: Path) -> None:
    """DVC links outputs from its cache, read-only: the cache must not change."""
    (tmp_path / "cache").write_text("cached")
    (tmp_path / "cache").chmod(0o444)
    os.link(tmp_path / "cache", tmp_path / "out")
    write_text(tmp_path / "out", "new")
    assert (tmp_path / "cache").read_text() == "cached"
    assert (tmp_path / "out").read_text() == "new"


@contextmanager
def full_disk() -> Iterator[None]:
    """Limit files to 1000 bytes, which acts like a full disk (also on logs of this test run)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_no_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with full_disk(), pytest.raises(OSError, match="File too large") as caught:
        write_text(path, "x" * 5000)
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    code = (
        "import sys, time; from pathlib import Path; from coordexp.infra.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('wrote', flush=True); time.sleep(60)\n"
    )
    with python(code, path) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "wrote\n"
        writer.send_signal(signal.SIGKILL)
    assert path.read_text() == "old"
    write_text(path, "new")  # over the files that the killed writer left
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_folder_replaces_an_older_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        write_text(tmp_path / "x.tmp" / "inner" / "a", content)
        replace_folder(tmp_path / "x.tmp", tmp_path / "x")
        assert (tmp_path / "x" / "inner" / "a").read_text() == content
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_free_disk_space_is_checked(tmp_path: Path) -> None:
    assert lacking_room(tmp_path / "not" / "there" / "yet", 1000) is None
    fault = lacking_room(tmp_path / "a", 10**18)
    assert fault is not None
    assert (fault.errno, fault.filename) == (errno.ENOSPC, str(tmp_path / "a"))
    assert "1000000000.0 GB are needed" in str(fault)
