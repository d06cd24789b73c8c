"""Damaged and hostile files of every kind are rejected by an `InputError`, or read with a valid result.

The law for a mutated file: an `InputError`, or a result. No other exception, crash or hang, and no more memory than
`MEMORY`. Where the format has a checksum (checkpoint, release, prepared file by `verify`) and bytes were mutated, the
result equals that of the original file. Results are well-formed: finite numbers, right shapes, valid sets.
"""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import resource
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import h5py
import mutations as m
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import CONFIG, clevr_folder, untrained

from setpred import CLEVR, InputError
from setpred.checkpoint import export, load_checkpoint, weights
from setpred.checkpoint.load import KEY
from setpred.commands.train import build, check_fit
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import SetFile
from setpred.data.hdf5 import malformed, verify
from setpred.data.images import load_image
from setpred.data.scenes import render_file
from setpred.decoders.starts import GaussianStart, LearnedStart, RandomStart

FEW, MANY = 40, 500  # mutated files of each kind
SECONDS, MEMORY = 30, 500 * 2**20  # that reading a file may take


def read_scenes(path: Path) -> list:
    folder = ClevrFolder(path.parents[1], "val")
    assert not malformed(folder.elements, CLEVR).any(), "a malformed set"
    assert (folder.index >= 0).all(), "an image with a negative number"
    for number in range(min(4, len(folder))):
        assert folder.image(number, 16).shape == (16, 16, 3)
    return [folder.elements, folder.index, folder.file_names]


def read_hdf5(path: Path) -> list:
    data = SetFile(path)
    batch = data.__getitems__(range(len(data)))
    assert not malformed(batch["elements"].numpy(), data.schema).any(), "a malformed set"
    assert batch["image"].shape == (len(data), 3, data.image_size, data.image_size)
    verify(path)
    return [data.schema, data.source, batch["elements"], batch["image"].clone()]


def read_image(path: Path) -> list:
    image = load_image(path, 16)
    assert (image.shape, image.dtype) == ((16, 16, 3), np.uint8)
    return [image]


