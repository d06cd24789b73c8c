"""What a model trained on rendered scenes makes of Blender's pictures, and what it loses where.

    python benchmarks/transfer.py CHECKPOINT ROOT [--rendered FILE.h5]

ROOT is a CLEVR folder with `cameras.jsonl`. Scenes of more objects than the model has slots are left out. The model
sees Blender's pictures and our own pictures of the very same scenes, cameras and lamps, so the difference of the two
rows is the renderer's alone. Its spread: scenes drawn again with replacement (bootstrap, 1,000 times). Then the two
kinds of pictures are mixed: rows `ours but ...` show ours with Blender's pixels in place of the ground or of objects
of one material, which says what the difference comes from.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from setpred.checkpoint import load_checkpoint
from setpred.data.compare import scenes_with_images
from setpred.data.dataset import open_data
from setpred.evaluation import predict
from setpred.metrics import THRESHOLDS, attribute_report, average_precision, match_by_position, threshold_name
from setpred.rendering.renderer import annotate, render
from setpred.rendering.scenes import SceneBatch
from setpred.schema import CLEVR

DRAWS = 1000


def scores(predicted: Tensor, target: Tensor) -> np.ndarray:
    return np.array([100 * score for score in average_precision(predicted, target, schema=CLEVR).values()])


def row(name: str, values: np.ndarray) -> None:
    print(f"{name:44s}" + "".join(f"{value:7.1f}" for value in values), flush=True)


def attributes(name: str, predicted: Tensor, target: Tensor) -> None:
    found = attribute_report(predicted, target, match_by_position(predicted, target, schema=CLEVR), schema=CLEVR)
    shares = {"all": found["all_attributes"], **found["accuracy"]}
    text = ", ".join(f"{key} {100 * share:.1f}" for key, share in shares.items())
    print(f"{name:44s} {text}; count {100 * found['count_exact']:.1f}; distance {found['distance']['median']:.3f}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("--split", default="val")
    parser.add_argument("--rendered", type=Path, help="a file of unseen rendered scenes, evaluated as well")
    options = parser.parse_args()
    loaded = load_checkpoint(options.checkpoint)
    model, side = loaded.model.eval(), loaded.image_size
    slots = model.decoder.set_size

    found = [
        (scene, theirs)
        for scene, _, theirs in scenes_with_images(options.root, split=options.split)
        if len(scene.objects) <= slots
    ]
    scenes = [scene for scene, _ in found]
    aspect = found[0][1].shape[1] / found[0][1].shape[0]
    small = [
        Image.fromarray(theirs.astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR) for _, theirs in found
    ]
    theirs = torch.from_numpy(np.stack(small))
    ours = render(scenes, width=side, height=side, aspect=aspect)
    target = torch.from_numpy(np.stack([CLEVR.encode([o.as_dict() for o in s.objects], slots) for s in scenes]))

    def predicted(images: Tensor) -> Tensor:
        return model(images.permute(0, 3, 1, 2), index=torch.arange(len(images))).float()

    print(f"{len(scenes)} scenes of up to {slots} objects, images {side}x{side}; AP in %")
    print(f"{'distance under':44s}" + "".join(f"{threshold_name(threshold):>7s}" for threshold in THRESHOLDS))
    if options.rendered is not None:
        data = open_data(options.rendered, image_size=side, set_size=slots)
        unseen = predict(model, data)
        row(f"{len(data)} unseen rendered scenes", scores(*unseen))
    on_theirs, on_ours = predicted(theirs), predicted(ours)
    row("Blender's pictures", scores(on_theirs, target))
    row("our pictures of the same scenes", scores(on_ours, target))
    row("difference", scores(on_ours, target) - scores(on_theirs, target))
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        which = torch.from_numpy(rng.integers(len(scenes), size=len(scenes)))
        draws.append(scores(on_ours[which], target[which]) - scores(on_theirs[which], target[which]))
    row("its standard deviation", np.std(draws, axis=0))

    owner = annotate(scenes, width=side, height=side, aspect=aspect).instances.long()
    metal = SceneBatch.of(scenes, max_objects=slots).metal
    on_metal = metal.gather(1, owner.flatten(1).clamp(min=0)).reshape(owner.shape)
    for name, mask in (
        ("Blender's ground", owner < 0),
        ("Blender's rubber", (owner >= 0) & ~on_metal),
        ("Blender's metal", (owner >= 0) & on_metal),
    ):
        row(f"ours but {name}", scores(predicted(torch.where(mask[..., None], theirs, ours)), target))
    print("\nattributes right in %, objects matched by position; count right in %; median distance")
    if options.rendered is not None:
        attributes(f"{len(data)} unseen rendered scenes", *unseen)
    attributes("Blender's pictures", on_theirs, target)
    attributes("our pictures of the same scenes", on_ours, target)


if __name__ == "__main__":
    main()
