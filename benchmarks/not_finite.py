"""Cost of checking whether a training step's numbers are finite, against the full step.

    python -m benchmarks.not_finite

The step is that of `configs/quickstart.yaml`, forward, backward and optimiser, on a batch of noise. The check is that
of `setpred.training.SetPrediction`: losses, predictions, targets, weights and statistics, the buffers kept for a
repeat, and the norm of the gradient. Medians, in turns, on one thread.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

import torch

from benchmarks.timing import in_turns
from setpred.commands.train import build
from setpred.nonfinite.locate import finite_norm, trained

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
ROUNDS = 7


def main() -> None:
    """Print both times and their ratio."""
    torch.set_num_threads(1)
    cli = build(["--config", str(CONFIG), "--trainer.logger=false", "--trainer.accelerator=cpu"])
    module, size = cli.model, cli.datamodule.batch_size
    optimizer = module.configure_optimizers()
    side, set_size = cli.datamodule.image_size, module.model.decoder.set_size
    batch = {
        "image": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
        "elements": torch.rand(size, set_size, module.schema.set_dim),
        "index": torch.arange(size),
    }
    seen = [torch.rand(size), torch.rand(size, set_size, module.schema.set_dim), batch["elements"]]

    noise = module.step(batch, 0)

    def step() -> None:
        optimizer.zero_grad()
        module.training_step(batch, 0).backward()
        finite_norm(parameter.grad for parameter in module.parameters() if parameter.grad is not None).item()
        optimizer.step()

    def check() -> None:
        module.guard.steps = []
        module.guard.begin(noise, module.buffers())
        finite = [each.isfinite().all() for each in seen]
        torch.stack([*finite, finite_norm(trained(module).values(), largest=True)]).all().item()
        finite_norm(parameter.grad for parameter in module.parameters() if parameter.grad is not None).item()

    found = in_turns({"step": step, "check": check}, ROUNDS)
    full, checking = (1000 * median(times) for times in found.values())
    print(f"a step {full:.0f} ms, of which the check {checking:.1f} ms: {100 * checking / full:.1f} %")


if __name__ == "__main__":
    main()
