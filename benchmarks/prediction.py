"""Parameters of the compared models, and their time to predict the sets of an image, on one thread.

    python -m benchmarks.prediction configs/compare/*.yaml

Random weights, 32 random images at a time, from pixels to sets. The time is the processor time of the fastest of thirty
turns, in which all models alternate; other jobs disturb it less than the time on the clock.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from setpred.commands.train import build

BATCH, TURNS = 32, 30


@torch.no_grad()
def measure(configs: Sequence[str], *, turns: int = TURNS) -> dict[str, tuple[int, float]]:
    """Parameters and milliseconds per image of each configuration, by the name of its file."""
    models, images = {}, {}
    for config in configs:
        cli = build(["--config", config, "--trainer.logger=false"])
        name, size = Path(config).stem, cli.model.data_description["image_size"]
        models[name] = cli.model.model.eval()
        images[name] = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8)
    fastest = dict.fromkeys(models, float("inf"))
    for _ in range(turns):
        for name, model in models.items():
            start = time.process_time()
            model(images[name])
            fastest[name] = min(fastest[name], 1000 * (time.process_time() - start) / BATCH)
    return {
        name: (sum(weights.numel() for weights in model.parameters()), fastest[name]) for name, model in models.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| configuration | parameters | ms per image |\n|---|--:|--:|")
    for name, (parameters, milliseconds) in measure(sys.argv[1:]).items():
        print(f"| {name} | {parameters:,} | {milliseconds:.2f} |")
