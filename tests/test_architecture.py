"""The tree keeps its shape: imports go down, heavy libraries stay in their rooms, sizes stand in the schema."""

import ast
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "setpred"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# a module may import modules of a lower number, and its own folder
FLOORS = {
    "command": 0, "errors": 0, "files": 0, "limits": 0, "progress": 0, "precision": 0, "schema": 0, "sets": 0, "nn": 0,
    "schedules": 0, "settings": 0, "plain_yaml": 0,
    "inner": 1, "matching": 1, "rendering": 1, "faults": 1, "guard": 1,
    "aggregators": 2, "encoders": 2, "decoders": 2, "losses": 2, "metrics": 2, "data": 2,
    "model": 3, "visualise": 3, "passes": 3, "weights": 3, "torch_files": 3, "allowed": 3,
    "checkpoint": 4, "configuration": 4, "diagnosis": 4,
    "training": 5, "callbacks": 5, "processes": 5, "saving": 5, "run_folder": 5,
    "evaluation": 5, "check": 5, "program": 5, "predict": 5,
    "repro": 5, "reports": 5, "watch": 5, "release": 6, "replay": 6, "cli": 6, "compare": 7,
}  # fmt: skip
ROOMS = {
    "scipy": {"matching"},
    "h5py": {"data"},
    "sklearn": {"data"},
    "matplotlib": {"visualise"},
    "lightning": {"data", "training", "callbacks", "saving", "configuration", "processes", "watch", "cli", "compare"},
    "torchmetrics": {"metrics"},
    "torchvision": {"encoders"},
    "safetensors": {"weights"},
}


def module_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Dotted names that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    ours = module_of(path)
    if ours == "__init__":
        return
    assert ours in FLOORS, f"{ours} has no floor: give it one in FLOORS"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "setpred" and rest and rest[0] in FLOORS and rest[0] != ours:
            assert FLOORS[rest[0]] <= FLOORS[ours], f"{path} imports upwards: {name}"
            same_floor = FLOORS[rest[0]] == FLOORS[ours] > 0
            assert not (same_floor and ours == "data"), f"data imports model code: {name}"
        assert top not in ROOMS or ours in ROOMS[top], f"{path}: {top} belongs in {ROOMS[top]}"


def test_sizes_of_clevr_stand_in_the_schema_alone():
    """19 and 10 objects follow from the schema; no file repeats the element size."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.Constant) and node.value == 19), f"{path}:{node.lineno} says 19"
    for path in (ROOT / "configs").glob("*.yaml"):
        assert "set_dim" not in path.read_text(), f"{path} repeats the element size"


def test_every_public_part_is_documented():
    from setpred import aggregators, decoders, encoders, inner, losses

    for module in (aggregators, decoders, encoders, inner, losses):
        # as ruff sorts: names in capitals, classes, functions
        expected = sorted(module.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
        assert list(module.__all__) == expected
        for name in module.__all__:
            assert getattr(module, name).__doc__, f"{module.__name__}.{name} has no docstring"


def test_warnings_of_our_lines_are_errors_and_those_of_libraries_are_not():
    def warn(module, category=UserWarning):
        warnings.warn_explicit("a warning", category, "a.py", 1, module)

    packages = [*SOURCES, *(ROOT / "benchmarks").glob("*.py")]
    ours = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in packages]
    for module in ("setpred", *ours, *(path.stem for path in (ROOT / "tests").glob("*.py"))):
        with pytest.raises(UserWarning):
            warn(module)
    with pytest.raises(RuntimeWarning):
        np.ones(1) / np.zeros(1)
    with warnings.catch_warnings(record=True):
        for module in ("torch.nn", "lightning.pytorch.setpred", "setpred_of_others"):
            warn(module)
        warn("setpred", DeprecationWarning)  # a library's next release may announce something of what we call
