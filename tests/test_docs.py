"""The pages name every part, configuration and page; what they name exists, and their Python code runs."""

import importlib
import re
from pathlib import Path

import pytest

from setpred import aggregators, decoders, encoders, inner, losses
from setpred.__main__ import COMMANDS
from setpred.commands.train import build
from setpred.data import toy

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PAGES += [ROOT / "data" / "README.md", ROOT / "checkpoints" / "README.md"]
README, PARTS = PAGES[0].read_text(), (DOCS / "parts.md").read_text()
RESULTS, SCALING = (DOCS / "results.md").read_text(), (DOCS / "scaling.md").read_text()
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
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
        assert any(ROOT.rglob(name)), f"{page.name} names {name}"
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
    known |= {"AbsoluteError", "Accuracy", "NumberingAccuracy", "SetDistances", "CHECKPOINT", "SetPredictor"}
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
