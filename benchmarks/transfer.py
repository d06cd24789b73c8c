"""Scores of a model trained on rendered scenes on Blender's images, and the causes of the loss.

    python benchmarks/transfer.py CHECKPOINT ROOT [--rendered FILE.h5]

ROOT is a CLEVR folder with `cameras.jsonl`. Scenes with more objects than the model has slots are skipped. The model
sees Blender's images and our images of the same scenes, cameras and lamps: rendered at Blender's size and resized as
`setpred.data prepare` does, so that the renderer alone makes the difference, and rendered directly at the model's size,
as training files are. Spread: bootstrap over scenes, 1,000 draws. Rows `ours but ...` mix the two kinds of resized
images: ours with Blender's pixels for the ground or for the objects of one material. The last rows use more of our
scenes, of 3 objects up to the model's slots, to measure the effect of rendering at a small size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from setpred.checkpoint.load import load_checkpoint
from setpred.data.datamodule import VALIDATION_SEED
from setpred.data.dataset import open_data
from setpred.data.fidelity import scenes_with_images
from setpred.data.scenes import built_in_scenes
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


def resized(images: Iterable[np.ndarray], side: int) -> Tensor:
    """Resize as `setpred.data prepare` does: `[n, side, side, 3]`."""
    small = [
        Image.fromarray(image.astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR) for image in images
    ]
    return torch.from_numpy(np.stack(small))


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
    parser.add_argument("--scenes", type=int, default=250, help="of ours in the last rows (default: 250)")
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
    height, width, _ = found[0][1].shape
    aspect = width / height
    theirs = resized([image for _, image in found], side)
    ours = resized(render(scenes, width=width, height=height, aspect=aspect).numpy(), side)
    direct = render(scenes, width=side, height=side, aspect=aspect)
    target = torch.from_numpy(np.stack([CLEVR.encode([o.as_dict() for o in s.objects], slots) for s in scenes]))

    def predicted(images: Tensor) -> Tensor:
        return model(images.permute(0, 3, 1, 2)).float()

    print(f"{len(scenes)} scenes of up to {slots} objects, images {side}x{side}; AP in %")
    print(f"{'distance under':44s}" + "".join(f"{threshold_name(threshold):>7s}" for threshold in THRESHOLDS))
    if options.rendered is not None:
        data = open_data(options.rendered, image_size=side, set_size=slots)
        unseen = predict(model, data)
        row(f"{len(data)} unseen rendered scenes", scores(*unseen))
    on_theirs, on_ours, on_direct = predicted(theirs), predicted(ours), predicted(direct)
    row("Blender's pictures, resized", scores(on_theirs, target))
    row("ours of the same scenes, resized", scores(on_ours, target))
    row("ours of the same scenes, drawn small", scores(on_direct, target))
    for name, one, other in (
        ("ours less Blender's, both resized", on_ours, on_theirs),
        ("ours drawn small less ours resized", on_direct, on_ours),
    ):
        row(name, scores(one, target) - scores(other, target))
        rng, draws = np.random.default_rng(0), []
        for _ in range(DRAWS):
            which = torch.from_numpy(rng.integers(len(scenes), size=len(scenes)))
            draws.append(scores(one[which], target[which]) - scores(other[which], target[which]))
        row("  its standard deviation", np.std(draws, axis=0))

    owner = annotate(scenes, width=side, height=side, aspect=aspect).instances.long()
    metal = SceneBatch.of(scenes, max_objects=slots).metal
    on_metal = metal.gather(1, owner.flatten(1).clamp(min=0)).reshape(owner.shape)
    for name, mask in (
        ("Blender's ground", owner < 0),
        ("Blender's rubber", (owner >= 0) & ~on_metal),
        ("Blender's metal", (owner >= 0) & on_metal),
    ):
        row(f"ours but {name}", scores(predicted(torch.where(mask[..., None], theirs, ours)), target))
    more = built_in_scenes(range(options.scenes), seed=VALIDATION_SEED, objects=(3, slots))
    more_target = torch.from_numpy(np.stack([CLEVR.encode([o.as_dict() for o in s.objects], slots) for s in more]))
    full = resized(render(more, width=width, height=height, aspect=aspect).numpy(), side)
    row(f"{len(more)} scenes, resized", scores(predicted(full), more_target))
    row(f"{len(more)} scenes, drawn small", scores(predicted(render(more, width=side, height=side)), more_target))
    print("\nattributes right in %, objects matched by position; count right in %; median distance")
    if options.rendered is not None:
        attributes(f"{len(data)} unseen rendered scenes", *unseen)
    attributes("Blender's pictures, resized", on_theirs, target)
    attributes("ours of the same scenes, resized", on_ours, target)
    attributes("ours of the same scenes, drawn small", on_direct, target)


if __name__ == "__main__":
    main()
