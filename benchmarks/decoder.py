"""The descent of the decoder, forward and backward: plain, ours in eager mode, and ours compiled.

    python -m benchmarks.decoder            # sizes of configs/clevr_fspool.yaml
    python -m benchmarks.decoder --quick    # small sizes, seconds

The plain descent is a first draft: `torch.optim.SGD` on a leaf tensor, `autograd.grad` in each iteration, with
`create_graph` in the last, and a sort in FSPool. All share their parameters, take turns, and return the same set and
gradients (tests/test_fast.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.timing import Row, compared, flops, in_turns, peak_flops, print_results, ratio_of, seconds
from setpred.aggregators import EquilibriumAggregation, FSPool, PairwiseSetEncoder, ResidualPotential, SetEncoder
from setpred.decoders import IDSPN
from setpred.inner import EquilibriumMatching, GradientDescent, LatentMatching
from setpred.schema import CLEVR

KINDS = ("fspool", "pairwise", "equilibrium")


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured problem, and the number of turns."""

    batch: int = 128
    set_size: int = CLEVR.max_objects
    set_dim: int = CLEVR.set_dim
    width: int = 512
    iterations: int = 40
    turns: int = 5


QUICK = Sizes(batch=16, width=128, iterations=5, turns=3)


# --- the plain way --------------------------------------------------------------------------------------------------


def plain_pool(features: Tensor, weight: Tensor) -> Tensor:
    return (features.sort(dim=1, descending=True).values * weight).sum(1)


def plain_fspool(objective: nn.Module, elements: Tensor, latent: Tensor) -> Tensor:
    encoder = objective.set_encoder
    encoded = plain_pool(encoder.network(elements), encoder.aggregator.weight)
    return 0.5 * (encoded - latent).square().mean(-1)


def plain_pairwise(objective: nn.Module, elements: Tensor, latent: Tensor) -> Tensor:
    encoder, size = objective.set_encoder.set_encoder, elements.shape[1]
    first = elements.unsqueeze(2).expand(-1, -1, size, -1)
    second = elements.unsqueeze(1).expand(-1, size, -1, -1)
    pairs = torch.cat([first, second], dim=-1).flatten(1, 2)
    encoded = plain_pool(encoder.network(pairs), encoder.aggregator.weight)
    return 0.5 * (encoded - latent).square().mean(-1)


def plain_equilibrium(objective: nn.Module, elements: Tensor, latent: Tensor) -> Tensor:
    encoder, aggregator = objective.set_encoder, objective.set_encoder.aggregator
    features = encoder.network(elements)
    state = latent if latent.requires_grad else latent.detach().requires_grad_()
    potential = aggregator.potential(features, state).mean(1).sum()
    (slope,) = torch.autograd.grad(potential, state, create_graph=True)
    prior = plain_pool(features, aggregator.prior.weight)
    residual = latent - prior + aggregator.gain / aggregator.weight() * slope
    return 0.5 * residual.square().mean(-1)


PLAIN = {"fspool": plain_fspool, "pairwise": plain_pairwise, "equilibrium": plain_equilibrium}


def plain(
    loss: Callable[[Tensor], Tensor],
    initial: Tensor,
    *,
    iterations: int,
    learning_rate: float,
    momentum: float,
    clip: float = math.inf,
    curvature: Callable[[Tensor], Tensor | float] = lambda _: 1.0,
) -> Tensor:
    """Plain iDSPN: the predicted set, with the gradients of the last iteration (at least one).

    Gradients are divided by `curvature`. Under `torch.no_grad` no iteration keeps gradients.
    """
    differentiable = torch.is_grad_enabled()
    leaf = initial.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([leaf], lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    for left in reversed(range(iterations)):
        # of a copy: the optimizer changes the leaf in place, and the last graph still needs it
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(leaf.clone()).sum(), leaf, create_graph=differentiable and left == 0)
        with torch.no_grad():
            scale = curvature(leaf)
        scaled = gradient.detach() / scale
        norm = scaled.flatten(1).norm(dim=1).view(-1, 1, 1)
        leaf.grad = scaled * (clip / norm).clamp(max=1)
        optimizer.step()
    return leaf.detach() - (gradient - gradient.detach()) / scale


# --- ours -----------------------------------------------------------------------------------------------------------


