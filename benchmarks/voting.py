"""The voting decoder and its training step, against a plain one, its floor, and implicit Slot Attention.

    python -m benchmarks.voting            # configs/quickstart.yaml and configs/voting_128.yaml, batches of 32
    python -m benchmarks.voting --quick    # configs/quickstart.yaml, batches of 4, one turn

The plain decoder writes out the distance of each element to each vote and descends like benchmarks/decoder.py; its
training step is that of benchmarks/train_step.py. Ours is as configured, not compiled. Implicit Slot Attention is
configs/compare/slot_attention_implicit.yaml on the same trunk, images and set size. The floor of each model is its
matrix products and convolutions alone, on the same numbers. All take turns in one run. For prediction see
benchmarks/inference.py.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import decoder
from benchmarks.timing import Row, Way, compared, in_turns, print_results, products_alone, ratio_of
from benchmarks.train_step import Ours, Plain, agree, batch_of, module_of, shares, trains_in_half
from setpred.checkpoint.untrusted import read_yaml
from setpred.decoders import IDSPN, GreedyVotes
from setpred.inner import VotingEnergy
from setpred.inner.voting import Ballot
from setpred.training.task import SetPrediction

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SLOTS = CONFIGS / "compare" / "slot_attention_implicit.yaml"


@dataclass(frozen=True)
class Sizes:
    configs: tuple[str, ...] = ("quickstart", "voting_128")
    batch: int = 32  # of both configurations
    turns: int = 15


QUICK = Sizes(configs=("quickstart",), batch=4, turns=1)


# --- the plain way --------------------------------------------------------------------------------------------------


def plain_start(start: GreedyVotes, ballot: Ballot) -> Tensor:
    masses, picks = ballot.masses, []
    for _ in range(start.set_size):
        heaviest, chosen = masses.max(1)
        centre = ballot.votes[torch.arange(len(chosen), device=chosen.device), chosen].unsqueeze(1)
        kernel = (-0.5 * (start.weights * (ballot.votes - centre).square()).sum(-1)).exp()
        shares = (masses * kernel).unsqueeze(-1) * ballot.precisions
        mean = (shares * ballot.votes).sum(1) / shares.sum(1).clamp(min=1e-8)
        picks.append(mean * (20 * (heaviest - start.floor)).sigmoid().unsqueeze(-1))
        masses = masses * (1 - kernel)
    return torch.stack(picks, dim=1)


def plain_logits(objective: VotingEnergy, elements: Tensor, ballot: Ballot) -> Tensor:
    apart = elements.unsqueeze(2) - ballot.votes.unsqueeze(1)
    return -0.5 * (objective.weights * ballot.precisions.unsqueeze(1) * apart.square()).sum(-1)


def plain_energy(objective: VotingEnergy, elements: Tensor, ballot: Ballot, initial: Tensor) -> Tensor:
    pull = (objective.weights * (elements - initial).square()).sum((1, 2))
    logits = plain_logits(objective, elements, ballot)
    return 0.5 * objective.prior_weight * pull - (ballot.masses * logits.logsumexp(1)).sum(-1)


def plain_curvature(objective: VotingEnergy, elements: Tensor, ballot: Ballot) -> Tensor:
    shares = plain_logits(objective, elements, ballot).softmax(1) * ballot.masses.unsqueeze(1)
    gathered = (shares.unsqueeze(-1) * ballot.precisions.unsqueeze(1)).sum(2)
    return objective.weights * (objective.prior_weight + gathered)


def plain_sets(parts: IDSPN, features: Tensor) -> Tensor:
    """The sets of a voting decoder with these parts."""
    ballot, descent = Ballot.of(features, parts.set_dim), parts.descent
    with torch.no_grad():
        initial = plain_start(parts.start, ballot)
    return decoder.plain(
        lambda elements: plain_energy(parts.objective, elements, ballot, initial),
        initial,
        iterations=descent.iterations,
        learning_rate=descent.learning_rate,
        momentum=descent.momentum,
        curvature=lambda elements: plain_curvature(parts.objective, elements, ballot),
    )


# --- measuring ------------------------------------------------------------------------------------------------------


def slots_module(config: Path, device: str) -> SetPrediction:
    """Implicit Slot Attention on the trunk and the data of a voting configuration."""
    voting = read_yaml(config)
    trunk = voting["model"]["encoder"]["init_args"]["tokens"]["init_args"]["trunk"]
    options = {
        "model.encoder.init_args.trunk": json.dumps(trunk),
        "data": json.dumps(voting["data"]),
    }
    return module_of(SLOTS, device, *(f"--{name}={value}" for name, value in options.items()))


def decoder_ways(parts: nn.Module, features: Tensor, finders: dict[str, Callable[[], Tensor]]) -> dict[str, Way]:
    """One forward and backward pass by name, each to the features and all parameters of the decoder."""
    torch.manual_seed(0)
    upstream = torch.randn(len(features), parts.set_size, parts.set_dim, dtype=features.dtype, device=features.device)
    wanted = [features, *parts.parameters()]
    return {name: partial(decoder.forward_and_backward, find, wanted, upstream) for name, find in finders.items()}


def voting_ways(parts: IDSPN, features: Tensor) -> dict[str, Way]:
    """The plain decoder and ours."""
    return decoder_ways(
        parts, features, {"plain": lambda: plain_sets(parts, features), "ours": lambda: parts(features)}
    )


def against_slots(what: str, key: str, taken: dict[str, list[float]], floor_ms: float) -> Row:
    """Ours against implicit Slot Attention, in the turns of the row before."""
    of_its_floor, _ = ratio_of(taken["slots"], taken["slots floor"])
    return compared(
        f"{what}: implicit Slot Attention (plain) and voting (ours)",
        key,
        taken["slots"],
        taken["ours"],
        floor_ms=floor_ms,
        note=f"implicit Slot Attention takes {of_its_floor:.2f} of its floor; below 1 voting is slower",
    )


def floor_of(taken: dict[str, list[float]]) -> float:
    """Milliseconds of the products of ours."""
    return 1e3 * statistics.median(taken["floor"])


def decoder_rows(
    name: str, module: SetPrediction, slots: SetPrediction, batch: dict[str, Tensor], turns: int, device: str
) -> list[Row]:
    images = batch["image"].to(device)
    features, tokens = (each.model.encode(images).detach().requires_grad_() for each in (module, slots))
    parts, rival = module.model.decoder, slots.model.decoder
    ways = voting_ways(parts, features) | decoder_ways(rival, tokens, {"slots": lambda: rival(tokens)})
    ways |= {"floor": products_alone(ways["ours"]), "slots floor": products_alone(ways["slots"])}
    taken = in_turns(ways, turns, device)
    what = f"voting decoder, {name}, {len(features)} x {parts.set_size} elements, {features.shape[1]} votes"
    key = f"decoder_voting_{name}_{decoder.label(device)}"
    row = compared(
        f"{what}, {parts.descent.iterations} iterations, forward and backward",
        key,
        taken["plain"],
        taken["ours"],
        floor_ms=floor_of(taken),
        note="as written, not compiled",
    )
    return [row, against_slots(what, key.replace("_voting_", "_slots_per_voting_"), taken, floor_of(taken))]


def step_rows(
    name: str, module: SetPrediction, slots: SetPrediction, batch: dict[str, Tensor], turns: int, device: str
) -> list[Row]:
    half, count, side = trains_in_half(device), *batch["image"].shape[::3]
    plain = Plain(module, batch, device, plain_sets)
    ours, theirs = (Ours(each, batch, device, half) for each in (module, slots))
    # before any weight has moved; in float32, which the plain way has
    agree(Ours(module, batch, device, half=False).loss(), plain.loss(), tolerance=1e-3)
    ways = {"plain": plain.step, "ours": ours.step, "slots": theirs.step}
    ways |= {"floor": products_alone(ours.step), "slots floor": products_alone(theirs.step)}
    taken = in_turns(ways, turns, device)
    what, key = f"training step, {name}, batch {count}, {side}x{side}", f"train_step_{name}_{decoder.label(device)}"
    notes = [shares(ours, turns)] + ["our encoder in bfloat16"] * half
    row = compared(what, key, taken["plain"], taken["ours"], floor_ms=floor_of(taken), note="; ".join(notes))
    return [row, against_slots(what, key.replace(name, f"slots_per_{name}"), taken, floor_of(taken))]


def rows(quick: bool) -> list[Row]:
    """Rows for the decoder and the training step of each configuration, on the CPU and on a GPU if there is one."""
    sizes, found = QUICK if quick else Sizes(), []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for name in sizes.configs:
            config = CONFIGS / f"{name}.yaml"
            modules = module_of(config, device), slots_module(config, device)
            batch = batch_of(sizes.batch, modules[0], device)
            for measured in (decoder_rows, step_rows):
                found += measured(name, *modules, batch, sizes.turns, device)
    return found


if __name__ == "__main__":
    print_results(__doc__, rows)
