"""Shared fixtures."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def clevr_blender() -> Path:
    """Real CLEVR scenes in the CLEVR_v1.0 layout, beside the repository or where SETPRED_CLEVR_BLENDER says."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "clevr-blender"
    root = Path(os.environ.get("SETPRED_CLEVR_BLENDER", beside))
    if not (root / "scenes").is_dir():
        pytest.skip(f"needs real CLEVR scenes at {root}; set SETPRED_CLEVR_BLENDER to a CLEVR_v1.0 folder")
    return root


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the scenes of the tiny trainings lie; rendered by the first of them."""
    return tmp_path_factory.mktemp("tiny-data")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Path:
    """A model that was not trained, and the data on which it would have been validated."""
    from tiny import untrained

    return untrained(tmp_path_factory.mktemp("run"), data=tiny_data)
