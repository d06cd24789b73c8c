"""Loading batches of 128 images of 128x128 onto the device as numbers in [0, 1], against loading item by item.

    python -m benchmarks.data            # 2,048 images in the file
    python -m benchmarks.data --quick    # 64

The plain loader opens the file in a `Dataset`, returns one image at a time as float32, collates with torch's default
and moves the batch. Ours reads uint8 batches by index and converts them on the device: from the file, from the host's
memory, and on a GPU from its memory (`in_memory: device`). Every turn reads another batch; after the first, the file is
in the system's cache. Both return the same batches. The floor is the bytes that each loader must read and write, at the
device's measured bandwidth: the uint8 batch twice (picked, read) and its numbers once.

Notes: the share of a training step with the quickstart's model that waits for data, with the plain loader and with ours
(`setpred.training.callbacks.DataWaiting`, second epoch), and the scenes per second of the streamed renderer.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.timing import Row, compared, in_turns, peak_bandwidth, print_results
from setpred.checkpoint.untrusted import read_yaml
from setpred.commands.train import build
from setpred.data.datamodule import SetDataModule
from setpred.data.hdf5 import Header, Record
from setpred.data.hdf5_writer import write_set_file
from setpred.data.loading import EpochPermutation, ResumableLoader
from setpred.data.streamed import SceneStream
from setpred.nn import unit_images
from setpred.rendering.renderer import render
from setpred.rendering.sampling import SceneRules
from setpred.schema import CLEVR
from setpred.training.callbacks import DataWaiting

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
OBJECTS = (3, 6)


@dataclass(frozen=True)
class Sizes:
    images: int = 2048
    image_size: int = 128
    batch: int = 128
    turns: int = 15  # as many batches as an epoch has, less the unmeasured one
    steps: int = 20  # of a training epoch
    step_batch: int = 32  # the quickstart's


QUICK = Sizes(images=64, batch=16, turns=3, steps=2, step_batch=8)


def make_file(path: Path, images: int, image_size: int) -> None:
    """Noise images, which are stored uncompressed, with the sets of sampled scenes."""
    stream = SceneStream(images, seed=0, rules=SceneRules(objects=OBJECTS), set_size=CLEVR.max_objects)
    elements = stream.__getitems__(range(images))["elements"].numpy()
    rng = np.random.default_rng(0)

    def records(numbers: Sequence[int]) -> list[Record]:
        shape = (len(numbers), image_size, image_size, 3)
        pictures = rng.integers(0, 256, shape, dtype=np.uint8)
        return [Record(image, elements[n], np.full(3, np.nan), n) for n, image in zip(numbers, pictures, strict=True)]

    header, text = Header(images, image_size, CLEVR, {"kind": "benchmark"}), f"writing {image_size}x{image_size}"
    write_set_file(path, header, range(images), records, producer="benchmark", description=text)


class PlainData(Dataset):
    """One image at a time, as numbers."""

    def __init__(self, path: Path, set_size: int) -> None:
        self.file, self.set_size = h5py.File(path, "r", locking=False), set_size

    def __len__(self) -> int:
        return len(self.file["images"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.from_numpy(self.file["images"][index]).permute(2, 0, 1).float() / 255
        elements = torch.from_numpy(self.file["elements"][index][: self.set_size])
        return {"image": image, "elements": elements, "mask": elements[:, -1] > 0.5, "index": index}


class PlainModule(pl.LightningDataModule):
    """The plain data in the same order as ours."""

    def __init__(self, path: Path, *, set_size: int, batch_size: int) -> None:
        super().__init__()
        self.data, self.batch_size = PlainData(path, set_size), batch_size

    def train_dataloader(self) -> DataLoader:
        order = EpochPermutation(len(self.data), seed=0)
        return ResumableLoader(self.data, self.batch_size, sampler=order, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size)


def module(path: Path, where: Any, *, image_size: int, batch_size: int, **options: Any) -> SetDataModule:
    return SetDataModule(
        str(path), str(path), image_size=image_size, batch_size=batch_size, in_memory=where, seed=0, **options
    )


def on_device(batch: dict[str, Tensor], device: str) -> Tensor:
    """Move the batch and convert the images to numbers."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    return unit_images(moved["image"])


