"""Images per second of the renderer against image size, number of objects, batch and samples, and its memory.

    python benchmarks/renderer.py                   # the CPU, all cores in one process
    python benchmarks/renderer.py --workers 2       # two processes of one thread each, as `setpred.data render` works
    python benchmarks/renderer.py --device cuda     # a GPU

All effects of light are on. Figures are medians of repeated runs after a warm-up, with minimum and maximum. Memory is
torch's peak beyond the scenes (GPU), or the growth of the process so far (CPU; a process never shrinks, so a row has at
least the value of the rows above).
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial

import numpy as np
import torch

from setpred.rendering.renderer import annotate, render
from setpred.rendering.sampling import SceneRules, sample_scenes
from setpred.rendering.scenes import Scene, SceneBatch
from setpred.workers import ordered_map

REPEATS = 5
SIZES = ((64, 64), (128, 128), (256, 256), (480, 320))


def sampled(objects: tuple[int, int], count: int) -> list[Scene]:
    return sample_scenes([np.random.default_rng([0, number]) for number in range(count)], SceneRules(objects=objects))


def rates(work: Callable[[], object], images: int, device: torch.device) -> str:
    """Images per second: median, minimum and maximum."""
    found = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(images / (time.perf_counter() - start))
    found = found[1:]
    return f"{statistics.median(found):8.1f} ({min(found):.1f} to {max(found):.1f})"


def held(device: torch.device) -> float:
    """Peak memory so far in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def of_one_process(device: torch.device, batch: int) -> None:
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"{device}{threads}, torch {torch.__version__}\nwidth x height, objects, batch, samples: images/s, MiB")
    before = held(device)
    for width, height in SIZES:
        for objects in ((3, 6), (3, 10), (10, 10)):
            for samples in (1, 2, 3) if objects == (3, 10) else (2,):
                scenes = SceneBatch.of(sampled(objects, batch)).to(device)
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
                    before = torch.cuda.memory_allocated(device) / 2**20
                rate = rates(partial(render, scenes, width=width, height=height, samples=samples), batch, device)
                row = f"{width}x{height}  {objects[0]} to {objects[1]}  {batch}  {samples}"
                print(f"{row:28s} {rate:36s} {held(device) - before:8.0f}", flush=True)
    scenes = SceneBatch.of(sampled((3, 10), batch)).to(device)
    for count in (1, 4, 16, 64, 256):
        if count <= batch:
            part = scenes.part(slice(count))
            rate = rates(partial(render, part, width=128, height=128), count, device)
            print(f"{f'128x128  3 to 10  {count}  2':28s} {rate}")
    rate = rates(partial(annotate, scenes, width=128, height=128), batch, device)
    print(f"masks, depth and counts at 128x128: {rate}")
    rate = rates(partial(sampled, (3, 10), 64), 64, torch.device("cpu"))
    print(f"sampling scenes of 3 to 10 objects: {rate}")


def _render_some(numbers: range, *, side: int, objects: tuple[int, int]) -> int:
    rngs = [np.random.default_rng([0, number]) for number in numbers]
    return len(render(sample_scenes(rngs, SceneRules(objects=objects)), width=side, height=side))


def of_processes(workers: int) -> None:
    print(f"{workers} processes of one thread, sampling included: images/s")
    for side, images in ((64, 2048), (128, 512)):
        for objects in ((3, 6), (3, 10)):
            work = partial(_render_some, side=side, objects=objects)
            blocks = [range(start, start + 32) for start in range(0, images + 64 * workers, 32)]
            with closing(ordered_map(work, blocks, workers=workers)) as done:
                for _ in range(2 * workers):  # the processes start and warm up
                    next(done)
                start = time.perf_counter()
                made = sum(done)
                elapsed = time.perf_counter() - start
            print(f"{side}x{side}  {objects[0]} to {objects[1]}  {made / elapsed:8.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, help="scenes at a time; 32 on a CPU and 256 on a GPU by default")
    parser.add_argument("--workers", type=int, default=0, help="measure this many processes instead")
    options = parser.parse_args()
    if options.workers:
        of_processes(options.workers)
    else:
        device = torch.device(options.device)
        of_one_process(device, options.batch or (32 if device.type == "cpu" else 256))


if __name__ == "__main__":
    main()
