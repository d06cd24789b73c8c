"""Object discovery: layers, their composite, the reconstruction loss, and a training without labels."""

import math

import pytest
import torch
from problems import close, normal
from tiny import metrics
from torch import nn

from setpred.checkpoint.load import load_checkpoint, read_checkpoint
from setpred.commands.train import train
from setpred.decoders import IDSPN, MLPDecoder, Readout, SlotAttention, SpatialBroadcast
from setpred.encoders import PositionedTokens, SmallTrunk
from setpred.errors import InputError
from setpred.inner import GradientDescent
from setpred.losses import Reconstruction
from setpred.nn import composite
from setpred.training.task import SetPrediction

BATCH, SLOTS, SIDE = 2, 3, 4


class Quadratic(nn.Module):
    def forward(self, elements, problem):
        return elements.square().sum((1, 2))


def layers(seed=1):
    return normal(BATCH, SLOTS, 4 * SIDE**2, seed=seed)


def test_the_composite_is_the_weighted_sum_of_colours_at_every_pixel():
    rows = layers()
    image, masks, colours = composite(rows)
    numbers = rows.view(BATCH, SLOTS, 4, SIDE, SIDE)
    for b in range(BATCH):
        for y in range(SIDE):
            for x in range(SIDE):
                weights = [math.exp(numbers[b, i, 3, y, x]) for i in range(SLOTS)]
                for i in range(SLOTS):
                    assert float(masks[b, i, y, x]) == pytest.approx(weights[i] / sum(weights))
                for c in range(3):
                    drawn = sum(weights[i] * numbers[b, i, c, y, x] for i in range(SLOTS)) / sum(weights)
                    assert float(image[b, c, y, x]) == pytest.approx(float(drawn))
    close(colours, numbers[:, :, :3])
    close(masks.sum(1), torch.ones(BATCH, SIDE, SIDE).double())


def test_layers_of_another_shape_are_an_error():
    for wrong in (torch.zeros(2, 3, 63), torch.zeros(2, 64), torch.zeros(2, 3, 4 * 8)):
        with pytest.raises(ValueError, match="expected layers"):
            composite(wrong)


def test_the_reconstruction_loss_is_the_mean_squared_error_of_each_image():
    rows, loss = layers(), Reconstruction()
    image = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)
    expected = ((composite(rows).image - image.double() / 255) ** 2).flatten(1).mean(1)
    close(loss(rows, image), expected, rtol=1e-6)
    close(loss(rows[:, [2, 0, 1]], image), expected, rtol=1e-6)  # a set: the order of the layers is free
    close(loss(rows, image.double() / 255), expected)
    larger = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    larger[..., ::2, ::2], larger[..., 1::2, 1::2] = 10, 20  # means over squares of pixels
    means = larger.double().view(BATCH, 3, SIDE, 2, SIDE, 2).mean((3, 5)) / 255
    close(loss(rows, larger), ((composite(rows).image - means) ** 2).flatten(1).mean(1), rtol=1e-6)
    for shape in ((BATCH, 3, 6, 6), (BATCH, 3, 8, 4), (BATCH, 3, 2, 2)):
        with pytest.raises(ValueError, match="expected square images"):
            loss(rows, torch.zeros(shape))


def test_relative_layers_move_with_their_place():
    """Moving a slot's place by whole cells moves its layer by as many, away from the borders."""
    torch.manual_seed(0)
    slots = SlotAttention(token_dim=5, slot_dim=8, set_size=SLOTS, set_dim=6)
    broadcast = SpatialBroadcast(slots, side=16, widths=[4], smoothing=0, relative=True).double()
    with torch.no_grad():  # the first two numbers speak as places alone
        broadcast.spread.weight[:, :2] = 0
    before = normal(1, 1, 6)
    before[..., :2] = 0
    after = before.clone()
    after[..., 0] += 3 * 2 / 16
    first, second = (broadcast.finish(state).view(4, 32, 32)[:, 12:20] for state in (before, after))
    close(second[..., 12:20], first[..., 6:14])
    assert (first[..., 6:14] - first[..., 12:20]).abs().max() > 1e-3
    still = SpatialBroadcast(slots, side=16, widths=[4], smoothing=0).double()
    still.load_state_dict(broadcast.state_dict())
    close(still.finish(before), still.finish(after))


