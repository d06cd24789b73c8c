"""A full training step of configs/clevr_fspool.yaml, against a plain one.

    python -m benchmarks.train_step            # ResNet-18, 128x128, batch 128: a step takes seconds on a CPU
    python -m benchmarks.train_step --quick    # 64x64, batch 4

From a batch of uint8 images and their sets in the host's memory to updated weights. Ours is the `training_step` of
`SetPrediction` with the configured model (channels-last, compiled descent), checks and AdamW; where the library trains
the encoder in bfloat16 (`setpred.training.mixed_precision`), so does this benchmark. The plain step runs in float32 and
NCHW: the host converts the images, the decoder is that of benchmarks/decoder.py, each example is matched separately,
with a transfer each, and the optimiser is Adam. Both have the same weights, images and random starts, and their losses
must agree.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional

from benchmarks import decoder
from benchmarks.timing import Row, Way, compared, flops, in_turns, peak_flops, print_results, seconds
from setpred.commands.train import build
from setpred.decoders import IDSPN
from setpred.losses import HungarianLoss
from setpred.training.mixed_precision import training_precision
from setpred.training.task import SetPrediction

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "clevr_fspool.yaml"
ITERATIONS = (40, 20)  # of the second half of the training, and of the first
LOSS = "matching and loss"
Piece = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    batch: int = 128
    image_size: int = 128
    iterations: tuple[int, ...] = ITERATIONS
    turns: int = 3
    products: tuple[int, int] = (2048, 1024)  # whose speed is the peak


QUICK = Sizes(batch=4, image_size=64, iterations=(3,), turns=1, products=(128, 128))


@dataclass
class Ours:
    """The library's training step."""

    module: SetPrediction
    batch: dict[str, Tensor]
    device: str
    half: bool

    def __post_init__(self) -> None:
        self.optimizer = self.module.configure_optimizers()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.half)

    def on_device(self) -> dict[str, Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in self.batch.items()}

    def loss(self) -> Tensor:
        torch.manual_seed(0)  # of the random start
        with self.autocast():
            return self.module.training_step(self.on_device(), 0)

    def step(self) -> Tensor:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.module.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        return loss.detach()

    def parts(self, pieces: Mapping[str, Piece] | None = None) -> dict[str, list[float]]:
        """Seconds of each part of one step that is split into them: forward, then backward.

        `pieces` are the successive functions from images to sets, encoder and decoder unless given.
        """
        model, target = self.module.model, self.batch["elements"].to(self.device)
        if pieces is None:
            pieces = {"encoder": model.encode, "decoder": self.decode}
        found: dict[str, list[float]] = {}

        def timed(part: str, work: Callable[[], Any]) -> None:
            with self.autocast():
                found.setdefault(part, []).append(seconds(work, self.device))

        self.optimizer.zero_grad()
        ends = self.on_device()["image"]
        steps: list[tuple[str, Tensor, Tensor]] = []
        for name, piece in pieces.items():
            kept: list[Tensor] = []
            timed(name, lambda piece=piece, start=ends, kept=kept: kept.append(piece(start)))
            steps.append((name, ends, kept[0]))
            ends = kept[0].detach().requires_grad_(kept[0].requires_grad)  # images need no gradient
        timed(LOSS, lambda: self.module.loss(ends.float(), target).mean().backward())
        upstream = ends.grad
        for name, start, result in reversed(steps):
            if result.requires_grad:
                timed(name, lambda result=result, upstream=upstream: result.backward(upstream))
                upstream = start.grad
        timed("optimizer", lambda: (self.module.on_before_optimizer_step(self.optimizer), self.optimizer.step()))
        return found

    def decode(self, features: Tensor) -> Tensor:
        return self.module.model.decoder(features, iterations=self.module.training_iterations())


