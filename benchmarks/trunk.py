"""What a trunk costs in training, and where a step's time goes: configs/quickstart.yaml and configs/voting_128.yaml.

    python -m benchmarks.trunk            # batches of 32
    python -m benchmarks.trunk --quick    # configs/quickstart.yaml, batches of 4, one turn, nothing compiled

Three measurements, each in turns in one run: a training step with other trunks; a step in bfloat16 and float32, with
channels last and first, and with a compiled trunk; and the parts of a step, layer by layer, forward and backward.
docs/equilibrium.md has the AP of these trunks after equal times.
"""

from __future__ import annotations

import json
import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.tables import markdown as table
from benchmarks.timing import in_turns, print_results
from benchmarks.train_step import Ours, Piece, batch_of, median_parts, module_of, trains_in_half
from benchmarks.voting import CONFIGS, QUICK, Sizes
from setpred.errors import plural
from setpred.nn import unit_images

TRUNK = "--model.encoder.init_args.tokens.init_args.trunk.init_args"
TRUNKS = {  # widths and blocks, the configured ones first
    "quickstart": (
        *(([24, 48], 2), ([24, 48], 1), ([24, 48], 3), ([16, 48], 2), ([16, 32], 2), ([16, 32], 4), ([32, 64], 2)),
        *(([24], 2), ([16, 32, 64], 2), ([24, 48, 96], 2)),
    ),
    "voting_128": (
        *(([24, 48, 96], 2), ([24, 48, 96], 1), ([24, 48, 96], 3), ([16, 48, 96], 2), ([16, 32, 64], 2)),
        *(([16, 32, 64], 4), ([32, 64, 128], 2), ([24, 48], 2), ([16, 32, 64, 96], 2)),
    ),
}


def stepping(name: str, sizes: Sizes, *, half: bool, options: tuple[str, ...] = ()) -> Ours:
    module = module_of(CONFIGS / f"{name}.yaml", "cpu", *options)
    return Ours(module, batch_of(sizes.batch, module, "cpu"), "cpu", half)


def milliseconds(steps: dict[str, Ours], turns: int) -> dict[str, float]:
    taken = in_turns({name: each.step for name, each in steps.items()}, turns)
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}


def trunk_steps(name: str, sizes: Sizes, half: bool) -> dict[str, Ours]:
    found = {}
    for widths, blocks in TRUNKS[name]:
        options = (f"{TRUNK}.widths", json.dumps(widths), f"{TRUNK}.blocks", str(blocks))
        ours = stepping(name, sizes, half=half, options=options)
        side = ours.module.model.encoder.image_size // 2 ** len(widths)
        found[f"{'-'.join(map(str, widths))}, {plural(blocks, 'block')}, {side}x{side} tokens"] = ours
    return found


def execution_steps(name: str, sizes: Sizes, *, compiled: bool) -> dict[str, Ours]:
    found = {}
    for precision, half in {"float32": False, "bfloat16": True}.items():
        found[precision] = stepping(name, sizes, half=half)
        found[f"{precision}, channels first"] = stepping(name, sizes, half=half)
        found[f"{precision}, channels first"].module.model.encoder.to(memory_format=torch.contiguous_format)
        if compiled:
            found[f"{precision}, compiled trunk"] = stepping(name, sizes, half=half)
            found[f"{precision}, compiled trunk"].module.model.encoder.tokens.trunk.compile()
    return found


def layers(ours: Ours) -> dict[str, Piece]:
    """The successive layers from images to sets, by their names."""
    encoder = ours.module.model.encoder
    trunk, pieces = encoder.tokens.trunk, {"images to floats": unit_images}
    encoder.tokens.trunk = nn.Identity()  # the trunk's layers are pieces of their own
    for index, layer in enumerate(trunk, 1):
        kind = f"block of {layer.first[0].out_channels}" if hasattr(layer, "first") else stage_name(layer[0])
        pieces[f"{index}. {kind}"] = layer
    return pieces | {"votes": encoder, "start and descent": ours.decode}


def stage_name(convolution: nn.Conv2d) -> str:
    return f"{convolution.in_channels} to {convolution.out_channels} channels, stride {convolution.stride[0]}"


def measure(quick: bool) -> dict[str, Any]:
    """Milliseconds of a step by configuration: with other trunks, by execution, and of its parts."""
    sizes, half, found = QUICK if quick else Sizes(), trains_in_half("cpu"), {}
    for name in sizes.configs:
        ours = stepping(name, sizes, half=half)
        parts = median_parts(ours, sizes.turns, layers(ours))
        found[name] = {
            "batch": sizes.batch,
            "precision": "bfloat16" if half else "float32",
            "trunk": milliseconds(trunk_steps(name, sizes, half), sizes.turns),
            "execution": milliseconds(execution_steps(name, sizes, compiled=not quick), sizes.turns),
            "parts": {part: [1e3 * each for each in times] for part, times in parts.items()},
        }
    return found


def markdown(results: dict[str, Any]) -> str:
    """The three tables of each configuration."""
    found = []
    for name, of in results.items():
        whole = sum(map(sum, of["parts"].values()))
        parts = [
            [part, *(f"{each:.2f}" for each in times), *[""] * (2 - len(times)), f"{100 * sum(times) / whole:.0f} %"]
            for part, times in of["parts"].items()
        ]
        found.append(f"**configs/{name}.yaml**, batches of {of['batch']}, {of['precision']} unless stated.")
        found.append(
            table(("part of a step", "forward, ms", "backward, ms", "share"), parts, numbers=(1, 2, 3)).strip()
        )
        for kind in ("trunk", "execution"):
            taken = of[kind]
            first = next(iter(taken.values()))
            rows = [[each, f"{ms:.1f}", f"{ms / first:.2f}"] for each, ms in taken.items()]
            found.append(table((kind, "ms a step", "against the first"), rows, numbers=(1, 2)).strip())
    return "\n\n".join([*found, "`python -m benchmarks.trunk`"])


if __name__ == "__main__":
    print_results(__doc__, lambda quick: [markdown(measure(quick))])