def test_only_the_last_iterate_is_drawn_in_a_forward_pass():
    slots = SlotAttention(token_dim=5, slot_dim=8, iterations=4, set_size=SLOTS, set_dim=6)
    broadcast = SpatialBroadcast(slots, side=2, widths=[3], background=True).eval()
    calls = []
    broadcast.network.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randn(2, 7, 5)
    last = broadcast(tokens)
    assert len(calls) == 1
    iterates = list(broadcast.refine(tokens))
    assert len(calls) == 1 + 5
    assert last.shape == (2, SLOTS + 1, 64)
    assert torch.equal(iterates[-1], last)
    assert not torch.equal(iterates[0], last)


def test_slots_that_do_not_fit_are_an_error():
    vector = IDSPN(Quadratic(), GradientDescent(iterations=1), set_size=2, set_dim=5)  # takes vectors of any length
    flat = MLPDecoder(latent_dim=6, hidden_dim=4, set_size=2, set_dim=2)
    for slots, options in (
        (vector, {"background": True}),
        (flat, {"relative": True}),
        (flat, {"widths": []}),
        (flat, {"side": 0}),
        (flat, {"smoothing": -1}),
    ):
        with pytest.raises(InputError, match="expected"):
            SpatialBroadcast(slots, **options)


# --- probes of frozen slots -------------------------------------------------------------------------------------------

MODEL = """
model:
  encoder:
    class_path: setpred.encoders.PositionedTokens
    init_args:
      trunk: {{class_path: setpred.encoders.SmallTrunk, init_args: {{image_size: 16, width: 4}}}}
      token_dim: 8
  decoder:
    class_path: setpred.decoders.{decoder}
    init_args:
      slots:
        class_path: setpred.decoders.SlotAttention
        init_args: {{set_size: 4, set_dim: 6, token_dim: 8, slot_dim: 8, hidden_dim: 8}}
      {options}
data:
  class_path: setpred.data.datamodule.RenderedScenes
  init_args:
    {{train_images: 40, val_images: 12, image_size: 16, objects: [3, 4], set_size: 4, batch_size: 8, workers: 0}}
trainer: {{max_epochs: 1, accelerator: cpu, precision: 32-true}}
"""
LABELS_FREE = ["--model.schema", "null", "--model.loss", "setpred.losses.Reconstruction"]


def test_a_discovery_model_trains_without_labels_and_a_probe_reads_its_frozen_slots(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, decoder, options in (
        ("autoencoder", "SpatialBroadcast", "side: 4\n      widths: [4, 4]"),
        ("probe", "Readout", "hidden_dim: 8"),
    ):
        (tmp_path / f"{name}.yaml").write_text(MODEL.format(decoder=decoder, options=options))
    first = train(["--config", "autoencoder.yaml", "--runs", "runs", *LABELS_FREE])
    before = read_checkpoint(first / "last.ckpt")["state_dict"]
    losses = [float(row["val_loss"]) for row in metrics(first)]
    assert all(0 < loss < 1 for loss in losses)
    frozen = ["--model.frozen", "[encoder, decoder.slots]"]
    second = train(["--config", "probe.yaml", "--runs", "runs", "--init", str(first / "last.ckpt"), *frozen])
    after = read_checkpoint(second / "last.ckpt")["state_dict"]
    kept = {name for name in after if name.startswith(("model.encoder", "model.decoder.slots"))}
    statistics = {name for name in kept if "running" in name or "tracked" in name}
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept - statistics)
    assert "val_ap@inf" in metrics(second)[-1] or any(name.startswith("val_ap") for name in metrics(second)[-1])
    loaded = load_checkpoint(second / "last.ckpt")
    assert loaded.model(torch.zeros(2, 3, 16, 16)).shape == (2, 4, 19)


def test_a_frozen_part_that_is_not_there_is_an_error():
    with pytest.raises(InputError, match=r"expected parts of the model, such as encoder, .*got 'decoder.slot'"):
        SetPrediction(*probe(), frozen=["decoder.slot"])


def test_frozen_parts_stay_in_evaluation_mode():
    module = SetPrediction(*probe(), frozen=["encoder", "decoder.slots"]).train()
    assert not any(part.training for part in [*module.model.encoder.modules(), *module.model.decoder.slots.modules()])
    assert module.model.decoder.head.training
    learned = {name for name, value in module.model.named_parameters() if value.requires_grad}
    assert learned == {name for name, _ in module.model.named_parameters() if name.startswith("decoder.head")}


def probe():
    slots = SlotAttention(token_dim=8, slot_dim=8, set_size=SLOTS, set_dim=6)
    return PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8), Readout(slots, set_dim=19)
