"""Object discovery: layers, their composite, the reconstruction loss, and a training without labels."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from problems import close, normal
from tiny import metrics
from torch import nn
from torch.utils.data import DataLoader

from setpred.checkpoint.load import load_checkpoint, read_checkpoint
from setpred.commands.evaluate import evaluate
from setpred.commands.replay import replay
from setpred.commands.train import train
from setpred.decoders import Glimpses, MLPDecoder, Readout, SlotAttention, SpatialBroadcast
from setpred.decoders.spatial_broadcast import Broadcast
from setpred.encoders import PositionedTokens, SmallTrunk, Votes
from setpred.errors import InputError
from setpred.losses import Reconstruction
from setpred.nn import composite
from setpred.training.task import SetPrediction

BATCH, SLOTS, SIDE = 2, 3, 4


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


def glimpses(seed=0, **options):
    torch.manual_seed(seed)
    slots = SlotAttention(token_dim=5, slot_dim=8, set_size=SLOTS, set_dim=7)
    return Glimpses(slots, **{"canvas": 32, "side": 2, "widths": [4, 3], "extent": 0.25, **options}).double()


def drawn(model, slots):
    """Layers `[n + 1, 4, 32, 32]` of slots `[n, 7]` over a background of zeros."""
    ground = torch.zeros(1, 9, dtype=torch.float64)
    rows = nn.functional.pad(slots, (0, 2))
    return model.finish(torch.cat([rows, ground]).unsqueeze(0))[0].view(-1, 4, 32, 32)


def test_glimpses_are_drawn_alike_wherever_they_are_and_end_at_their_border():
    model, slot = glimpses(), normal(1, 7)
    slot[:, 0], slot[:, 1], slot[:, -1] = -0.25, 0.0, 1.0  # x, y, presence
    moved = slot.clone()
    moved[:, 0] += 2 * 7 / 32  # by 7 pixels to the right
    first, second = drawn(model, slot)[0], drawn(model, moved)[0]
    close(second[..., 7:], first[..., :-7])
    inside = first[3] > -20
    rows, columns = inside.nonzero().unbind(1)
    # half the side of a glimpse is 0.25 * 16 = 4 pixels, about pixel 16 of the rows and 12 of the columns
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (12, 20, 8, 16)
    assert inside.sum() == 64
    assert first[:3, inside].std() > 0


def test_the_logit_of_a_glimpse_falls_with_the_distance_and_with_the_presence():
    model, slot = glimpses(prior=1.5), torch.zeros(1, 7, dtype=torch.float64)
    slot[:, -1] = 1
    with torch.no_grad():
        for name, parameter in model.glimpse.named_parameters():
            parameter.zero_() if name.startswith("network") else None
    logits = drawn(model, slot)[0, 3]
    away = (torch.arange(32).double() + 0.5) / 16 - 1
    squared = (away[:, None] ** 2 + away**2) / 0.25**2
    near = (away[:, None].abs() < 0.25) & (away.abs() < 0.25)
    close(logits[near], (-2 * squared - 1.5)[near])
    slot[:, -1] = 0.3
    close(drawn(model, slot)[0, 3][near], logits[near] + math.log(0.3))
    slot[:, -1] = -5
    assert (drawn(model, slot)[0, 3][near] < -6).all()
    assert drawn(model, slot).isfinite().all()


def test_glimpses_permute_with_their_slots_and_the_background_is_last():
    model, slots = glimpses(), normal(SLOTS, 7)
    layers, order = drawn(model, slots), [2, 0, 1]
    close(drawn(model, slots[order]), layers[[*order, SLOTS]])
    assert (layers[-1, :3] == 0.5).all()
    with torch.no_grad():
        model.background.copy_(normal(3, 32, 32))
        model.plane.weight.copy_(normal(9, 5))
    tokens = normal(2, 6, 5)
    out = model.eval()(tokens).view(2, SLOTS + 1, 4, 32, 32)
    assert not out[:, -1, 3].any()  # the logit of the background
    planes = model.plane(tokens.mean(1)).view(2, 3, 3)
    x, y = (20 + 0.5) / 16 - 1, (7 + 0.5) / 16 - 1
    close(out[:, -1, :3, 7, 20], model.background[:, 7, 20] + planes[..., 0] + planes[..., 1] * x + planes[..., 2] * y)
    close(out[:1], model(tokens[:1]).view(1, SLOTS + 1, 4, 32, 32))  # of its image alone


def test_votes_may_have_their_mass_as_presence():
    torch.manual_seed(0)
    tokens = PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8)
    votes = Votes(tokens, set_dim=5, precise=2, massive=True).eval()
    out = votes(torch.rand(2, 3, 16, 16))
    assert torch.equal(out[..., 4], out[..., -1])
    plain = Votes(tokens, set_dim=5, precise=2).eval()
    plain.load_state_dict(votes.state_dict())
    assert torch.equal(plain(torch.zeros(1, 3, 16, 16))[..., :4], votes(torch.zeros(1, 3, 16, 16))[..., :4])


def test_only_the_last_iterate_is_drawn_in_a_forward_pass():
    slots = SlotAttention(token_dim=5, slot_dim=8, iterations=4, set_size=SLOTS, set_dim=6)
    broadcast = SpatialBroadcast(slots, side=2, widths=[3]).eval()
    calls = []
    broadcast.network.register_forward_hook(lambda *_: calls.append(1))
    tokens = torch.randn(2, 7, 5)
    last = broadcast(tokens)
    assert len(calls) == 1
    iterates = list(broadcast.refine(tokens))
    assert len(calls) == 1 + 5
    assert last.shape == (2, SLOTS, 64)
    assert torch.equal(iterates[-1], last)
    assert not torch.equal(iterates[0], last)


def test_a_finer_network_starts_as_the_enlargement_of_the_coarse_one():
    sizes = {"side": 2, "widths": [4, 3], "subpixel": True, "smoothing": 0}
    coarse, fine = Broadcast(5, **sizes).double(), Broadcast(5, fine=2, **sizes).double()
    missing, unexpected = fine.load_state_dict(coarse.state_dict(), strict=False)
    assert (len(missing), unexpected) == (4, [])
    maps, draw = [], coarse.network[-1]
    draw.register_forward_hook(lambda layer, given, output: maps.append(given[0]))
    slots = normal(2, 5)
    coarse(slots)
    enlarged = maps[0].repeat_interleave(4, 2).repeat_interleave(4, 3)
    close(fine(slots), draw(enlarged))
    assert fine(slots).shape == (2, 4, 32, 32)


def test_numbers_out_of_range_are_an_error():
    slots = MLPDecoder(latent_dim=6, hidden_dim=4, set_size=2, set_dim=3)
    for part, options in (
        (SpatialBroadcast, {"widths": []}),
        (SpatialBroadcast, {"side": 0}),
        (SpatialBroadcast, {"smoothing": -1}),
        (Glimpses, {"canvas": 8}),  # slots of 3 numbers
    ):
        with pytest.raises(InputError, match="expected"):
            part(slots, **options)
    tokens = PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8)
    for options in ({"set_dim": 1, "anchored": True}, {"set_dim": 2, "anchored": True, "massive": True}):
        with pytest.raises(InputError, match="expected set_dim >= "):
            Votes(tokens, **options)
    for options in ({"canvas": 0}, {"extent": 0.0}, {"widths": [0]}, {"fine": -1}):
        with pytest.raises(InputError, match="expected"):
            glimpses(**options)


@pytest.mark.filterwarnings("ignore:.*LeafSpec")
def test_a_step_of_images_without_sets_can_be_replayed(tmp_path):
    images = torch.rand(4, 3, 16, 16)
    images[2] = torch.nan
    encoder, _ = probe()
    slots = SlotAttention(token_dim=8, slot_dim=8, set_size=SLOTS, set_dim=6)
    decoder = SpatialBroadcast(slots, side=4, widths=[4, 4], smoothing=0)
    task = SetPrediction(encoder, decoder, schema=None, loss=Reconstruction())
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, inference_mode=False, **quiet)
    with pytest.raises(InputError, match="the image is not finite in samples 2"):
        trainer.fit(task, DataLoader([{"image": image} for image in images], batch_size=4))
    assert replay([str(tmp_path / "repro-step-0.pt"), "--device", "cpu"])


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


def test_a_discovery_model_trains_without_labels_and_a_probe_reads_its_frozen_slots(tmp_path, monkeypatch, capsys):
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
    assert kept
    assert all(torch.equal(before[name], after[name]) for name in kept)  # also the statistics of norms
    assert "frozen" not in capsys.readouterr().out
    assert "val_ap@inf" in metrics(second)[-1] or any(name.startswith("val_ap") for name in metrics(second)[-1])
    train(["--config", "probe.yaml", "--runs", "runs", "--name", "random", *frozen])
    assert "frozen: decoder.slots, encoder keep their random start; pass --init" in capsys.readouterr().out
    assert evaluate([str(second / "last.ckpt")])["iterations"] == 3
    with pytest.raises(InputError, match="predicts layers of images, as of object discovery"):
        load_checkpoint(first / "last.ckpt").require_schema(first / "last.ckpt")
    loaded = load_checkpoint(second / "last.ckpt")
    assert loaded.model(torch.zeros(2, 3, 16, 16)).shape == (2, 4, 19)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            ["--model.decoder.init_args.widths", "[4, 4, 4]"],
            "Reconstruction: expected square images of a multiple of 32",
        ),
        (["--model.loss", "setpred.losses.HungarianLoss"], "predicts layers of images, expected a loss of images"),
        (["--model.loss", "null"], "predicts layers of images, .* got HungarianLoss; pass --model.loss setpred.losses"),
        (
            ["--model.decoder", "setpred.decoders.Readout", "--model.decoder.set_dim", "5"],
            "Reconstruction: expected layers",
        ),
    ],
)
def test_a_loss_that_does_not_fit_the_layers_is_an_error_before_the_data(options, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decoder = {"decoder": "SpatialBroadcast", "options": "side: 4\n      widths: [4, 4]"}
    (tmp_path / "tiny.yaml").write_text(MODEL.format(**decoder))
    with pytest.raises(InputError, match=match):
        train(["--config", "tiny.yaml", *LABELS_FREE, *options])
    assert not (tmp_path / "data").exists()


def test_a_frozen_part_that_is_not_there_is_an_error():
    with pytest.raises(InputError, match=r"expected parts of the model, such as encoder, .*got 'decoder.slot'"):
        SetPrediction(*probe(), frozen=["decoder.slot"])


def test_a_model_of_which_nothing_learns_is_an_error():
    for parts in (["encoder", "decoder"], [""]):
        with pytest.raises(
            InputError, match="frozen: expected a part of the model that learns, got all of them frozen"
        ):
            SetPrediction(*probe(), frozen=parts)


def test_frozen_parts_stay_in_evaluation_mode():
    module = SetPrediction(*probe(), frozen=["encoder", "decoder.slots"]).train()
    assert not any(part.training for part in [*module.model.encoder.modules(), *module.model.decoder.slots.modules()])
    assert module.model.decoder.head.training
    learned = {name for name, value in module.model.named_parameters() if value.requires_grad}
    assert learned == {name for name, _ in module.model.named_parameters() if name.startswith("decoder.head")}


def probe():
    slots = SlotAttention(token_dim=8, slot_dim=8, set_size=SLOTS, set_dim=6)
    return PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8), Readout(slots, set_dim=19)