def read_config(path: Path) -> list:
    """Read a configuration as train.py does, up to the first batch."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli = build(["--config", str(path), "--runs", str(path.parent), "--trainer.logger", "false"])
            cli.datamodule.setup("fit")
            check_fit(cli)
    except SystemExit as stopped:
        raise InputError(said.getvalue().partition("error: ")[2] if stopped.code == 2 else "") from stopped
    except MemoryError as error:  # sizes are up to the user
        raise InputError("the configuration takes more memory than the test allows") from error
    assert all(bool(parameter.isfinite().all()) for parameter in cli.model.parameters()), "non-finite weights"
    return [repr(cli.model), cli.model.learning_rate]


def read_checkpoint(path: Path) -> list:
    loaded = load_checkpoint(path)
    state = loaded.model.state_dict()
    assert all(bool(value.isfinite().all()) for value in state.values()), "non-finite weights"
    described = (loaded.schema, loaded.seed, loaded.epoch, loaded.step, loaded.image_size, loaded.data)
    return [repr(loaded.model), described, *(part for item in sorted(state.items()) for part in item)]


READERS = {".json": read_scenes, ".h5": read_hdf5, ".png": read_image, ".yaml": read_config}
READERS |= {".ckpt": read_checkpoint, ".safetensors": read_checkpoint}


def answer(path: Path) -> tuple[str, str]:
    """("result", its digest), ("rejected", the message) or ("fault", a traceback) of reading a file."""
    try:
        found = hashlib.sha256()
        for part in READERS[path.suffix](path):
            part = part.numpy() if isinstance(part, torch.Tensor) else part
            found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode(errors="replace"))
        return "result", found.hexdigest()
    except InputError as error:
        return "rejected", str(error)
    except BaseException:
        return "fault", traceback.format_exc()


def limit(folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY,) * 2)


class Reader:
    """A forked process that reads files with bounded memory; a crash or hang of it is a fault."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pool = folder, None

    def __call__(self, path: Path) -> tuple[str, str]:
        if self.pool is None:
            fork = multiprocessing.get_context("fork")
            self.pool = ProcessPoolExecutor(1, mp_context=fork, initializer=limit, initargs=(self.folder,))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of forking a process with threads
                return self.pool.submit(answer, path).result(timeout=SECONDS)
        except Exception as error:
            self.close()
            return "fault", f"the process crashed or did not answer: {error!r}"

    def close(self) -> None:
        if self.pool is not None:
            for process in self.pool._processes.values():
                process.kill()
            self.pool.shutdown()
            self.pool = None


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    reader = Reader(tmp_path_factory.mktemp("reader"))
    yield reader
    reader.close()


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> dict[str, Path]:
    """A valid file of each kind, by its suffix."""
    folder = tmp_path_factory.mktemp("originals")
    annotations = clevr_folder(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    render_file(folder / "a.h5", images=6, image_size=16, objects=(1, 3))
    config = yaml.safe_load(CONFIG)
    data = {"train": str(folder / "a.h5"), "val": str(folder / "a.h5"), "image_size": 16, "batch_size": 2}
    config["data"] = {"class_path": "setpred.data.datamodule.SetDataModule", "init_args": data | {"set_size": 4}}
    (folder / "a.yaml").write_text(yaml.safe_dump(config))
    checkpoint = untrained(folder)
    export(checkpoint, folder / "release.safetensors")
    names = ("a.png", "a.h5", "a.yaml", "release.safetensors")
    paths = (annotations, checkpoint, *(folder / name for name in names))
    return {path.suffix: path for path in paths}


def mutated_values(draw, original: Path, path: Path) -> None:
    """Mutate the values that a file holds, and write them in its format, with the right checksum."""

    def tree(value):
        return m.mutate_tree(value, draw(m.tree_mutations))

    if path.suffix == ".json":
        path.write_bytes(m.as_json(tree(json.loads(original.read_text()))))
    elif path.suffix == ".yaml":
        path.write_bytes(m.as_bytes(yaml.safe_dump(tree(yaml.safe_load(original.read_text())), sort_keys=False)))
    elif path.suffix == ".ckpt":
        content = torch.load(original, weights_only=True)
        model = draw(st.booleans())
        changed = {KEY: content[KEY] | {"model": tree(content[KEY]["model"])}} if model else tree(dict(content))
        torch.save((content if model else {}) | changed if isinstance(changed, dict) else changed, path)
    elif path.suffix == ".safetensors":
        tensors, record = weights.unpack(original)
        path.write_bytes(weights.pack(tensors, tree(record)))
    elif path.suffix == ".h5":
        path.write_bytes(original.read_bytes())
        with h5py.File(path, "r+") as file:
            attributes = {name: value.item() if hasattr(value, "item") else value for name, value in file.attrs.items()}
            attributes["schema"] = json.loads(attributes["schema"])
            for name, value in tree(attributes).items():
                plain = isinstance(value, str | int | float) and name != "schema"
                file.attrs[name] = value if plain else m.as_json(value).decode(errors="replace")
    else:
        raise TypeError("an image holds no tree of values")


CASES = [(suffix, 10 if suffix == ".yaml" else FEW) for suffix in READERS]
CASES += [pytest.param(suffix, MANY, marks=pytest.mark.slow) for suffix in READERS]


@pytest.mark.parametrize(("suffix", "count"), CASES)
def test_mutated_files_are_rejected_or_read(suffix, count, reader, originals, tmp_path):
    original, found = originals[suffix], {"rejected": 0, "result": 0}
    expected = reader(original)
    assert expected[0] == "result", expected
    path = tmp_path / "scenes" / original.name if suffix == ".json" else tmp_path / f"mutated{suffix}"
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "images").symlink_to(originals[".png"].parent / "images")

    @settings(
        max_examples=count,
        derandomize=True,  # the same files each time; a failing one is shrunk and printed
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(data):
        in_bytes = suffix == ".png" or data.draw(st.booleans())
        if in_bytes:
            path.write_bytes(m.mutate_bytes(original.read_bytes(), data.draw(m.byte_mutations)))
        else:
            try:
                mutated_values(data.draw, original, path)
            except (TypeError, ValueError, RecursionError, AttributeError, OverflowError):
                path.write_bytes(original.read_bytes()[: original.stat().st_size // 3])  # no such file can be written
        kind, content = reader(path)
        assert kind != "fault", content
        if kind == "rejected":
            assert 20 < len(content.strip()) < 5000
            assert "Traceback" not in content
        elif in_bytes and suffix in (".ckpt", ".safetensors", ".h5"):
            assert content == expected[1], "damage went unnoticed"
        found[kind] += 1

    each()
    assert found["rejected"] > 0
    assert sum(found.values()) >= count


def test_starts_of_empty_sets_are_rejected():
    for start in (RandomStart, LearnedStart, GaussianStart):
        for size in ((0, 19), (-4, 19), (4, 0)):
            with pytest.raises(InputError, match="expected sets of at least 1 element"):
                start(*size)
