"""Samples of a model of `setpred.data.toy.Depths`, scored by number of steps against the known chances.

    python -m benchmarks.samples CHECKPOINT                 # a minute
    python -m benchmarks.samples CHECKPOINT --picture FILE  # and draws samples, and chances against shares

An input fits two sets: in front, of chance q, and behind. A sample is in front if its mean depth is positive. Prints
for each number of steps the energy score, the ratio of spread and distance, which is 1 for samples of the truth, the
mean over inputs of |share in front - q|, and the slope of the share over q. The first line is of samples of the truth.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from setpred.checkpoint.load import load_checkpoint
from setpred.data.toy import Depths
from setpred.metrics import EnergyScore
from setpred.model import SetPredictor
from setpred.sets import mean_present, presence_mask
from setpred.visualise.style import FAINT, PLAIN, WRONG, Sheet, styled

STEPS = (1, 2, 4, 10, 20, 50)
SAMPLES, SETS = 16, 500


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


@torch.no_grad()
def measure(model: SetPredictor, picture: Path | None) -> str:
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
    parser.add_argument("checkpoint", help="a .ckpt of configs/worlds/depths")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    options = parser.parse_args(arguments)
    print(measure(load_checkpoint(options.checkpoint).model, options.picture))


if __name__ == "__main__":
    main()
