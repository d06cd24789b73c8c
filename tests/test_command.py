"""What every command shares: ~ in arguments, outputs that nobody reads, and files that are no files."""

import io
import os
import subprocess
import sys
import threading

import pytest

from setpred.commands.common import LastingStream, expanded
from setpred.errors import InputError
from setpred.files import write_atomically


def test_home_is_expanded_at_the_start_of_a_value_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expanded(["~/a", "--out=~/b", "--name", "c~d", "--x=e~"]) == [
        "/home/somebody/a",
        "--out=/home/somebody/b",
        "--name",
        "c~d",
        "--x=e~",
    ]


def test_a_stream_that_nobody_reads_takes_all_and_says_nothing():
    code = (
        "import sys; from setpred.commands.common import LastingStream\n"
        "sys.stdout = LastingStream(sys.stdout)\n"
        "for _ in range(20000): print('a line that is longer than nothing', flush=True)\n"
        "sys.stderr.write('went on')"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.read() == b"went on"
    assert running.wait() == 0
    running.stderr.close()


def test_names_that_the_encoding_lacks_are_written():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("données \udce9")
    stream.flush()
    assert raw.getvalue() == rb"donn\xe9es \udce9"


def test_a_link_a_pipe_and_a_device_stay_what_they_are(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"

    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_atomically(tmp_path / "pipe", "content")
    reader.join(10)
    assert read == ["content"]
    assert (tmp_path / "pipe").is_fifo()

    write_atomically("/dev/null", "content")
    assert not os.path.isfile("/dev/null")


def test_the_error_of_a_worker_is_its_sentence():
    text = (
        "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ...\n"
    )
    assert str(InputError(f"{text}setpred.errors.InputError: x.png is cut off\n")) == "x.png is cut off"
    with pytest.raises(InputError, match="as it is"):
        raise InputError("as it is")
