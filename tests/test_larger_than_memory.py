"""Files of more images than memory holds: read and trained on image by image."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from tiny import CONFIG, metrics

from setpred.data.hdf5 import Header
from setpred.data.hdf5_writer import create_arrays
from setpred.data.scenes import render_records
from setpred.schema import CLEVR

ROOT = Path(__file__).resolve().parents[1]
SIDE = 512
IMAGE = SIDE * SIDE * 3  # bytes
MOST = 2 * 10**9  # resident bytes of a process that reads such a file
MOST_TRAINING = 3 * 10**9  # of one that trains, which keeps a thousand images for batch statistics


@pytest.fixture
def folder(tmp_path):
    """A folder where files of holes take no disk; what is made there is removed at once."""
    probe = tmp_path / "probe"
    with probe.open("wb") as file:
        file.truncate(2**26)
    if probe.stat().st_blocks * 512 > 2**20:
        pytest.skip(f"the file system of {tmp_path} stores holes, and a file larger than memory would fill it")
    if shutil.disk_usage(tmp_path).free < 10**9:
        pytest.skip(f"needs 1 GB of free disk at {tmp_path}")
    yield tmp_path
    for path in tmp_path.glob("*.h5"):
        path.unlink()


def sparse_file(path: Path, size: int) -> dict[int, bytes]:
    """A file of at least so many bytes of images, of which a few are scenes at scattered rows and the rest holes.

    Returns:
        The scenes' bytes by row.
    """
    images = size // IMAGE + 1
    small = render_records(range(8), seed=3, image_size=SIDE // 8, objects=(3, 4))
    scenes = [scene._replace(image=scene.image.repeat(8, 0).repeat(8, 1)) for scene in small]
    places = [0, images - 1, *np.random.default_rng(0).choice(np.arange(1, images - 1), 6, replace=False).tolist()]
    header = Header(images, SIDE, CLEVR, {"kind": "test"})
    with h5py.File(path, "w") as file:
        create_arrays(file, header, "test")
        file["index"][:], file["elements"][:], file["camera"][:] = np.arange(images), 0, np.nan
        for place, scene in zip(places, scenes, strict=True):
            file["images"][place], file["elements"][place] = scene.image, scene.elements
    assert path.stat().st_size > size
    assert path.stat().st_blocks * 512 < 2**28
    return {place: scene.image.tobytes() for place, scene in zip(places, scenes, strict=True)}


def measured(script: str, *arguments: object) -> dict:
    """The last line, JSON, of a Python process."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


READ = """
import hashlib, json, random, resource, sys
import torch
from torch.utils.data import DataLoader
from setpred.data.dataset import SetFile, as_batch

path, limit, workers, places = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
data = SetFile(path)
order = places + random.Random(0).sample(range(len(data)), 40)
found, objects, dark = {}, {}, 0
for batch in DataLoader(data, 8, sampler=order, num_workers=workers, collate_fn=as_batch):
    for index, image, mask in zip(batch["index"].tolist(), batch["image"], batch["mask"]):
        if index in places:
            found[index] = hashlib.sha256(image.permute(1, 2, 0).contiguous().numpy().tobytes()).hexdigest()
            objects[index] = int(mask.sum())
        else:
            dark += not image.any()
refused = False
if limit:
    try:
        SetFile(path, in_memory=True).load()
    except RuntimeError:
        refused = True
peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({"found": found, "objects": objects, "dark": dark, "peak": 1024 * peak, "refused": refused}))
"""


def check_read(path: Path, scenes: dict[int, bytes], *, limit: int, workers: int) -> dict:
    found = measured(READ, path, limit, workers, json.dumps(list(scenes)))
    assert found["found"] == {str(place): hashlib.sha256(image).hexdigest() for place, image in scenes.items()}
    assert all(3 <= count <= 4 for count in found["objects"].values())
    assert found["dark"] >= 40 - len(scenes)
    assert found["peak"] < MOST
    return found


def test_a_file_larger_than_the_memory_allowed(folder):
    """3.2 GB of images by a process that may have 1.5 GB, where reading all of them at once fails."""
    scenes = sparse_file(folder / "large.h5", 3_200_000_000)
    assert check_read(folder / "large.h5", scenes, limit=1_500_000_000, workers=0)["refused"]


@pytest.mark.slow
def test_a_file_larger_than_the_memory_of_the_machine(folder, capsys):
    """Random batches by no and by two workers, and a training with validation."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    path = folder / "larger.h5"
    scenes = sparse_file(path, memory + memory // 4)
    peaks = {workers: check_read(path, scenes, limit=0, workers=workers)["peak"] for workers in (0, 2)}

    config = folder / "large.yaml"
    model, _, _ = CONFIG.replace("image_size: 16", f"image_size: {SIDE}").partition("data:")
    data = f"{{train: {path}, val: {path}, image_size: {SIDE}, set_size: 4, batch_size: 8, num_workers: 2}}"
    trainer = "{max_epochs: 2, limit_train_batches: 6, limit_val_batches: 2, accelerator: cpu, logger: false}"
    config.write_text(
        f"{model}\ndata: {{class_path: setpred.data.datamodule.SetDataModule, init_args: {data}}}\ntrainer: {trainer}\n"
    )
    script = """
import json, resource, sys
from setpred.commands.train import train

run = train(["--config", sys.argv[1], "--runs", sys.argv[2]])
print(json.dumps({"run": str(run), "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""
    said = measured(script, config, folder)
    assert [row["step"] for row in metrics(Path(said["run"]))] == ["6", "12"]
    with capsys.disabled():
        size = path.stat().st_size
        print(
            f"\na file of {size / 1e9:.1f} GB, memory {memory / 1e9:.1f} GB: reading took at most {peaks[0] / 1e9:.2f} "
            f"GB, with two workers {peaks[2] / 1e9:.2f} GB in each process, training {said['peak'] / 1e9:.2f} GB"
        )
    assert said["peak"] < MOST_TRAINING
