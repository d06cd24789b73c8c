"""Growth of the decoder's time, forward and backward, with set size, element width, iterations and batch.

    python -m benchmarks.growth            # a minute or two
    python -m benchmarks.growth --quick    # a few points of each

The decoder is FSPool iDSPN, not compiled: each size would compile again. One size grows at a time, from a small
decoder (`BASE`).
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoder import NUMBERS, Sizes, objective_of
from benchmarks.timing import in_turns
from setpred.decoders import IDSPN
from setpred.inner import GradientDescent
from setpred.visualise.style import FAINT, INK, Sheet, styled

PICTURE = Path("images") / "growth.png"  # relative to the page that shows it
BASE = Sizes(batch=64, width=128, iterations=10, turns=5)
AXES = {
    "set_size": ("set size", (10, 16, 32, 64, 128, 256)),
    "set_dim": ("numbers of an element", (8, 16, 32, 64, 128, 256)),
    "iterations": ("iterations", (5, 10, 20, 40, 80)),
    "batch": ("batch", (16, 32, 64, 128, 256, 512)),
}
Curve = list[tuple[float, float]]  # (size, ms)


def step_of(sizes: Sizes) -> Callable[[], None]:
    """One forward and backward pass of the decoder."""
    torch.manual_seed(0)
    shape = {"set_size": sizes.set_size, "set_dim": sizes.set_dim}
    decoder = IDSPN(objective_of("fspool", sizes), GradientDescent(iterations=sizes.iterations, **NUMBERS), **shape)
    latent = torch.randn(sizes.batch, sizes.width, requires_grad=True)
    return lambda: decoder(latent).square().mean().backward()


def measure(quick: bool) -> dict[str, Any]:
    """The fixed sizes, and the curve of each growing one."""
    base = replace(BASE, batch=8, width=16, turns=1) if quick else BASE
    curves = {}
    for axis, (_, values) in AXES.items():
        ways = {str(value): step_of(replace(base, **{axis: value})) for value in (values[::2] if quick else values)}
        taken = in_turns(ways, base.turns)
        curves[axis] = [(int(value), 1e3 * statistics.median(seconds)) for value, seconds in taken.items()]
    fixed = {name: getattr(base, name) for name in ("batch", "set_size", "set_dim", "width", "iterations")}
    return {"base": fixed, "threads": torch.get_num_threads(), "curves": curves}


def slope(curve: Curve) -> float:
    """Least-squares slope of log(time) over log(size) in the upper half of the sizes; 1 is proportional growth."""
    upper = curve[len(curve) // 2 - 1 :]
    xs, ys = zip(*((math.log(size), math.log(ms)) for size, ms in upper), strict=True)
    return statistics.linear_regression(xs, ys).slope


@styled()
def draw(path: Path, found: Mapping[str, Any]) -> Path:
    """Draw four panels of milliseconds on logarithmic axes, each with a line of proportional growth."""
    sheet = Sheet(10.0, 2.9, dpi=100)
    panels = sheet.subplots(1, len(AXES), sharey=True)
    sheet.subplots_adjust(left=0.07, right=0.99, bottom=0.19, top=0.88, wspace=0.08)
    for axes, (axis, (name, _)) in zip(panels, AXES.items(), strict=True):
        curve = found["curves"][axis]
        sizes, times = zip(*curve, strict=True)
        proportional = [times[-1] * size / sizes[-1] for size in sizes]
        axes.plot(sizes, proportional, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.plot(sizes, times, color="#0072b2", linewidth=1.9, marker="o", markersize=4.5)
        axes.axvline(found["base"][axis], color="#e0e0e0", linewidth=5, zorder=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_title(f"slope {slope(curve):.2f}", color=INK, fontsize=10)
        axes.set_xlabel(name)
    panels[0].set_ylabel("ms, forward and backward")
    return sheet.save(path)


def markdown(found: Mapping[str, Any]) -> str:
    fixed = ", ".join(f"{AXES[axis][0] if axis in AXES else axis} {size}" for axis, size in found["base"].items())
    threads = f"{found['threads']} thread{'' if found['threads'] == 1 else 's'}"
    return (
        f"![Milliseconds of the decoder against set size, numbers of an element, iterations and batch]({PICTURE})\n\n"
        f"*FSPool iDSPN as it is written, on {threads}. One size grows, the others stay at the grey bars: {fixed}. "
        "Dashed: in proportion. The slope is that of the upper half; 1 is in proportion, 2 grows with the square.* "
        "`python -m benchmarks.growth`"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few points of each")
    parser.add_argument("--out", type=Path, help="write the picture into this folder")
    options = parser.parse_args()
    found = measure(options.quick)
    for axis, curve in found["curves"].items():
        print(f"{axis:12s}", *(f"{size}: {ms:.1f} ms" for size, ms in curve), f"slope {slope(curve):.2f}", sep="  ")
    if options.out is not None:
        print(draw(options.out / PICTURE, found))


if __name__ == "__main__":
    main()
