"""Prediction of a folder of images by `setpred.commands.predict`, against one image after the other.

    python -m benchmarks.inference            # 256 images of 480x320, the quickstart's model (voting)
    python -m benchmarks.inference --quick    # 8 of them

From PNG files to named objects. The plain loop opens and resizes an image and passes it alone to the encoder and to the
plain decoder of benchmarks/voting.py; ours decodes in threads and batches the images. Both have the same random weights
and predict the same elements. Implicit Slot Attention, on the same trunk, predicts as ours does. The floor is the
matrix products and convolutions of ours alone. All take turns in one run.
"""

from __future__ import annotations

import copy
import math
import shutil
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import decoder
from benchmarks.timing import Row, Way, compared, in_turns, print_results, products_alone, seconds
from benchmarks.train_step import of_dtype
from benchmarks.voting import SLOTS, against_slots, floor_of, plain_sets
from setpred.commands.predict import predict
from setpred.commands.train import build
from setpred.data.images import PIXEL_SIZE, decoded, find_images
from setpred.data.scenes import built_in_scenes
from setpred.evaluation import encoder_autocast
from setpred.model import SetPredictor
from setpred.rendering.renderer import render
from setpred.schema import CLEVR
from setpred.workers import available_cores

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
BATCH = 64


@torch.no_grad()
def plain(model: SetPredictor, paths: Iterable[str], image_size: int, device: str) -> Iterator[Tensor]:
    """Elements of each image, one by one."""
    for path in paths:
        picture = Image.open(path).convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        with encoder_autocast(torch.device(device)):
            features = model.encode(image.to(device))
        yield plain_sets(model.decoder, features.to(torch.get_default_dtype()))[0].float().cpu()


def make_pictures(folder: Path, count: int, distinct: int) -> list[str]:
    """PNG files of CLEVR's size: rendered scenes, and copies of them."""
    width, height = PIXEL_SIZE
    scenes = render(built_in_scenes(range(distinct), seed=0, objects=(3, 6)), width=width, height=height)
    for number in range(count):
        path = folder / f"{number:06d}.png"
        if number < distinct:
            Image.fromarray(scenes[number].numpy()).save(path)
        else:
            shutil.copyfile(folder / f"{number % distinct:06d}.png", path)
    return find_images([folder])


def model_of(config: Path, device: str) -> SetPredictor:
    torch.manual_seed(0)
    return build(["--config", str(config)]).model.model.to(device).eval()


def measured(paths: list[str], device: str, turns: int) -> list[Row]:
    """Ours against the plain loop, and against implicit Slot Attention."""
    model, slots = (model_of(config, device) for config in (CONFIG, SLOTS))
    size = model.encoder.image_size

    def ours(model: SetPredictor, paths: list[str]) -> Iterator[Tensor]:
        return (elements for _, elements in predict(model, paths, image_size=size, batch_size=BATCH, device=device))

    # in double precision: with random weights the votes nearly agree, and the descent amplifies rounding
    with of_dtype(torch.float64):
        exact, some = copy.deepcopy(model).double(), paths[:BATCH]
        exact.encoder.register_forward_pre_hook(lambda _, inputs: tuple(each.double() for each in inputs))
        pairs = zip(plain(exact, some, size, device), ours(exact, some), strict=True)
        differ = statistics.median(float((a - b).abs().max()) for a, b in pairs)
    assert differ < 1e-4, f"the two ways differ by {differ}"

    def named(sets: Iterable[Tensor]) -> list[list[dict[str, Any]]]:
        return [CLEVR.decode(elements, threshold=-math.inf) for elements in sets]  # random weights: any confidence

    def products(model: SetPredictor) -> Way:
        """Products of a pass of `BATCH` images."""
        batch = torch.zeros(BATCH, 3, size, size, dtype=torch.uint8, device=device)
        batch = batch.contiguous(memory_format=torch.channels_last)

        @torch.no_grad()
        def once() -> None:
            with encoder_autocast(torch.device(device)):
                model(batch)

        return products_alone(once)

    ways = {
        "plain": lambda: named(plain(model, paths, size, device)),
        "ours": lambda: named(ours(model, paths)),
        "slots": lambda: named(ours(slots, paths)),
        "floor": products(model),
        "slots floor": products(slots),
    }
    taken = in_turns(ways, turns, device)
    for name in ("floor", "slots floor"):
        taken[name] = [len(paths) / BATCH * turn for turn in taken[name]]
    decoding = min(seconds(lambda: list(decoded(paths, size))) for _ in range(turns))
    rates = {name: len(paths) / statistics.median(taken[name]) for name in ("plain", "ours")}
    what = f"predict: {len(paths)} pictures of {PIXEL_SIZE[0]}x{PIXEL_SIZE[1]}, quickstart model (voting)"
    label = decoder.label(device)
    row = compared(
        what,
        f"predict_{label}",
        taken["plain"],
        taken["ours"],
        floor_ms=floor_of(taken),
        note=f"{rates['ours']:.0f} images a second, plain {rates['plain']:.0f}; decoding alone "
        f"{len(paths) / decoding:.0f} on {available_cores()} cores; floor: the model's products",
    )
    return [row, against_slots(what, f"predict_slots_per_voting_{label}", taken, floor_of(taken))]


def rows(quick: bool) -> list[Row]:
    """Rows for the CPU, and for a GPU if there is one."""
    count, distinct, turns = (8, 2, 1) if quick else (256, 32, 3)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(Path(folder), count, distinct)
        devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        return [row for device in devices for row in measured(paths, device, turns)]


if __name__ == "__main__":
    print_results(__doc__, rows)
