"""Samples of a model of `configs/worlds/depths` or `configs/occluded`, scored by number of steps.

    python -m benchmarks.samples CHECKPOINT                 # a minute; scenes some minutes
    python -m benchmarks.samples CHECKPOINT --picture FILE  # and draws samples

An input of depths fits two sets: in front, of chance q, and behind. A sample is in front if its mean depth is positive.
Prints for each number of steps the energy score, the ratio of spread and distance, which is 1 for samples of the truth,
the mean over inputs of |share in front - q|, and the slope of the share over q. The first line is of samples of the
truth.

Scenes have the scores of `SampledPrecision`, and the objects in the hidden part: mean and deviation of their number.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setpred.checkpoint.load import Checkpoint, load_checkpoint
from setpred.data.dataset import SetFile
from setpred.data.toy import Depths
from setpred.encoders import Occluded
from setpred.errors import InputError
from setpred.metrics import EnergyScore, SampledPrecision
from setpred.model import SetPredictor
from setpred.rendering.camera import NOMINAL_CAMERA, Camera
from setpred.schema import CLEVR
from setpred.sets import mean_present, presence_mask
from setpred.visualise.style import FAINT, GROUND, PLAIN, WRONG, Sheet, styled
from setpred.visualise.world import (
    VIEW,
    as_pictures,
    cameras_of,
    draw_filled,
    draw_outlined,
    on_map,
    show_image,
    show_map,
)

STEPS, SCENE_STEPS = (1, 2, 4, 10, 20, 50), (1, 2, 4, 10, 20)
SAMPLES, SETS, DRAWN = 16, 500, 4


def shares(samples: Tensor) -> Tensor:
    """Share of samples `[samples, sets, n, 3]` in front, `[sets]`."""
    present = presence_mask(samples).flatten(0, 1)
    return (mean_present(samples[..., 1].flatten(0, 1), present) > 0).double().unflatten(0, samples.shape[:2]).mean(0)


def row(name: str, samples: Tensor, target: Tensor, chances: Tensor) -> str:
    found = EnergyScore(samples=len(samples), cutoff=2.0)(samples, target)
    share, chances = shares(samples), chances.double()
    slope = torch.cov(torch.stack([chances, share]))[0, 1] / chances.var()
    numbers = found["energy"], found["spread"] / found["distance"], (share - chances).abs().mean(), slope
    return f"| {name} | " + " | ".join(f"{float(number):.3f}" for number in numbers) + " |"


@styled()
def draw(path: Path, samples: Tensor, seen: Tensor, target: Tensor) -> Path:
    """Draw the samples of three inputs over both answers, and the share in front against the chance."""
    sheet = Sheet(10.0, 2.9, dpi=100)
    *panels, last = sheet.subplots(1, 4)
    sheet.subplots_adjust(left=0.07, right=0.99, bottom=0.17, top=0.88, wspace=0.25)
    chances = seen[:, 0, 2]
    for axes, wanted in zip(panels, (0.1, 0.5, 0.9), strict=True):
        chosen = int((chances - wanted).abs().argmin())
        x, depth = seen[chosen, presence_mask(target[chosen]), :2].T
        for answer in (depth, -depth):
            axes.plot(x, answer, color=FAINT, linewidth=1.0, marker="o", markersize=9, markerfacecolor="none")
        points = samples[:, chosen][presence_mask(samples[:, chosen])]
        axes.plot(*points[:, :2].T, color=PLAIN, linestyle="", marker=".", markersize=4)
        axes.set(title=f"chance of front {chances[chosen]:.2f}", xlabel="x", ylim=(-1.1, 1.1))
    panels[0].set_ylabel("depth")
    last.plot([0, 1], [0, 1], color=FAINT, linewidth=1.0)
    last.plot(chances, shares(samples), color=WRONG, linestyle="", marker=".", markersize=3)
    last.set(title="share of samples in front", xlabel="chance")
    return sheet.save(path)


def hidden_objects(samples: Tensor, cameras: Sequence[Camera], edge: float) -> Tensor:
    """Number of objects of sets `[..., images, n, dim]` whose centre is right of an edge, a share of the width."""
    places = CLEVR.values(samples, "coords").double().numpy()
    pixels = [camera.project(places[..., image, :, :], 1, 1) for image, camera in enumerate(cameras)]
    column = torch.from_numpy(np.stack(pixels, axis=-3))[..., 0]
    return ((column > edge) & presence_mask(samples)).sum(-1)


@styled()
def draw_scenes(path: Path, images: Tensor, target: Tensor, samples: Tensor, edge: float) -> Path:
    """Draw images with their hidden part, and maps of the real objects (outlines) and of all samples (symbols)."""
    sheet = Sheet(2.6 * len(images), 4.6, dpi=100)
    top, bottom = sheet.subplots(2, len(images))
    sheet.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.99, wspace=0.04, hspace=0.02)
    for column, picture in enumerate(as_pictures(images)):
        show_image(top[column], picture)
        top[column].axvspan(edge * VIEW[0], VIEW[0], color=GROUND, alpha=0.85)
        show_map(bottom[column], NOMINAL_CAMERA, labelled=False)
        for sample in samples[:, column]:
            for found in CLEVR.decode(sample):
                draw_filled(
                    bottom[column], found, on_map(found["coords"], NOMINAL_CAMERA), opacity=1 / len(samples) ** 0.5
                )
        for real in CLEVR.decode(target[column]):
            draw_outlined(bottom[column], real, on_map(real["coords"], NOMINAL_CAMERA), zorder=5)
    return sheet.save(path)


@torch.no_grad()
def measure_scenes(loaded: Checkpoint, data: str | None, picture: Path | None) -> str:
    """Table of the samples of scenes by number of steps."""
    images = SetFile(data or loaded.data["path"])
    batch = images.__getitems__(range(min(SETS, len(images))))
    model, target = loaded.model.eval(), batch["elements"]
    hidden = next((part for part in model.modules() if isinstance(part, Occluded)), None)
    if hidden is None:
        raise InputError("expected a model with an Occluded encoder, as of configs/occluded")
    edge = hidden.seen(loaded.image_size, hidden.share) / loaded.image_size
    cameras = cameras_of([images.camera(image) for image in range(len(target))], len(target))
    lines = [
        "| steps | AP at inf | of the medoid | of the best | energy | spread / distance | hidden objects | deviation |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    real = hidden_objects(target, cameras, edge).double()
    lines.append(f"| truth | | | | | | {real.mean():.2f} | {real.std():.2f} |")
    own = model.decoder.iterations
    for steps in sorted({*SCENE_STEPS, own}) if getattr(model.decoder, "denoises", False) else [own]:
        samples = torch.cat([model.samples(part, SAMPLES, iterations=steps) for part in batch["image"].split(50)], 1)
        metric = SampledPrecision(samples=SAMPLES, schema=CLEVR)
        found, counts = metric(samples, target), hidden_objects(samples, cameras, edge).double()
        numbers = [f"{100 * float(found[name]):.1f}" for name in ("ap_inf", "medoid_ap_inf", "best_ap_inf")]
        numbers += [f"{found['energy']:.3f}", f"{found['spread'] / found['distance']:.3f}"]
        lines.append("| " + " | ".join([str(steps), *numbers, f"{counts.mean():.2f}", f"{counts.std():.2f}"]) + " |")
        if picture is not None and steps == own:
            draw_scenes(picture, batch["image"][:DRAWN], target[:DRAWN], samples[:, :DRAWN], edge)
    return "\n".join(lines)


@torch.no_grad()
def measure(model: SetPredictor, picture: Path | None) -> str:
    """Table of the samples of depths by number of steps."""
    world = Depths(train_sets=1, val_sets=SETS, set_size=model.decoder.set_size, batch_size=SETS)
    world.setup()
    batch = world.val_data.__getitems__(range(SETS))
    seen, target, mask = batch["input"], batch["elements"], batch["input_mask"]
    chances = seen[:, 0, 2]
    drawn = torch.rand(SAMPLES, SETS, 1, generator=torch.Generator().manual_seed(0)) < chances[:, None]
    depth = torch.where(drawn, seen[..., 1], -seen[..., 1])
    truth = torch.stack([seen[..., 0].expand_as(depth), depth, target[..., 2].expand_as(depth)], -1)
    lines = [
        "| steps | energy | spread / distance | error of the share | slope |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines.append(row("truth", truth, target, chances))
    for steps in STEPS:
        samples = model.eval().samples(seen, SAMPLES, mask=mask, iterations=steps)
        lines.append(row(str(steps), samples, target, chances))
        if picture is not None and steps == model.decoder.iterations:
            draw(picture, samples, seen, target)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a .ckpt of configs/worlds/depths or configs/occluded")
    parser.add_argument("--data", help="scenes (default: those of the model's validation)")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    options = parser.parse_args(arguments)
    loaded = load_checkpoint(options.checkpoint)
    if loaded.image_size is None:
        print(measure(loaded.model, options.picture))
    else:
        print(measure_scenes(loaded, options.data, options.picture))


if __name__ == "__main__":
    main()
