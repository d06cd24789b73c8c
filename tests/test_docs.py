"""The pages name every part, every configuration, and nothing that is not there."""

import re
from pathlib import Path

import pytest

from setpred import aggregators, decoders, encoders, inner, losses
from setpred.commands.train import build
from setpred.data import toy as worlds

ROOT = Path(__file__).resolve().parents[1]
PARTS = (ROOT / "docs" / "parts.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
SCALING = (ROOT / "docs" / "scaling.md").read_text()
NOT_PARTS = {"Aggregator", "SetDecoder", "SetLoss", "World", "Examples"}  # what the parts are made of
NOT_PARTS |= {"Differentiation", "LinearSolver", "Projection", "Problem", "State"}


@pytest.mark.parametrize("module", [aggregators, decoders, losses, inner, worlds], ids=lambda module: module.__name__)
def test_every_part_is_listed(module):
    for name in module.__all__:
        if isinstance(getattr(module, name), type) and name not in NOT_PARTS:
            assert f"`{name}" in PARTS, f"docs/parts.md does not name {module.__name__}.{name}"


def test_no_part_is_listed_that_is_not_there():
    known = {name for module in (aggregators, decoders, encoders, inner, losses, worlds) for name in module.__all__}
    known |= {"AbsoluteError", "Accuracy", "NumberingAccuracy", "SetDistances"}
    for name in re.findall(r"`([A-Z]\w+)[`(]", PARTS):
        assert name in known | {"CHECKPOINT"}, f"docs/parts.md names {name}"


def test_every_configuration_that_is_compared_has_its_row():
    for path in (ROOT / "configs" / "compare").glob("*.yaml"):
        assert f"| {path.stem} |" in RESULTS, f"docs/results.md has no row of {path.stem}"
    for path in (ROOT / "configs" / "worlds").rglob("*.yaml"):
        assert f"| {path.stem} |" in RESULTS, f"docs/results.md has no row of {path.parent.name}/{path.stem}"


@pytest.mark.parametrize("text", [PARTS, RESULTS], ids=["parts", "results"])
def test_named_configurations_are_there(text):
    for named in re.findall(r"(?:configs/)?((?:compare|worlds)/[\w/.{},]+)", text):
        stem = named.rstrip(".,")
        if "{" in stem:
            before, names, after = re.match(r"(.*)\{(.*)\}(.*)", stem).groups()
            paths = [f"{before}{name}{after}" for name in names.split(",")]
        else:
            paths = [stem]
        for path in paths:
            assert (ROOT / "configs" / path).exists(), f"configs/{path} is named and is not there"


def test_what_is_sent_on_paper_follows_from_the_parameters():
    for name in ("clevr", "clevr_equilibrium", "clevr_fspool"):
        options = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--trainer.logger=false"]
        parameters = sum(part.numel() for part in build([*options, "--resume=auto"]).model.parameters())
        sent = [2 * (among - 1) / among * 4 * parameters / 1e6 for among in (2, 8, 64)]
        row = f"| `{name}.yaml` | {parameters:,} | {4 * parameters / 1e6:.2f} MB |"
        assert row + "".join(f" {megabytes:.1f} MB |" for megabytes in sent) in SCALING


def test_the_share_that_is_left_follows_from_the_times():
    for step in (32, 8):
        shares = [
            step / (step + megabytes / rate)
            for megabytes, rate in ((82.5, 450), (82.5, 12.5), (92.8, 50), (92.8, 12.5))
        ]
        assert f"| T = {step} ms |" + "".join(f" {100 * share:.1f} % |" for share in shares) in SCALING
