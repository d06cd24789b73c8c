"""Shared by every command: one sentence for an error, ~ in arguments, closed outputs, links and pipes."""

import importlib
import io
import os
import subprocess
import sys
import threading

import pytest

from setpred.__main__ import COMMANDS
from setpred.__main__ import main as program
from setpred.commands.common import LastingStream, expanded, finite
from setpred.errors import InputError
from setpred.files import locked, write_atomically

MISSING = {
    "train": "--config none.yaml",
    "evaluate": "none.ckpt",
    "predict": "none.ckpt none.png --out p.json",
    "data": "info none.h5",
    "parts": "none",
    "compare": "none.yaml --budget 1steps",
    "release": "none.ckpt --out p.safetensors",
    "gradients": "none.ckpt",
    "replay": "none.pt",
}
OUT_OF_RANGE = [
    ("evaluate none.ckpt", ["--iterations=-1", "--images=0", "--batch-size=0", "--workers=-1", "--shown=0"]),
    ("predict none.ckpt none.png --out p", ["--batch-size=0", "--iterations=-1", "--threads=0", "--shown=0"]),
    ("gradients none.ckpt", ["--images=0", "--iterations=0", "--steps=0", "--damping=-1", "--damping=nan"]),
    ("compare none.yaml --budget 1s", ["--seeds=0", "--points=0", "--first-seed=-1", "--threads=0"]),
]


def status():
    """The exit status of the program with `sys.argv`."""
    try:
        return program()
    except SystemExit as stopped:  # of parsers that are not ours
        return stopped.code


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_file_is_one_sentence_and_status_2(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["setpred", command, *MISSING[command].split()])
    assert status() == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert "none" in message
    assert not [path for path in tmp_path.iterdir() if path.suffix]


@pytest.mark.parametrize(("start", "option"), [(start, each) for start, options in OUT_OF_RANGE for each in options])
def test_a_number_out_of_range_is_one_sentence_and_status_2(start, option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["setpred", *start.split(), option])
    assert program() == 2
    name, value = option.split("=")
    message = capsys.readouterr().err
    assert message.startswith(f"error: {name}: expected at least ")
    assert f", got {value}; see setpred {start.split()[0]} --help" in message


def test_processes_that_lightning_starts_with_the_options_alone_train(monkeypatch):
    seen = []
    monkeypatch.setattr("setpred.commands.train.main", lambda: seen.append(sys.argv[1:]) or 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for words in ("--config a.yaml", "train --config a.yaml"):  # the latter by torchrun
        monkeypatch.setattr(sys, "argv", ["setpred", *words.split()])
        assert program() == 0
    assert seen == [["--config", "a.yaml"]] * 2


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_a_screen(command, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["setpred", command, "--help"])
    assert status() == 0
    printed = capsys.readouterr().out
    assert f"setpred {command} " in printed
    assert printed.count("\n") <= 40


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    for name in ("predict", "evaluate"):
        command = importlib.import_module(f"setpred.commands.{name}")
        monkeypatch.setattr(command, "parser", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert command.main([]) == 130
        assert capsys.readouterr().err.startswith("interrupted")


def test_json_has_null_for_what_is_not_finite():
    found = finite({"a": [1.0, float("nan")], "b": {"c": float("inf")}})
    assert found == {"a": [1.0, None], "b": {"c": None}}


def test_home_is_expanded_at_the_start_of_a_value_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/user")
    before = ["~/a", "--out=~/b", "--name", "c~d", "--x=e~"]
    assert expanded(before) == ["/home/user/a", "--out=/home/user/b", "--name", "c~d", "--x=e~"]


def test_a_closed_pipe_does_not_end_a_program():
    code = (
        "import sys; from setpred.commands.common import LastingStream\n"
        "sys.stdout = LastingStream(sys.stdout)\n"
        "for _ in range(20000): print('a line that is longer than nothing', flush=True)\n"
        "sys.stderr.write('continued')"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    running.stdout.readline()
    running.stdout.close()
    assert running.stderr.read() == b"continued"
    assert running.wait() == 0
    running.stderr.close()


def test_names_outside_the_encoding_are_written():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("données \udce9")
    stream.flush()
    assert raw.getvalue() == rb"donn\xe9es \udce9"


def test_writing_keeps_links_pipes_and_devices(tmp_path):
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


def test_commands_start_with_a_notebooks_backend_without_a_cache_and_without_fcntl():
    code = "import sys; sys.modules['fcntl'] = None; import setpred.commands.evaluate as e, matplotlib as m; "
    code += "assert m.get_backend() == 'agg'; e.parser()"
    environment = os.environ | {"MPLBACKEND": "module://nowhere.backend", "MPLCONFIGDIR": "/dev/null/none"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_in_a_file_is_not_replaced(name, tmp_path):
    code = "from pathlib import Path; from setpred.files import write_atomically as w; print('a')"
    code += f"; from setpred.commands.outputs import check_outputs; check_outputs({{'--out': Path({name!r})}})"
    code += f"; w({name!r}, 'b\\n'); print('c')"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "a\nb\nc\n"
    piped = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b"a\nb\nc\n"


def test_one_process_at_a_time_holds_a_lock(tmp_path):
    path = tmp_path / "data.lock"
    with locked(path, passing=True):
        with pytest.raises(InputError, match=r"another process is writing .*data\.lock; wait"), locked(path):
            pass
        code = f"from setpred.files import *; lock = locked(Path({str(path)!r}), patience=60); lock.__enter__()"
        code += "; print('held', flush=True); os._exit(0)"
        waiting = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(1)
    assert waiting.communicate(timeout=60)[0] == b"held\n"
    with locked(path, passing=True):  # the other process ended without releasing it
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_error_of_a_worker_is_its_own_message():
    text = "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File ..."
    assert str(InputError(f"{text}\nsetpred.errors.InputError: x.png is cut off\n")) == "x.png is cut off"
    with pytest.raises(InputError, match="as it is"):
        raise InputError("as it is")