def objective_of(kind: str, sizes: Sizes) -> nn.Module:
    """The objectives of configs/clevr_fspool.yaml, of its pairwise variant, and of configs/clevr_equilibrium.yaml."""
    width, set_size, set_dim = sizes.width, sizes.set_size, sizes.set_dim
    pool = FSPool(width, set_size=set_size**2 if kind == "pairwise" else set_size)
    if kind == "fspool":
        return LatentMatching(SetEncoder(pool, set_dim=set_dim, hidden_dim=width))
    if kind == "pairwise":
        return LatentMatching(PairwiseSetEncoder(SetEncoder(pool, set_dim=2 * set_dim, hidden_dim=width)))
    potential = ResidualPotential(width, width, widths=(64, 32))
    aggregator = EquilibriumAggregation(width, potential=potential, prior=pool, gain=0.0)
    return EquilibriumMatching(SetEncoder(aggregator, set_dim=set_dim, hidden_dim=width))


NUMBERS = {"learning_rate": 1.0, "momentum": 0.9, "clip": 10.0}


def ways_of(kind: str, sizes: Sizes, *, device: str = "cpu") -> dict[str, Callable[[], list[Tensor]]]:
    """One forward and backward pass by name: the set, and the gradients of the latent vector and all parameters."""
    torch.manual_seed(0)
    objective = objective_of(kind, sizes).to(device)
    latent = torch.randn(sizes.batch, sizes.width, device=device, requires_grad=True)
    upstream = torch.randn(sizes.batch, sizes.set_size, sizes.set_dim, device=device)
    shape = {"set_size": sizes.set_size, "set_dim": sizes.set_dim}
    written, compiled = (
        IDSPN(objective, GradientDescent(iterations=sizes.iterations, **NUMBERS), compile=compiles, **shape)
        .to(device)
        .eval()  # the same start for all
        for compiles in (False, True)
    )
    initial = written.start(latent)

    loss = partial(PLAIN[kind], objective, latent=latent)
    finders = {
        "plain": lambda: plain(loss, initial, iterations=sizes.iterations, **NUMBERS),
        "written": lambda: written(latent),
        "compiled": lambda: compiled(latent),
    }
    wanted = [latent, *objective.parameters()]
    return {name: partial(forward_and_backward, find, wanted, upstream) for name, find in finders.items()}


def forward_and_backward(find: Callable[[], Tensor], wanted: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The predicted set, and the requested gradients."""
    elements = find()
    gradients = torch.autograd.grad(elements, wanted, upstream, allow_unused=True, materialize_grads=True)
    return [elements.detach(), *gradients]


# --- measuring ------------------------------------------------------------------------------------------------------


def measured(kind: str, sizes: Sizes, device: str) -> Row:
    """Measure plain, eager and compiled in turns."""
    ways = ways_of(kind, sizes, device=device)
    first = seconds(ways["compiled"], device)
    taken = in_turns(ways, sizes.turns, device)
    written, _ = ratio_of(taken["plain"], taken["written"])
    # products of the sizes that nearly all of them have
    floor = flops(ways["plain"]) / peak_flops(sizes.batch * sizes.set_size, sizes.width, device)
    return compared(
        f"decoder, {kind}, {sizes.batch} x {sizes.set_size} x {sizes.set_dim}, width {sizes.width}, "
        f"{sizes.iterations} iterations, forward and backward",
        f"decoder_{kind}_{label(device)}",
        taken["plain"],
        taken["compiled"],
        floor_ms=1e3 * floor,
        note=f"compiled; as written {written:.2f}x; the first compiled call takes {first:.0f} s",
    )


def against_fspool(sizes: Sizes, device: str) -> Row:
    """A step on the equilibrium objective against one on plain FSPool, both compiled."""
    ways = {kind: ways_of(kind, sizes, device=device)["compiled"] for kind in ("fspool", "equilibrium")}
    taken = {
        kind: [turn / sizes.iterations for turn in turns] for kind, turns in in_turns(ways, sizes.turns, device).items()
    }
    return compared(
        "decoder, a step: FSPool (plain) and equilibrium (ours)",
        f"decoder_fspool_per_equilibrium_{label(device)}",
        taken["fspool"],
        taken["equilibrium"],
        note="both compiled; under 1 equilibrium is dearer",
    )


def label(device: str) -> str:
    return "gpu" if device == "cuda" else "cpu"


def rows(quick: bool) -> list[Row]:
    """A row for each kind of decoder, and one for equilibrium against FSPool; on the CPU and on a GPU, if any."""
    found = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for kind in KINDS:
            sizes = QUICK if quick else Sizes(turns=2 if kind == "pairwise" and device == "cpu" else 5)
            found.append(measured(kind, sizes, device))
        found.append(against_fspool(QUICK if quick else Sizes(), device))
    return found


if __name__ == "__main__":
    print_results(__doc__, rows)