@dataclass
class Plain:
    """A first draft with the same weights."""

    module: SetPrediction
    batch: dict[str, Tensor]
    device: str
    find: Callable[[IDSPN, Tensor], Tensor]  # the sets of a latent, by the parts of the decoder

    def __post_init__(self) -> None:
        self.encoder = copy.deepcopy(self.module.model.encoder).to(memory_format=torch.contiguous_format)
        self.decoder = copy.deepcopy(self.module.model.decoder)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=self.module.learning_rate)

    def loss(self) -> Tensor:
        torch.manual_seed(0)
        images = (self.batch["image"].float() / 255).contiguous().to(self.device)
        target = self.batch["elements"].to(self.device)
        elements = self.find(self.decoder, self.encoder(images))
        losses = [matched(*pair, self.module.loss) for pair in zip(elements, target, strict=True)]
        return torch.stack(losses).mean()

    def step(self) -> Tensor:
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def plain_sets(parts: IDSPN, latent: Tensor, *, iterations: int) -> Tensor:
    """The sets of configs/clevr_fspool.yaml."""
    initial = 0.1 * torch.randn(len(latent), parts.set_size, parts.set_dim, device=latent.device)
    loss = partial(decoder.plain_fspool, parts.objective, latent=latent)
    return decoder.plain(loss, initial, iterations=iterations, **decoder.NUMBERS)


def matched(elements: Tensor, target: Tensor, loss: HungarianLoss) -> Tensor:
    """The Hungarian loss of one example, with the weights and betas of `loss`."""
    pairs = elements.unsqueeze(1).expand(-1, len(target), -1), target.expand(len(elements), -1, -1)
    costs = functional.smooth_l1_loss(*pairs, reduction="none")
    for name, beta in loss.beta.items():
        part = loss.schema.slice(name)
        costs[..., part] = functional.smooth_l1_loss(*(pair[..., part] for pair in pairs), reduction="none", beta=beta)
    for name, weight in loss.group_weights.items():
        costs[..., loss.schema.slice(name)] *= weight
    cost = costs.mean(-1)
    row, column = linear_sum_assignment(cost.detach().cpu().numpy())
    return cost[row, column].mean()


def module_of(config: Path, device: str, *options: str) -> SetPrediction:
    """The model of a configuration, as in training."""
    torch.manual_seed(0)
    usual = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    module = build(["--config", str(config), *usual, *options]).model.to(device)
    module.log = lambda *_, **__: None  # there is no trainer to log to
    return module.train()


def batch_of(count: int, module: SetPrediction, device: str) -> dict[str, Tensor]:
    """Images as in the files, pinned for a GPU as in the data module, and sets of at least 3 objects."""
    generator = torch.Generator().manual_seed(0)
    side = module.model.encoder.image_size
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    size, schema = module.model.decoder.set_size, module.schema
    present = torch.arange(size) < torch.randint(3, size + 1, (count, 1), generator=generator)
    elements = torch.rand(count, size, schema.set_dim, generator=generator) * present.unsqueeze(-1)
    elements[..., -1] = present.float()
    batch = {"image": images, "elements": elements, "index": torch.arange(count)}
    return {name: value.pin_memory() for name, value in batch.items()} if device == "cuda" else batch


def agree(ours: Tensor, plain: Tensor, *, tolerance: float) -> None:
    if not (ours - plain).abs() <= tolerance * plain.abs():
        raise RuntimeError(
            f"both ways should have one loss, ours has {ours.item():.6g}, the plain way {plain.item():.6g}"
        )


@contextmanager
def of_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Draw random numbers inside in this dtype."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def floor_ms(plain: Plain, step: int, sizes: Sizes, device: str, *, half: bool) -> float:
    """Milliseconds of a step's products: the encoder's at the peak of its precision, the rest in float32.

    `step` is the number of multiplications and additions of the full step.
    """
    few = plain.batch["image"][:2].float().to(device)
    encoder = flops(lambda: plain.encoder(few).sum().backward()) * sizes.batch / len(few)
    shape = (8192, 4096) if device == "cuda" else sizes.products
    encoder_peak = peak = peak_flops(*shape, device)
    if half:
        with of_dtype(torch.bfloat16):
            encoder_peak = peak_flops(*shape, device)
    return 1e3 * (encoder / encoder_peak + (step - encoder) / peak)


