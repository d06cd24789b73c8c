"""The tree keeps its shape: imports go down, heavy libraries stay in their rooms, sizes stand in the schema."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "setpred"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# a room may import rooms of a strictly lower floor, and its own
FLOORS = {
    "errors": 0, "progress": 0, "sets": 0,
    "files": 1, "matching": 1, "nn": 1, "schema": 1, "workers": 1,
    "encoders": 2, "inner": 2, "losses": 2, "rendering": 2,
    "aggregators": 3, "data": 3, "decoders": 3, "metrics": 3, "model": 3,
    "checkpoint": 4, "evaluation": 4, "visualise": 4,
    "nonfinite": 5,
    "training": 6,
    "commands": 7,
}  # fmt: skip
FILES = 12  # directly under setpred/, at most
# libraries that only these rooms may import
ROOMS = {
    "scipy": {"matching"},
    "h5py": {"data"},
    "sklearn": {"data"},
    "matplotlib": {"visualise"},
    "lightning": {"data", "training", "commands"},
    "jsonargparse": {"commands"},
    "argparse": {"commands"},
    "torchmetrics": {"metrics"},
    "torchvision": {"data", "encoders", "losses"},
    "safetensors": {"checkpoint"},
}
# what importing a room must not bring, itself or by way of another room; torchmetrics, and so Lightning, imports
# matplotlib wherever it is installed, so of those rooms only our own imports count
FREE_OF = {
    "decoders": {"lightning", "matplotlib", "h5py", "setpred.data"},
    "model": {"lightning", "matplotlib", "h5py", "setpred.data"},
    "training": {"setpred.visualise", "h5py", "jsonargparse", "setpred.commands", "setpred.data"},
    "evaluation": {"lightning", "setpred.visualise", "setpred.commands"},
    "data": {"setpred.model", "setpred.decoders", "setpred.encoders", "matplotlib"},
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
    if ours.startswith("__") or path.name == "__main__.py":  # the package's own names, and ways to start commands
        return
    assert ours in FLOORS, f"{ours} has no floor: give it one in FLOORS"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "setpred" and rest and rest[0] in FLOORS and rest[0] != ours:
            assert FLOORS[rest[0]] < FLOORS[ours], f"{path} imports upwards or sideways: {name}"
        assert top not in ROOMS or ours in ROOMS[top], f"{path}: {top} belongs in {ROOMS[top]}"


@pytest.mark.parametrize("room", FREE_OF)
def test_heavy_libraries_do_not_come_along(room):
    code = f"import sys, setpred.{room}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not FREE_OF[room] & set(found.stdout.split())


@pytest.mark.parametrize("room", ["inner", "aggregators", "encoders", "decoders", "losses"])
def test_parts_do_not_know_a_data_set(room):
    for path in (PACKAGE / room).glob("*.py"):
        assert not [name for name in imports(path) if name.endswith(".CLEVR")], f"{path} imports CLEVR"


def test_few_files_lie_directly_under_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= FILES


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
