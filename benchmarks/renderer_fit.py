"""Fit the renderer's constants of indirect light and of blur to images from Blender.

    python benchmarks/renderer_fit.py ROOT

ROOT is a CLEVR folder with `cameras.jsonl`. Coordinate descent: move one constant after the other up or down by a step
as long as that lowers the squared error on the first half of the images, at half their size; then halve all steps. The
second half stays unseen, so `python -m setpred data compare ROOT --first N` gives the errors on unseen images. The
constants are in `setpred/rendering/materials.py`; this prints new ones and changes nothing.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from PIL import Image

from setpred.data.fidelity import scenes_with_images
from setpred.rendering import materials
from setpred.rendering.renderer import render
from setpred.rendering.scenes import SceneBatch

STEPS = {
    "METAL_BLUR": 0.02, "RUBBER_GLOSS": 0.04, "METAL_REFLECTANCE": 0.03, "BACKDROP_RADIANCE": 0.02, "BENT": 0.02,
    "DARKEST_BLUR": 0.02, "GLOW": 0.03, "GROUND_AMBIENT": 0.002, "GROUND_AMBIENT_SLOPE": 0.0003, "FLOOR_LIGHT": 0.01,
    "MIRRORED_METAL": 0.03, "MIRRORED_METAL_FLOOR": 0.03,
}  # fmt: skip
ROUNDS = 3
ENOUGH = 0.9995  # a step must lower the squared error to this share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root")
    parser.add_argument("--split", default="val")
    options = parser.parse_args()
    pairs = list(scenes_with_images(options.root, split=options.split))
    pairs = pairs[: len(pairs) // 2]
    height, width, _ = pairs[0][2].shape
    size = {"width": width // 2, "height": height // 2, "aspect": width / height}
    smaller = [
        Image.fromarray(image.astype(np.uint8)).resize((width // 2, height // 2), Image.Resampling.BOX)
        for _, _, image in pairs
    ]
    theirs = torch.from_numpy(np.stack(smaller)).float()
    batch = SceneBatch.of([scene for scene, _, _ in pairs])

    def error() -> float:
        parts = [slice(start, start + 4) for start in range(0, len(pairs), 4)]
        squares = [(render(batch.part(part), **size) - theirs[part]).square().mean((1, 2, 3)) for part in parts]
        return float(torch.cat(squares).mean())

    best = error()
    print(f"{len(pairs)} images; root mean squared error at the start {best**0.5:.3f}")
    steps = dict(STEPS)
    for _ in range(ROUNDS):
        for name in steps:
            for step in (steps[name], -steps[name]):
                lowered = False
                while (before := getattr(materials, name)) + step > 0:
                    setattr(materials, name, before + step)
                    if (now := error()) >= ENOUGH * best:
                        setattr(materials, name, before)
                        break
                    best, lowered = now, True
                if lowered:
                    break
            print(f"{name} = {getattr(materials, name):.6g}  error {best**0.5:.3f}", flush=True)
        steps = {name: step / 2 for name, step in steps.items()}


if __name__ == "__main__":
    main()