def step_row(module: SetPrediction, sizes: Sizes, iterations: int, device: str) -> Row:
    """A full step, ours and plain, with the share of each part of ours."""
    module.iterations_by_epoch = {0: iterations}
    batch, half = batch_of(sizes.batch, module, device), trains_in_half(device)
    plain = Plain(module, batch, device, partial(plain_sets, iterations=iterations))
    ours = Ours(module, batch, device, half)
    # of the same weights, before any has moved; the same in one precision, near in two
    if half:
        agree(Ours(module, batch, device, half=False).loss(), plain.loss(), tolerance=1e-3)
    first: list[Tensor] = []
    products = flops(lambda: first.append(plain.step()))
    agree(ours.step(), first[0], tolerance=5e-2 if half else 1e-3)
    taken = in_turns({"plain": plain.step, "ours": ours.step}, sizes.turns, device)
    each_second = {name: sizes.batch / statistics.median(times) for name, times in taken.items()}
    label, notes = "cpu", [shares(ours, sizes.turns)]
    if half:
        notes.insert(0, "our encoder in bfloat16")
    if device == "cuda":
        label = "gpu"
        notes.insert(0, f"{each_second['ours']:,.0f} images a second against {each_second['plain']:,.0f}")
    return compared(
        f"training step, {iterations} iterations, batch {sizes.batch}, {sizes.image_size}x{sizes.image_size}",
        f"train_step_{label}" if iterations == max(sizes.iterations) else f"train_step_{iterations}_{label}",
        taken["plain"],
        taken["ours"],
        floor_ms=floor_ms(plain, products, sizes, device, half=half),
        note="; ".join(notes),
    )


def median_parts(ours: Ours, turns: int, pieces: Mapping[str, Piece] | None = None) -> dict[str, list[float]]:
    """Median seconds of each part of a step, forward and backward; one step comes first, unmeasured."""
    cuts = [ours.parts(pieces) for _ in range(turns + 1)][1:]
    together = {part: zip(*(cut[part] for cut in cuts), strict=True) for part in cuts[0]}
    return {part: [statistics.median(times) for times in turns_of] for part, turns_of in together.items()}


def shares(ours: Ours, turns: int) -> str:
    """Share of a step of each of its parts."""
    parts = {part: sum(times) for part, times in median_parts(ours, turns).items()}
    return "ours: " + ", ".join(f"{part} {100 * taking / sum(parts.values()):.1f} %" for part, taking in parts.items())


def encoder_rows(module: SetPrediction, sizes: Sizes, device: str) -> list[Row]:
    """The encoder alone, forward and backward: channels-last, and bfloat16 where the device has it, against NCHW."""
    images = batch_of(sizes.batch, module, device)["image"].to(device)

    def way(memory_format: torch.memory_format, half: bool = False) -> Way:
        encoder = copy.deepcopy(module.model.encoder).to(memory_format=memory_format)
        unit = (images.float() / 255).contiguous(memory_format=memory_format)

        def once() -> None:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                latent = encoder(unit)
            latent.float().square().mean().backward()

        return once

    ways = {"NCHW": way(torch.contiguous_format), "channels-last": way(torch.channels_last)}
    if trains_in_half(device):
        ways["channels-last, bfloat16"] = way(torch.channels_last, half=True)
    taken = in_turns(ways, sizes.turns, device)
    label = "gpu" if device == "cuda" else "cpu"
    return [
        compared(
            f"encoder alone, {name} against NCHW, batch {sizes.batch}",
            f"encoder_{name.replace(', ', '_').replace('-', '_')}_{label}",
            taken["NCHW"],
            taken[name],
        )
        for name in list(ways)[1:]
    ]


def trains_in_half(device: str) -> bool:
    """Whether the library trains the encoder in bfloat16 on this device."""
    return training_precision("gpu" if device == "cuda" else "cpu") == "bf16-mixed"


def rows(quick: bool) -> list[Row]:
    """Full steps, and the encoder alone, on the CPU and on a GPU if there is one."""
    sizes, found = QUICK if quick else Sizes(), []
    options = [f"--{part}.image_size={sizes.image_size}" for part in ("model.encoder.init_args", "data.init_args")]
    options += ["--model.decoder.init_args.compile=true"]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        module = module_of(CONFIG, device, *options)
        found += [step_row(module, sizes, iterations, device) for iterations in sizes.iterations]
        found += encoder_rows(module, sizes, device)
    return found


if __name__ == "__main__":
    print_results(__doc__, rows)
