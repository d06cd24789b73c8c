"""The pages name every part, every configuration, and nothing that is not there."""

import re
from pathlib import Path

import pytest

from setpred import aggregators, decoders, encoders, inner, losses
from setpred.data import worlds

ROOT = Path(__file__).resolve().parents[1]
PARTS = (ROOT / "docs" / "parts.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
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
