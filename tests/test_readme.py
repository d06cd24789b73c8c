"""The README's code is true: blocks that need no trained checkpoint run, and every file it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_both_commands_are_on_the_first_screen():
    first = "\n".join(README.splitlines()[:30])
    assert "make demo" in first
    assert "make test" in first


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_compiles_and_runs(number):
    code = compile(BLOCKS[number], f"README block {number}", "exec")
    if "best.ckpt" not in BLOCKS[number]:  # that one needs what `make demo` leaves
        exec(code, {})


def test_named_files_are_there():
    named = re.findall(r"\]\(([^)#:]+)\)|--config (\S+)", README)
    for path in {link or config for link, config in named}:
        assert (ROOT / path).exists(), f"README names {path}"
