"""Equilibrium objectives against plain ones, on random multisets and on rendered scenes.

    python benchmarks/equilibrium.py multisets --seeds 0 1 2 --out multisets.jsonl
    python benchmarks/equilibrium.py scenes --seeds 0 1 2 --out scenes.jsonl
    python benchmarks/equilibrium.py table multisets.jsonl scenes.jsonl

Each (form, seed) trains for the same number of steps on the same data; only the objective differs. Each run appends a
line of JSON to the file. Runs that are in the file are skipped, so an interrupted benchmark resumes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from setpred.aggregators import (
    Aggregator,
    EquilibriumAggregation,
    FSPool,
    ResidualPotential,
    SetEncoder,
    SumPool,
)
from setpred.data.datamodule import RenderedScenes
from setpred.decoders import IDSPN
from setpred.encoders import SmallCNN
from setpred.inner import EquilibriumMatching, GradientDescent, LatentMatching
from setpred.losses import HungarianLoss
from setpred.metrics import average_precision
from setpred.model import SetPredictor
from setpred.schema import CLEVR
from setpred.training.mixed_precision import cpu_has_bfloat16
from setpred.training.schedules import WarmupCosine

RANK_DIM = 8
THRESHOLDS = (float("inf"), 1.0, 0.5)


class RankedPotential(nn.Module):
    """F on the sorted features, with a learned term of the rank added to the first layer."""

    def __init__(self, width: int, *, set_size: int) -> None:
        super().__init__()
        self.potential = ResidualPotential(width + RANK_DIM, width, widths=(64, 32))
        self.rank = nn.Parameter(torch.randn(set_size, RANK_DIM))

    def forward(self, elements: Tensor, state: Tensor) -> Tensor:
        rank = self.rank.expand(len(elements), -1, -1)
        return self.potential(torch.cat([elements.sort(dim=1, descending=True).values, rank], dim=-1), state)


def equilibrium(
    width: int, *, prior: Aggregator | None, gain: float, steps: int = 10, potential: nn.Module | None = None
) -> EquilibriumAggregation:
    return EquilibriumAggregation(
        width,
        potential=potential or ResidualPotential(width, width, widths=(64, 32)),
        prior=prior,
        gain=gain,
        descent=GradientDescent(iterations=steps, learning_rate=0.3, momentum=0.5, learned=True),
    )


def forms(set_size: int, set_dim: int, width: int) -> dict[str, Callable[[], tuple[nn.Module, float | None]]]:
    """(objective, clip of the decoder's gradient) by name."""

    def encoder(aggregator: Aggregator) -> SetEncoder:
        return SetEncoder(aggregator, set_dim=set_dim, hidden_dim=width)

    def fspool() -> FSPool:
        return FSPool(width, set_size=set_size)

    return {
        "sum": lambda: (LatentMatching(encoder(SumPool(width))), None),
        "FSPool": lambda: (LatentMatching(encoder(fspool())), None),
        "residual, FSPool prior, gain from 0": lambda: (
            EquilibriumMatching(encoder(equilibrium(width, prior=fspool(), gain=0.0))),
            None,
        ),
        "residual, FSPool prior, gain from 0, rank-aware": lambda: (
            EquilibriumMatching(
                encoder(
                    equilibrium(width, prior=fspool(), gain=0.0, potential=RankedPotential(width, set_size=set_size))
                )
            ),
            None,
        ),
        "residual, r = 0, clip 1": lambda: (
            EquilibriumMatching(encoder(equilibrium(width, prior=None, gain=1.0))),
            1.0,
        ),
        "nested 3 steps, r = 0, clip 1": lambda: (
            LatentMatching(encoder(equilibrium(width, prior=None, gain=1.0, steps=3))),
            1.0,
        ),
    }


def multisets(form: str, seed: int, *, steps: int) -> dict[str, float]:
    """Auto-encode sets of 8 elements of 4 standard normal numbers; validation smooth L1 on 2,048 others."""
    set_size, set_dim, width = 8, 4, 128
    torch.manual_seed(seed)
    encoder = SetEncoder(FSPool(width, set_size=set_size), set_dim=set_dim, hidden_dim=width)
    objective, clip = forms(set_size, set_dim, width)[form]()
    decoder = IDSPN(
        objective,
        GradientDescent(iterations=10, momentum=0.9, clip=clip),
        set_size=set_size,
        set_dim=set_dim,
    )
    model = nn.ModuleList([encoder, decoder])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss = HungarianLoss()
    training = torch.Generator().manual_seed(seed + 1000)
    start = time.perf_counter()
    for _ in range(steps):
        elements = torch.randn(128, set_size, set_dim, generator=training)
        step_loss = loss(decoder(encoder(elements)), elements).mean()
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    unseen = torch.randn(2048, set_size, set_dim, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        error = torch.cat([loss(decoder(encoder(part)), part) for part in unseen.split(256)]).mean()
    return {"smooth_l1": float(error), "ms_per_step": 1e3 * seconds / steps}


def scenes(form: str, seed: int, *, steps: int) -> dict[str, float]:
    """Rendered scenes of 3 to 6 objects at 64x64, as in the quickstart; AP in % on 1,000 unseen ones."""
    set_size, width = 6, 256
    data = RenderedScenes(train_images=20_000, val_images=1_000, objects=(3, 6), set_size=set_size, seed=seed)
    data.prepare_data()
    data.setup()
    torch.manual_seed(seed)
    objective, clip = forms(set_size, data.schema.set_dim, width)[form]()
    descent = GradientDescent(iterations=10, learning_rate=4.0, momentum=0.9, clip=clip or 10.0)
    model = SetPredictor(
        SmallCNN(latent_dim=width), IDSPN(objective, descent, set_size=set_size, set_dim=CLEVR.set_dim)
    )
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    schedule, loss = WarmupCosine(warmup_steps=200, total_steps=steps), HungarianLoss()
    loader, epoch, batches = data.train_dataloader(), -1, iter(())
    start = time.perf_counter()
    for step in range(steps):
        batch = next(batches, None)
        if batch is None:
            epoch += 1
            loader.sampler.set_epoch(epoch)
            batches = iter(loader)
            batch = next(batches)
        optimizer.param_groups[0]["lr"] = 3e-3 * schedule(step, epoch)
        with torch.autocast("cpu", torch.bfloat16, enabled=cpu_has_bfloat16()):
            latent = model.encode(batch["image"])
        step_loss = loss(model.decoder(latent), batch["elements"]).mean()
        optimizer.zero_grad()
        step_loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        pairs = [(model(b["image"]), b["elements"]) for b in data.val_dataloader()]
    predicted, target = (torch.cat(part) for part in zip(*pairs, strict=True))
    scores = average_precision(predicted, target, thresholds=THRESHOLDS, schema=CLEVR)
    return {f"AP_{t:g}": 100 * score for t, score in scores.items()} | {"ms_per_step": 1e3 * seconds / steps}


TASKS: dict[str, tuple[Callable[..., dict[str, float]], tuple[str, ...]]] = {
    "multisets": (
        multisets,
        (
            "FSPool",
            "residual, FSPool prior, gain from 0",
            "residual, r = 0, clip 1",
            "residual, FSPool prior, gain from 0, rank-aware",
            "nested 3 steps, r = 0, clip 1",
            "sum",
        ),
    ),
    "scenes": (scenes, ("FSPool", "residual, FSPool prior, gain from 0", "residual, r = 0, clip 1")),
}


def compare(task: str, *, seeds: list[int], steps: int, names: list[str], out: Path) -> None:
    """Trains what `out` lacks, seed by seed."""
    have = set()
    if out.exists():
        have = {(r["form"], r["seed"], r["steps"]) for r in map(json.loads, out.read_text().splitlines())}
    run, default = TASKS[task]
    for seed in seeds:
        for form in names or default:
            if (form, seed, steps) in have:
                continue
            result = {"task": task, "form": form, "seed": seed, "steps": steps} | run(form, seed, steps=steps)
            result |= {"threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine()}
            with out.open("a") as file:
                file.write(json.dumps(result) + "\n")
            print(result, flush=True)


def table(files: list[Path]) -> None:
    """Mean and spread over seeds, as Markdown."""
    results = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    for task in dict.fromkeys(r["task"] for r in results):
        ours = [r for r in results if r["task"] == task]
        metrics = [key for key in ours[0] if key.startswith(("smooth", "AP"))]
        print(f"\n{task}, {ours[0]['steps']} steps\n\n| objective | seeds | {' | '.join(metrics)} |")
        print("|---" * (2 + len(metrics)) + "|")
        for form in dict.fromkeys(r["form"] for r in ours):
            runs = [r for r in ours if r["form"] == form]
            cells = []
            for metric in metrics:
                values = [r[metric] for r in runs]
                digits = 4 if metric.startswith("smooth") else 1
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                cells.append(f"{statistics.mean(values):.{digits}f} ± {spread:.{digits}f}")
            print(f"| {form} | {len(runs)} | {' | '.join(cells)} |")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = options.add_subparsers(dest="command", required=True)
    for task in TASKS:
        command = commands.add_parser(task)
        command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        command.add_argument("--steps", type=int, default=2000)
        command.add_argument("--forms", nargs="+", default=[])
        command.add_argument("--out", type=Path, required=True)
    commands.add_parser("table").add_argument("files", type=Path, nargs="+")
    chosen = options.parse_args()
    if chosen.command == "table":
        table(chosen.files)
    else:
        compare(chosen.command, seeds=chosen.seeds, steps=chosen.steps, names=chosen.forms, out=chosen.out)


if __name__ == "__main__":
    main()
