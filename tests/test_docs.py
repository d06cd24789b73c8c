"""The pages name every part, configuration and page; what they name exists, and their Python code runs."""

import importlib
import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from setpred import aggregators, decoders, encoders, inner, losses
from setpred.__main__ import COMMANDS, main
from setpred.commands.train import build
from setpred.data import toy
from setpred.data.scenes import render_file

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES += [ROOT / "data" / "README.md", ROOT / "checkpoints" / "README.md"]
README, PARTS = PAGES[0].read_text(), (DOCS / "parts.md").read_text()
RESULTS, SCALING = (DOCS / "results.md").read_text(), (DOCS / "scaling.md").read_text()
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    if page.name != "own_parts.md"
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
NOT_PARTS = {"Aggregator", "SetDecoder", "SetLoss", "World", "Examples"}  # base classes and types
NOT_PARTS |= {"Differentiation", "LinearSolver", "Projection", "Problem", "State"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def resolved(name):
    """Whether a dotted name is a module or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            found = getattr(found, attribute, None)
        return found is not None
    return False


@every_page
def test_named_files_modules_and_commands_exist(page):
    text = page.read_text()
    for path in re.findall(r"\b(?:setpred|tests|benchmarks|configs)/[\w/]*\.?(?:py|yaml)?\b", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
    for name in re.findall(r"`(\w+\.py)`", text):
        assert any(ROOT.rglob(name)) or f"\n# {name}\n" in text, f"{page.name} names {name}"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for name in re.findall(r"\bsetpred(?:\.[a-zA-Z_]\w*)+", text):
        assert resolved(name), f"{page.name} names {name}"
    for command in re.findall(r"python -m setpred (\S+?)[\s`]|`setpred (\w+)", text):
        assert "".join(command) in COMMANDS, f"{page.name} names the command {command}"


@pytest.mark.parametrize("code", BLOCKS)
def test_python_code_runs(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "a page", "exec"), {})


SMALL = [f"--data.init_args.{size}" for size in ("train_images=8", "val_images=4", "batch_size=4")]
TINY = {
    "train": [*SMALL, "--trainer.max_epochs=1"],
    "evaluate": ["--device=cpu"],
    "compare": ["--budget=1steps", "--points=1", "--", *SMALL],
}


def test_files_code_and_commands_of_own_parts_run_with_tiny_sizes(tmp_path, monkeypatch, capsys):
    """Blocks that begin with the name of a file are appended to it; the rest runs in the order of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # the working folder is added by --allow
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    os.symlink(ROOT / "configs", "configs")
    (tmp_path / "data").mkdir()
    for seed, images in ((0, 8), (1_000_000, 4)):  # in this process, which is faster than where a training would
        render_file(
            f"data/rendered-64-3to6-seed{seed}-{images}.h5", images=images, image_size=64, objects=(3, 6), seed=seed
        )
    text, ran = (DOCS / "own_parts.md").read_text(), []
    for name, content in re.findall(r"```\w+\n# (\w+\.\w+)\n(.*?)```", text, re.DOTALL):
        with open(name, "a") as file:
            file.write(content)
    for code, command in re.findall(r"```python\n(?!# )(.*?)```|^    setpred ([^\n]*)$", text, re.DOTALL | re.MULTILINE):
        if code:
            exec(compile(code, "a page", "exec"), {})
        else:
            words = shlex.split(command)
            monkeypatch.setattr(sys, "argv", ["setpred", *words, *TINY[words[0]]])
            assert main() == 0, capsys.readouterr().err
            ran.append(words[0])
    assert ran == ["train", "evaluate", "compare"]
    assert all(f"| {name} |" in Path("comparison/table.md").read_text() for name in ("my", "my_pool", "mlp"))


def test_the_readme_is_short_and_begins_with_the_commands():
    lines = README.splitlines()
    assert len(lines) <= 110
    assert "make demo" in "\n".join(lines[:30])
    assert "make test" in "\n".join(lines[:30])


def test_the_index_lists_every_page():
    linked = {(DOCS / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", (DOCS / "README.md").read_text())}
    assert {page for page in PAGES if page.name != "README.md" or page.parent.name in ("data", "checkpoints")} == linked


@pytest.mark.parametrize("module", [aggregators, decoders, losses, inner, toy], ids=lambda module: module.__name__)
def test_every_part_is_listed(module):
    for name in module.__all__:
        if isinstance(getattr(module, name), type) and name not in NOT_PARTS:
            assert f"`{name}" in PARTS, f"docs/parts.md does not name {module.__name__}.{name}"


def test_every_listed_part_exists():
    known = {name for module in (aggregators, decoders, encoders, inner, losses, toy) for name in module.__all__}
    known |= {"AbsoluteError", "Accuracy", "NumberingAccuracy", "SetDistances", "CHECKPOINT"}
    assert set(re.findall(r"`([A-Z]\w+)[`(]", PARTS)) <= known


def test_every_compared_configuration_has_its_row():
    for path in [*(ROOT / "configs" / "compare").glob("*.yaml"), *(ROOT / "configs" / "worlds").rglob("*.yaml")]:
        assert f"| {path.stem} |" in RESULTS, f"docs/results.md has no row of {path.parent.name}/{path.stem}"


@pytest.mark.parametrize("text", [PARTS, RESULTS], ids=["parts", "results"])
def test_named_configurations_exist(text):
    for named in re.findall(r"(?:configs/)?((?:compare|worlds)/[\w/.{},]+)", text):
        before, _, rest = named.rstrip(".,").partition("{")
        names, _, after = rest.partition("}")
        for path in [f"{before}{name}{after}" for name in names.split(",")]:
            assert (ROOT / "configs" / path).exists(), f"configs/{path} is named and does not exist"


def test_the_sent_bytes_follow_from_the_parameters():
    for name in ("clevr", "clevr_equilibrium", "clevr_fspool"):
        options = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--trainer.logger=false"]
        parameters = sum(part.numel() for part in build([*options, "--resume=auto"]).model.parameters())
        sent = [2 * (among - 1) / among * 4 * parameters / 1e6 for among in (2, 8, 64)]
        row = f"| `{name}.yaml` | {parameters:,} | {4 * parameters / 1e6:.2f} MB |"
        assert row + "".join(f" {megabytes:.1f} MB |" for megabytes in sent) in SCALING


def test_the_kept_share_follows_from_the_times():
    links = ((82.5, 450), (82.5, 12.5), (92.8, 50), (92.8, 12.5))
    for step in (32, 8):
        shares = "".join(f" {100 * step / (step + megabytes / rate):.1f} % |" for megabytes, rate in links)
        assert f"| T = {step} ms |" + shares in SCALING
