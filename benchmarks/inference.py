"""Objects on a folder of pictures: `setpred.predict`, against one picture after the other.

    python -m benchmarks.inference            # 256 pictures of 480x320, the quickstart's model
    python -m benchmarks.inference --quick    # 8 of them

From PNG files to named objects. The plain way opens a picture, resizes it and gives it to the model alone; ours decodes
in threads and gives the model batches. Both have the same weights, which are random, and find the same elements.
"""

from __future__ import annotations

import argparse
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

from benchmarks.timing import Row, compared, flops, in_turns, peak_flops, seconds
from setpred.cli import build
from setpred.data.clevr import PIXEL_SIZE
from setpred.data.pictures import decoded, find_images
from setpred.data.rendered import built_in_scenes
from setpred.data.workers import available_cores
from setpred.model import SetPredictor
from setpred.precision import encoder_autocast
from setpred.predict import predict
from setpred.rendering.renderer import render
from setpred.schema import CLEVR

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
BATCH = 64


@torch.no_grad()
def plain(model: SetPredictor, paths: Iterable[str], image_size: int, device: str) -> Iterator[Tensor]:
    """Elements of each picture, one by one."""
    for path in paths:
        picture = Image.open(path).convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        with encoder_autocast(torch.device(device)):
            elements = model(image.to(device))
        yield elements[0].float().cpu()


def make_pictures(folder: Path, count: int, distinct: int) -> list[str]:
    """PNG files of CLEVR's size: so many rendered scenes, and copies of them."""
    width, height = PIXEL_SIZE
    scenes = render(built_in_scenes(range(distinct), seed=0, objects=(3, 6)), width=width, height=height)
    for number in range(count):
        path = folder / f"{number:06d}.png"
        if number < distinct:
            Image.fromarray(scenes[number].numpy()).save(path)
        else:
            shutil.copyfile(folder / f"{number % distinct:06d}.png", path)
    return find_images([folder])


def row(paths: list[str], device: str, turns: int) -> Row:
    torch.manual_seed(0)
    model = build(["--config", str(CONFIG)]).model.model.to(device).eval()
    size = model.encoder.image_size

    def ours() -> Iterator[Tensor]:
        return (elements for _, elements in predict(model, paths, image_size=size, batch_size=BATCH, device=device))

    # the middle picture: with random weights, the descent of some blows rounding up a thousandfold
    differ = statistics.median(
        float((a - b).abs().max()) for a, b in zip(plain(model, paths, size, device), ours(), strict=True)
    )
    # bfloat16, in which a GPU encodes, rounds otherwise in other batches
    assert differ < (1e-3 if device == "cpu" else 0.5), f"the two ways differ by {differ}"

    def named(sets: Iterable[Tensor]) -> list[list[dict[str, Any]]]:
        return [CLEVR.decode(elements, threshold=-math.inf) for elements in sets]  # random weights are sure of none

    ways = {"plain": lambda: named(plain(model, paths, size, device)), "ours": lambda: named(ours())}
    taken = in_turns(ways, turns, device)
    decoding = min(seconds(lambda: list(decoded(paths, size))) for _ in range(turns))
    batch = torch.zeros(BATCH, 3, size, size, dtype=torch.uint8, device=device)

    def products() -> None:
        with torch.no_grad():
            model(batch)

    floor = len(paths) / BATCH * flops(products) / peak_flops(BATCH * 16, 256, device)
    rates = {name: len(paths) / statistics.median(values) for name, values in taken.items()}
    return compared(
        f"predict: {len(paths)} pictures of {PIXEL_SIZE[0]}x{PIXEL_SIZE[1]}, quickstart model",
        "predict_gpu" if device == "cuda" else "predict_cpu",
        taken["plain"],
        taken["ours"],
        floor_ms=1e3 * floor,
        note=f"{rates['ours']:.0f} images a second, plain {rates['plain']:.0f}; decoding alone "
        f"{len(paths) / decoding:.0f} on {available_cores()} cores; floor: the model's products",
    )


def rows(quick: bool) -> list[Row]:
    """On the CPU, and on a GPU if there is one."""
    count, distinct, turns = (8, 2, 1) if quick else (256, 32, 3)
    with tempfile.TemporaryDirectory() as folder:
        paths = make_pictures(Path(folder), count, distinct)
        return [row(paths, device, turns) for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few pictures")
    for line in rows(parser.parse_args().quick):
        print(line, flush=True)


if __name__ == "__main__":
    main()
