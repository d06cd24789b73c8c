"""The package as users install it: a wheel in an environment without the source tree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from setpred.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_train_batches=1",
    "--trainer.check_val_every_n_epoch=1",
]


@pytest.fixture(scope="module")
def setpred(tmp_path_factory):
    """Run the installed command in an empty folder; returns what it prints."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    source = tmp_path_factory.mktemp("source") / "setpred"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if name.startswith(("setpred/", "configs/", "checkpoints/")) or "/" not in name:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            link = (ROOT / name).is_symlink()
            target.symlink_to(os.readlink(ROOT / name)) if link else target.write_bytes((ROOT / name).read_bytes())
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(source)], check=True)

    def command(*arguments):
        environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1"}
        words = [sys.executable, str(site / "bin" / "setpred"), *arguments]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    command.folder = folder
    code = "import setpred; print(setpred.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=os.environ | {"PYTHONPATH": str(site)}, capture_output=True
    )
    assert str(site) in found.stdout.decode()  # not the source tree
    return command


def test_the_command_lists_the_others(setpred):
    assert all(f"  {name} " in setpred("--help") for name in COMMANDS)


def test_the_example_needs_no_arguments(setpred):
    printed = setpred("predict")
    assert '"shape":' in printed
    assert [path.suffix for path in (setpred.folder / "setpred-example").iterdir()] == [".png"]


def test_from_a_table_and_images_to_scores_without_python_or_yaml(setpred, tmp_path):
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    rows = ["image,x,y,label"]
    for number in range(32):
        pixels = np.zeros((16, 16, 3), np.uint8)
        x, y = rng.integers(2, 14, 2)
        pixels[y - 2 : y + 2, x - 2 : x + 2] = 255
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        rows.append(f"{number}.png,{x},{y},{'ab'[number % 2]}")
    (tmp_path / "points.csv").write_text("\n".join(rows))
    for name in ("train.h5", "val.h5"):
        setpred(*f"data import --csv {tmp_path}/points.csv --images {tmp_path}/images --out {name}".split())
    setpred("train", "--data", "train.h5", "--val", "val.h5", *SMALL)
    best = "checkpoints/train/best.ckpt"
    options = "--data val.h5 --thresholds 10 --json ap.json --figures p --report page.html"
    printed = setpred("evaluate", best, *options.split())
    assert "predictions.png" in printed
    assert "<figcaption>" in (setpred.folder / "page.html").read_text()
    assert '"10":' in (setpred.folder / "ap.json").read_text()
    setpred("predict", best, str(tmp_path / "images"), "--out", "out.json", "--figures", "drawn", "--shown", "1")
    assert (setpred.folder / "drawn" / "000-0.png").stat().st_size > 1000
