"""A training small enough for a test: 16x16 scenes, a few thousand parameters."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from setpred.checkpoint.load import KEY, save_checkpoint
from setpred.commands.train import TrainCLI, build, train
from setpred.data.hdf5 import Header, Record
from setpred.data.hdf5_writer import write_set_file
from setpred.schema import ElementSchema, Field

CONFIG = """
model:
  encoder:
    class_path: setpred.encoders.SmallCNN
    init_args: {image_size: 16, latent_dim: 16, width: 4}
  decoder:
    class_path: setpred.decoders.IDSPN
    init_args:
      set_size: 4
      objective:
        class_path: setpred.inner.LatentMatching
        init_args:
          set_encoder:
            class_path: setpred.aggregators.SetEncoder
            init_args:
              hidden_dim: 16
              aggregator: {class_path: setpred.aggregators.FSPool, init_args: {in_dim: 16, set_size: 4}}
      descent:
        class_path: setpred.inner.GradientDescent
        init_args: {iterations: 3, momentum: 0.9}
  schedule: {class_path: setpred.training.WarmupCosine, init_args: {warmup_steps: 2, total_steps: 40}}
data:
  class_path: setpred.data.datamodule.RenderedScenes
  init_args:
    {train_images: 40, val_images: 12, image_size: 16, objects: [3, 4], set_size: 4, batch_size: 8, workers: 0}
trainer: {max_epochs: 2, accelerator: cpu, precision: 32-true}
"""
QUIET = {  # options of a Lightning trainer that writes and prints nothing
    "accelerator": "cpu",
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
}


def metrics(run: Path, *, timed: bool = False) -> list[dict[str, str]]:
    """Rows of metrics.csv, without the columns that differ from run to run unless `timed`."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if timed or k not in ("seconds", "data_waiting")} for row in rows]


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether the tensors of both have equal names and numbers, bit by bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def built(folder: Path, *options: str, config: str = CONFIG) -> TrainCLI:
    """The command line's model, data and trainer for a configuration in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tiny.yaml").write_text(config)
    return build(["--config", str(folder / "tiny.yaml"), "--runs", str(folder), "--trainer.logger=false", *options])


def run(folder: Path, *arguments: str, data: Path, name: str = "tiny") -> Path:
    """Trains in `folder` with scenes rendered once under `data`; returns the run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "tiny.yaml"
    config.write_text(CONFIG)
    return train(
        [
            *("--config", str(config), "--runs", str(folder), "--name", name),
            *(f"--data.init_args.folder={data}", *arguments),
        ]
    )


def untrained(folder: Path, *arguments: str, name: str = "tiny", data: Path | None = None) -> Path:
    """Write the checkpoint of a training of no steps into the run's folder, with its config.yaml.

    Scenes are rendered once under `data`, if given.
    """
    arguments = (*arguments, *([] if data is None else [f"--data.init_args.folder={data}"]))
    cli = built(folder, "--name", name, *arguments)
    if data is not None:
        cli.datamodule.prepare_data()
    path = untrained_checkpoint(cli, cli.folder / "best.ckpt")
    (cli.folder / "config.yaml").write_text(cli.parser.dump(cli.config, skip_none=False))
    return path


def untrained_checkpoint(cli: TrainCLI, path: Path) -> Path:
    """Write the checkpoint of the command line's model as it is."""
    content = {"state_dict": cli.model.state_dict(), "epoch": 0, "global_step": 5, "optimizer_states": []}
    save_checkpoint(content | {KEY: cli.model.description()}, path)
    return path


def set_file(path: Path, schema: ElementSchema, *, images: int = 24, size: int = 16, objects: int = 2) -> Path:
    """Write a prepared file of random images, each with some objects of a schema, present and of random numbers."""
    rng = np.random.default_rng(0)

    def value(field: Field) -> object:
        if field.categorical:
            return rng.choice(field.classes)
        return (field.offset + field.scale * rng.uniform(-0.9, 0.9, field.size)).tolist()

    def record(number: int) -> Record:
        found = [{field.name: value(field) for field in schema.fields} for _ in range(objects)]
        image = rng.integers(0, 255, (size, size, 3)).astype(np.uint8)
        return Record(image, schema.encode(found), np.zeros(3), number)

    header = Header(images, size, schema, {"kind": "test"})
    write_set_file(path, header, range(images), lambda rows: [record(n) for n in rows], producer="a", description="a")
    return path


def clevr_folder(root: Path) -> Path:
    """Write a folder in CLEVR's layout, of three small images of the split val; return its file of scenes."""
    scenes, same = [], {"color": "red", "shape": "cube", "material": "metal", "size": "large", "rotation": 30.0}
    for name in ("images/val", "scenes"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        name = f"CLEVR_val_{number:06}.png"
        Image.linear_gradient("L").resize((48, 32)).convert("RGB").rotate(90 * number).save(root / "images/val" / name)
        places = [{"3d_coords": [k - 1.0, 0.5 * k, 0.7], "pixel_coords": [100 + 50 * k, 150, 10.0]} for k in range(3)]
        scene = {"image_filename": name, "image_index": number, "split": "val"}
        scenes.append(
            scene | {"objects": [same | place for place in places], "relationships": {"left": [[1], [2], []]}}
        )
    path = root / "scenes" / "CLEVR_val_scenes.json"
    path.write_text(json.dumps({"info": {"split": "val"}, "scenes": scenes}))
    return path
