"""The commands: light, helpful, and readable in a log."""

import io
import subprocess
import sys

import pytest

from setpred import progress as module
from setpred.commands.data import main
from setpred.progress import progress


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("setpred.commands.data, setpred.data.clevr, setpred.data.info", "torch lightning matplotlib scipy"),
        ("setpred.data.scenes", "lightning matplotlib scipy"),
    ],
)
def test_producing_imports_little(modules, heavy):
    """Every worker process imports what these modules import."""
    code = f"import sys, {modules}; found = set('{heavy}'.split()) & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("command", [[], ["prepare"], ["render"], ["verify"], ["info"]])
def test_help_explains(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "usage: python -m setpred data" in text
    for word in {"prepare": ["ROOT", "--split"], "render": ["--objects LEAST MOST", "--seed"]}.get(
        "".join(command), []
    ):
        assert word in text


def test_render_info_verify(tmp_path, capsys):
    path = str(tmp_path / "a.h5")
    assert (
        main(["render", "--images", "5", "--image-size", "8", "--objects", "2", "2", "--workers", "0", "--out", path])
        == 0
    )
    assert main(["verify", path]) == 0
    assert main(["info", path]) == 0
    text = capsys.readouterr().out
    assert "5 images of 8x8, content as written" in text
    assert "5 images of 8x8, 10 objects" in text
    assert "kind rendered, objects 2 to 2, seed 0" in text


def test_progress_in_a_log(monkeypatch):
    clock = iter(range(0, 1000, 4))  # each look at the clock is four seconds later
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(clock)))
    log = io.StringIO()
    assert list(progress("abcdefgh", total=10, initial=2, description="work", file=log)) == list("abcdefgh")
    assert log.getvalue().splitlines() == [
        "work: 5 of 10, 0.2 per second, 20 s left",
        "work: 8 of 10, 0.2 per second, 8 s left",
        "work: 10 of 10, 0.2 per second, 36.0 s",
    ]


def test_progress_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    assert list(progress(range(3), total=3, description="work", file=terminal)) == [0, 1, 2]
    assert "work: 100%" in terminal.getvalue()
    assert "3/3" in terminal.getvalue()
