"""Files that are whole or not there."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from overpaint.policy.atomic import atomic_file, forget_partial, this_process, write_bytes, write_text

ROOT = Path(__file__).resolve().parents[2]


def test_the_file_has_its_name_once_the_block_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as partial:
        partial.write_bytes(b"half")
        assert partial.name == ".a.bin.partial"
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes(path, b"earlier")

    def interrupted() -> None:
        with atomic_file(path) as partial:
            partial.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_fails_before_it_writes_raises_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), atomic_file(tmp_path / "a.bin"):
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_the_earlier_file_and_a_hidden_one_that_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "earlier")
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from overpaint.policy.atomic import atomic_file\n"
        "with atomic_file(Path(sys.argv[1]), writer='.3') as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "earlier"
    assert sorted(file.name for file in tmp_path.iterdir()) == [".a.txt.3.partial", "a.txt"]
    forget_partial(path)  # another writer's
    assert len(list(tmp_path.iterdir())) == 2
    forget_partial(path, writer=".3")
    forget_partial(path, writer=".3")
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path, writer=".0") as first, atomic_file(path, writer=".1") as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"  # which was renamed last
    assert str(os.getpid()) in this_process()
    assert "/" not in this_process()


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    path = tmp_path / "folder" / "a.bin"
    with pytest.raises(OSError, match=r"a\.bin'$") as raised:
        write_bytes(path, b"content")
    assert raised.value.filename == str(path)
    assert raised.value.errno in (errno.EEXIST, errno.ENOTDIR)


def test_texts_are_utf_8_as_they_stand(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "grün\r\n")
    assert (tmp_path / "a.txt").read_bytes() == b"gr\xc3\xbcn\r\n"
