"""Every configuration is complete: it builds and takes a training step."""

from pathlib import Path

import pytest
import torch
import yaml

from setpred.cli import build
from setpred.decoders import IDSPN

CONFIGS = sorted((Path(__file__).resolve().parents[1] / "configs").glob("*.yaml"))


def test_the_promised_configurations_are_there():
    promised = {"quickstart", "clevr", "clevr_fspool", "clevr_dspn", "rendered", "streamed"}
    assert {path.stem for path in CONFIGS} >= promised


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_builds_and_takes_a_step(path):
    cli = build(["--config", str(path), "--trainer.accelerator", "cpu", "--trainer.logger", "false"])
    model, data = cli.model, cli.datamodule
    assert isinstance(model.model.decoder, IDSPN)
    assert model.model.decoder.set_size == (data.set_size or model.schema.max_objects)
    assert model.model.encoder.image_size == data.image_size
    generator = torch.Generator().manual_seed(0)
    size = data.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    target = torch.rand(2, model.model.decoder.set_size, model.schema.set_dim, generator=generator)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = model.configure_optimizers()
    # two descent steps are enough to reach every parameter
    loss = model.loss(model(images, iterations=2), target).mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.5 * len(moved)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_is_short_and_says_where_its_numbers_come_from(path):
    text = path.read_text()
    assert text.startswith("#")
    assert len(text.splitlines()) < 60
    config = yaml.safe_load(text)
    assert {"model", "data", "trainer"} <= set(config)
