"""Matching of a batch of sets, and the Hungarian loss with its gradient, against a loop over examples.

    python -m benchmarks.matching            # batches of 128 sets of 10 and of 64, 16 of 256
    python -m benchmarks.matching --quick    # small batches

The plain loop computes the cost of an example's pairs, moves it to the host, matches by scipy's
`linear_sum_assignment`, and moves the assignment back; for the loss it keeps the gradients of all pairs. Ours is
`setpred.losses.HungarianLoss` and its matching. Rows `matching_SIZE` go from sets to assignments, without gradients;
rows `loss_SIZE` from sets to the loss and its gradient. The floor is scipy's time alone, on double precision costs
on the host.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from benchmarks.timing import Row, Way, compared, in_turns, print_results, seconds
from setpred.losses import HungarianLoss
from setpred.matching import hungarian, pairwise_smooth_l1
from setpred.schema import CLEVR

SIZES = {10: (128, 21), 64: (128, 5), 256: (16, 5)}  # set size: batch and turns
QUICK = {10: (4, 2), 64: (2, 2)}


def plain_cost(predicted: Tensor, target: Tensor) -> Tensor:
    """Costs of one example, `[n, n]`."""
    n = len(predicted)
    pairs = predicted[:, None].expand(n, n, -1), target[None].expand(n, n, -1)
    return functional.smooth_l1_loss(*pairs, reduction="none").mean(-1)


def plain_match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of one example's pairs, on the device of the cost."""
    rows, columns = linear_sum_assignment(cost.detach().cpu().numpy())
    return torch.from_numpy(rows).to(cost.device), torch.from_numpy(columns).to(cost.device)


def plain_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Loss of each example."""
    costs = [plain_cost(*example) for example in zip(predicted, target, strict=True)]
    return torch.stack([cost[plain_match(cost)].mean() for cost in costs])


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], predicted: Tensor, target: Tensor) -> Tensor:
    return torch.autograd.grad(loss(predicted, target).mean(), predicted)[0]


def of_size(size: int, batch: int, turns: int, device: str) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    predicted, target = (torch.rand(batch, size, CLEVR.set_dim, generator=generator).to(device) for _ in range(2))
    costs = pairwise_smooth_l1(predicted, target)
    on_host = costs.double().cpu().numpy()
    predicted.requires_grad_()
    loss = HungarianLoss()
    for one, other in (
        (plain_loss(predicted, target), loss(predicted, target)),
        (with_gradient(plain_loss, predicted, target), with_gradient(loss, predicted, target)),
    ):
        torch.testing.assert_close(one, other)
    floor = 1e3 * min(seconds(lambda: [linear_sum_assignment(each) for each in on_host]) for _ in range(turns))
    where = "gpu" if device == "cuda" else "cpu"

    def row(name: str, key: str, plain: Way, ours: Way, note: str) -> Row:
        taken = in_turns({"plain": plain, "ours": ours}, turns, device)
        title, key = f"{name}, {batch} sets of {size}", f"{key}_{size}_{where}"
        return compared(title, key, taken["plain"], taken["ours"], floor_ms=floor, note=note)

    alone = statistics.median(in_turns({"alone": lambda: hungarian(costs)}, turns, device)["alone"])
    return [
        row(
            "matching",
            "matching",
            lambda: [plain_match(plain_cost(*example)) for example in zip(predicted.detach(), target, strict=True)],
            lambda: hungarian(pairwise_smooth_l1(predicted.detach(), target)),
            f"{1e3 * alone:.2f} ms of costs that are there; floor: scipy alone",
        ),
        row(
            "Hungarian loss and gradient",
            "loss",
            lambda: with_gradient(plain_loss, predicted, target),
            lambda: with_gradient(loss, predicted, target),
            "floor: scipy alone",
        ),
    ]


def rows(quick: bool) -> list[Row]:
    """Rows for each set size, on the CPU and on a GPU if there is one."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for size, (batch, turns) in (QUICK if quick else SIZES).items():
            found += of_size(size, batch, turns, device)
    return found


if __name__ == "__main__":
    print_results(__doc__, rows)
