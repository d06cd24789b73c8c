"""Memory of a descent against its number of iterations: implicit and unrolled, ours and plain.

    python -m benchmarks.memory            # sizes of configs/clevr_fspool.yaml
    python -m benchmarks.memory --quick    # small sizes

Each implementation runs forward and backward in a fresh process with more and more iterations; the result is the growth
of the process at its peak. The plain implementations follow the published code: `autograd.grad` in each iteration, with
`create_graph` in the last for iDSPN and in every one for DSPN.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import decoder
from benchmarks.tables import markdown as table
from benchmarks.tables import number
from setpred.decoders import IDSPN
from setpred.inner import GradientDescent, Implicit, Unrolled

ITERATIONS = (1, 10, 20, 40)
WAYS = {
    "implicit": "iDSPN, ours",
    "implicit_plain": "iDSPN, plain",
    "unrolled": "DSPN, ours",
    "unrolled_plain": "DSPN, plain",
}


def plain_unrolled(
    loss: Callable[[Tensor], Tensor],
    initial: Tensor,
    *,
    iterations: int,
    learning_rate: float,
    momentum: float,
    clip: float,
) -> Tensor:
    """Plain DSPN: every step stays in the graph."""
    elements = initial.detach().clone().requires_grad_()
    velocity = torch.zeros_like(elements)
    for _ in range(iterations):
        (gradient,) = torch.autograd.grad(loss(elements).sum(), elements, create_graph=True)
        norm = gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
        gradient = gradient * (clip / norm).clamp(max=1)
        velocity = momentum * velocity + gradient
        elements = elements - learning_rate * (gradient + momentum * velocity)
    return elements


def descent_of(way: str, sizes: decoder.Sizes) -> Callable[[int, int], Tensor]:
    """(batch, iterations) -> the predicted set."""
    torch.manual_seed(0)
    objective = decoder.objective_of("fspool", sizes)
    shape = {"set_size": sizes.set_size, "set_dim": sizes.set_dim}
    differentiation = Unrolled() if way.startswith("unrolled") else Implicit()
    ours = IDSPN(objective, GradientDescent(iterations=1, **decoder.NUMBERS), differentiation, **shape)
    plain = plain_unrolled if way.startswith("unrolled") else decoder.plain

    def find(batch: int, iterations: int) -> Tensor:
        latent = torch.randn(batch, sizes.width, requires_grad=True)
        if not way.endswith("plain"):
            return ours(latent, iterations=iterations)
        loss = partial(decoder.PLAIN["fspool"], objective, latent=latent)
        return plain(loss, ours.start(latent), iterations=iterations, **decoder.NUMBERS)

    return find


def peak() -> float:
    """Peak memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, whose `ru_maxrss` starts at the value of the parent process
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def growths(way: str, sizes: decoder.Sizes) -> list[float]:
    """Growth in MiB of this process, ideally a fresh one, after each number of iterations, forward and backward."""
    find = descent_of(way, sizes)
    find(2, 2).square().mean().backward()  # the first call loads libraries
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak of the imports
    before, found = peak(), []
    for iterations in ITERATIONS:
        find(sizes.batch, iterations).square().mean().backward()
        found.append(peak() - before)
    return found


def measure(quick: bool) -> list[dict[str, Any]]:
    """Growth in MiB of each implementation at each number of iterations."""
    found = []
    for way, name in WAYS.items():
        command = [sys.executable, "-m", "benchmarks.memory", "--way", way] + ["--quick"] * quick
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found.append({"way": way, "name": name, "iterations": list(ITERATIONS), "mib": json.loads(done.stdout)})
    return found


def markdown(found: list[dict[str, Any]]) -> str:
    titles = ["MiB at", *(f"{iterations} iteration{'s' * (iterations > 1)}" for iterations in found[0]["iterations"])]
    lines = [[line["name"], *map(number, line["mib"])] for line in found]
    return table(titles, lines, numbers=range(1, len(titles))) + "\n`python -m benchmarks.memory`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--way", choices=WAYS, help="of one way alone, by this very process, as JSON")
    options = parser.parse_args()
    if options.way is not None:
        sizes = replace(decoder.QUICK, iterations=max(ITERATIONS)) if options.quick else decoder.Sizes()
        print(json.dumps(growths(options.way, sizes)))
    else:
        print(markdown(measure(options.quick)))


if __name__ == "__main__":
    main()