def endless(loader: DataLoader, device: str) -> Callable[[], Tensor]:
    """A function that takes the loader's next batch, in repeated epochs of one order."""

    def batches() -> Iterator[Tensor]:
        while True:
            for batch in loader:
                yield on_device(batch, device)

    return batches().__next__


def loading(path: Path, sizes: Sizes, device: str, notes: dict[str, str]) -> list[Row]:
    """A row for each location of the images."""
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    places = {"memory": True, "file": False} | ({"device": "device"} if device == "cuda" else {})
    plain = PlainModule(path, set_size=CLEVR.max_objects, batch_size=sizes.batch)
    loaders = {"plain": plain.train_dataloader()}
    for name, where in places.items():
        ours = module(path, where, image_size=sizes.image_size, batch_size=sizes.batch)
        ours.trainer = SimpleNamespace(world_size=1, global_rank=0, strategy=SimpleNamespace(root_device=place))
        ours.setup("fit")
        loaders[name] = ours.train_dataloader()
    ways = {name: endless(loader, device) for name, loader in loaders.items()}
    first = [way() for way in ways.values()]
    if not all(torch.equal(first[0], other) for other in first[1:]):
        raise SystemExit("the ways should give the same batches")
    pixels = first[0].numel()
    taken = in_turns(ways, sizes.turns, device)
    floor = 1e3 * pixels * (3 + 4) / peak_bandwidth(device)
    return [
        compared(
            f"{sizes.batch} images of {sizes.image_size}x{sizes.image_size} from {name}",
            f"data_{name}_{'gpu' if device == 'cuda' else 'cpu'}",
            taken["plain"],
            taken[name],
            floor_ms=floor,
            note=notes.get(name, ""),
        )
        for name in places
    ]


def waiting(data: pl.LightningDataModule, device: str) -> float:
    """Share of the second epoch that waits for data, with the quickstart's model."""
    options = ["--config", str(QUICKSTART), "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    model = build(options).model
    trainer = pl.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[DataWaiting()],
    )
    trainer.fit(model, datamodule=data)
    return float(trainer.callback_metrics["data_waiting"])


def streamed_rate(sizes: Sizes, device: str) -> float:
    """Scenes per second, sampled in this process and rendered on the device."""
    count = sizes.batch // 2
    stream = SceneStream(count, seed=0, rules=SceneRules(objects=(3, 10)), set_size=CLEVR.max_objects)
    numbers = iter(range(10**9))

    def way() -> None:
        scenes = stream.__getitems__([next(numbers) for _ in range(count)])["scenes"].to(device)
        render(scenes, width=sizes.image_size, height=sizes.image_size)

    return count / statistics.median(in_turns({"streamed": way}, 2, device)["streamed"])


def rows(quick: bool) -> list[Row]:
    """Rows for the CPU, and for a GPU if there is one."""
    sizes, found = QUICK if quick else Sizes(), []
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder) / "large.h5", Path(folder) / "small.h5"
        make_file(large, sizes.images, sizes.image_size)
        make_file(small, sizes.steps * sizes.step_batch, 64)
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            set_size = read_yaml(QUICKSTART)["data"]["init_args"]["set_size"]
            sets = {"set_size": set_size, "batch_size": sizes.step_batch}
            best = "device" if device == "cuda" else True
            ours = waiting(module(small, best, image_size=64, **sets), device)
            plain = waiting(PlainModule(small, **sets), device)
            shares = f"of a quickstart step {100 * ours:.2f} % waits, of one with the plain loader {100 * plain:.2f} %"
            rate = f"streamed instead: {streamed_rate(sizes, device):.0f} scenes a second drawn"
            notes = {"device" if device == "cuda" else "memory": shares, "file": rate}
            found += loading(large, sizes, device, notes)
    return found


if __name__ == "__main__":
    print_results(__doc__, rows)
