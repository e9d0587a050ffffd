"""Files that belong together, places that can't be written, and the lock on a folder."""

import errno
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, posix

from common import files
from common.errors import UserError
from common.signals import StopSignals, uninterrupted


def test_places_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x.pt", tmp_path):
        for write in (files.check_writable, lambda p: files.write_text(p, "text")):
            with pytest.raises(UserError, match=f"{path} cannot be written"):
                write(path)


@pytest.mark.parametrize("links", [pytest.param(True, marks=posix), False])
def test_at_any_time_there_is_a_whole_file_and_the_one_before_is_kept(tmp_path, monkeypatch, links):
    path, kept = tmp_path / "last.pt", tmp_path / "last.prev.pt"
    found, replace = [], os.replace

    def look(source: object, target: object) -> None:
        found.append([p.read_text() if p.exists() else None for p in (path, kept)])
        replace(source, target)

    def no_links(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "replace", look)
    if not links:  # as on FAT
        monkeypatch.setattr(os, "link", no_links)
    for text in "abc":
        files.write_text(path, text, keep=kept)
    assert (path.read_text(), kept.read_text()) == ("c", "b")
    if links:
        assert found == [[None, None], ["a", "a"], ["b", "b"]]
    else:
        assert found == [[None, None], ["a", None], [None, "a"], ["b", None], [None, "b"]]


@posix
def test_a_symbolic_link_stays_and_the_file_that_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link, file = tmp_path / "TODO.md", tmp_path / "disk" / "TODO.md"
    link.symlink_to(file)
    for text in ("old", "new"):
        files.write_text(link, text)
        assert link.is_symlink() and file.read_text() == text
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for use in (files.check_writable, lambda path: files.write_text(path, "new")):
        with pytest.raises(UserError, match="cannot be written: "):
            use(loop / "file")


def test_an_interrupt_waits_for_files_that_belong_together(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            files.write_text(tmp_path / "second", "whole")
        pytest.fail("the interrupt was lost")
    assert (tmp_path / "second").read_text() == "whole"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_one_ctrl_c_that_arrives_twice_in_a_process_of_several_counts_once():
    with StopSignals(repeats_within=60) as signals:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signals.received == signal.SIGINT


@posix
def test_a_file_and_its_name_are_on_the_disk_before_the_next_is_written(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)

        def call(*args, name=name, original=original, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, call)
    files.write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the content, then the folder


LOCK = """
import sys
from common.files import lock_folder
with lock_folder(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_locked_folder_names_its_process_and_is_free_when_that_is_killed(tmp_path):
    command = [sys.executable, "-c", LOCK, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT / "src", stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        with pytest.raises(UserError, match=rf"in use by another run \(process {process.pid}\)"):
            files.lock_folder(tmp_path).__enter__()
        process.kill()
    (tmp_path / ".last.123.tmp.pt").write_bytes(b"half")  # of a save that was killed
    (tmp_path / ".note").write_text("mine")
    with files.lock_folder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", ".lock.pid", ".note"]


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks"), NotImplementedError()])
def test_a_file_system_without_locks_gets_a_note(tmp_path, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(files.FileLock, "acquire", fail)
    with files.lock_folder(tmp_path):
        assert capsys.readouterr().err.startswith(f"note: {tmp_path}")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        files.lock_folder(tmp_path / "file").__enter__()
