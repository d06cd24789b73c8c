"""Segmentations by models: scores, labels, figures, PNG masks and RLE."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from problems import normal
from test_evaluation import voting_model
from tiny import set_file, untrained
from torch.nn import functional

from setpred.checkpoint import save_model
from setpred.commands.evaluate import evaluate
from setpred.commands.predict import run
from setpred.commands.segmentation import (
    Segments,
    image_labels,
    masks_of,
    scored_masks,
    segment,
    segmented_images,
    slot_labels,
)
from setpred.data.datamodule import SetDataModule
from setpred.data.dataset import open_data
from setpred.data.exporting import to_coco, to_segment
from setpred.data.images import load_image
from setpred.data.scenes import render_file
from setpred.decoders import Glimpses, SlotAttention, SpatialBroadcast
from setpred.encoders import PositionedTokens, ResidualTrunk
from setpred.errors import InputError
from setpred.inner import Problem, VotingEnergy
from setpred.metrics import Segmentation, adjusted_rand_index, segmentation_scores
from setpred.model import SetPredictor
from setpred.schema import CLEVR, ElementSchema, categorical, continuous
from setpred.training import SetPrediction
from setpred.visualise import SegmentedImage, draw_own_training

SIDE, SLOTS = 16, 5


def discovery_model(*, background=False):
    """A model of `SLOTS` layers, untrained: half the side of the image, or the last one of the background."""
    torch.manual_seed(0)
    slots = SLOTS - background
    attention = SlotAttention(token_dim=8, slot_dim=8, hidden_dim=8, iterations=3, set_size=slots, set_dim=6)
    if background:
        decoder = Glimpses(attention, canvas=SIDE, side=2, widths=[4], extent=0.7, prior=-12.0)
    else:
        decoder = SpatialBroadcast(attention, side=4, widths=[4], smoothing=0)
    return SetPredictor(PositionedTokens(ResidualTrunk(image_size=SIDE, widths=[4], blocks=0), token_dim=8), decoder)


def voting():
    """A voting model, untrained, whose votes are far apart and most have mass; some of its elements are present."""
    model = voting_model(VotingEnergy(set_dim=CLEVR.set_dim, precise=3, weights=[2.0]))
    with torch.no_grad():
        last = model.encoder.network[-1]
        last.weight[: CLEVR.set_dim] *= 30
        last.bias[CLEVR.set_dim - 1] += 1.5
        last.bias[-1] += 3
    return model


def test_masks_of_gated_votes_are_where_votes_are_present_whatever_their_mass():
    model, images = voting().eval(), torch.rand(4, 3, SIDE, SIDE)
    model.encoder.gated = True
    light = copy.deepcopy(model)
    with torch.no_grad():
        light.encoder.network[-1].bias[-1] -= 20  # of the mass
        features, few = (each.encode(images) for each in (model, light))
        elements = model.decoder(features)
        found = masks_of(model, features, elements)
        assert torch.equal(masks_of(light, few, elements), found)
        assert not torch.allclose(masks_of(voting().eval(), features, elements), found)
    presence = features[..., CLEVR.set_dim - 1].clamp(0, 1)
    torch.testing.assert_close(found.sum(1).flatten(1), presence)
    assert ((presence > 0) & (presence < 1)).any()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """scenes.h5 with masks, plain.h5 without, images of several sizes, and a checkpoint of each kind."""
    folder = tmp_path_factory.mktemp("segmented")
    for name, masks in (("scenes", True), ("plain", False)):
        render_file(folder / f"{name}.h5", images=12, image_size=SIDE, objects=(2, 4), masks=masks)
    save_model(folder / "slots.ckpt", discovery_model(), None)
    save_model(folder / "own.ckpt", discovery_model(background=True), None)
    save_model(folder / "voting.ckpt", voting(), CLEVR)
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("a", (48, 32)), ("b", (20, 41)), ("c", (9, 7))):
        pixels = generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{name}.png")
    return folder


def examples(folder, count=12):
    data = open_data(folder / "scenes.h5", image_size=SIDE, instances=True)
    return data.__getitems__(range(count))


def test_the_scores_of_a_discovery_model_are_those_of_its_validation(folder, tmp_path, capsys):
    batch, out = examples(folder), tmp_path / "scores.json"
    arguments = [str(folder / "slots.ckpt"), "--data", str(folder / "scenes.h5")]
    result = evaluate([*arguments, "--json", str(out)])
    metric = Segmentation()
    metric.update(discovery_model().eval()(batch["image"]), batch["instances"])
    assert result["scores"] == pytest.approx({name: float(score) for name, score in metric.compute().items()}, abs=1e-6)
    assert (result["masks"], result["iterations"], result["images"]) == ("decoder", 3, 12)
    assert result == json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert [
        w for w in ("12 images", "largest of 5 masks", "FG-ARI", "background:", "squared error") if w not in printed
    ] == []
    assert evaluate([*arguments, "--batch-size", "5", "--workers", "1"])["scores"] == result["scores"]
    assert evaluate([*arguments, "--seed", "0"])["scores"] == result["scores"]
    for other in (["--seed", "1"], ["--iterations", "0"]):
        assert evaluate([*arguments, *other])["scores"] != result["scores"]


def test_layers_that_are_the_instances_score_1_and_one_layer_0(folder, monkeypatch):
    batch = examples(folder)
    masks = 50 * functional.one_hot(batch["instances"].long(), SLOTS).permute(0, 3, 1, 2).unsqueeze(2).float()
    colours = (batch["image"] / 255).unsqueeze(1).expand(-1, SLOTS, -1, -1, -1)
    perfect = torch.cat([colours, masks], dim=2).flatten(2)
    single = torch.cat([colours, torch.zeros_like(masks)], dim=2).flatten(2)
    for layers, expected in ((perfect, 1), (single, 0)):
        number = torch.arange(64).clamp(max=11)  # as a pass is filled up
        monkeypatch.setattr(SpatialBroadcast, "forward", lambda self, features, iterations, y=layers[number]: y)
        result = evaluate([str(folder / "slots.ckpt"), "--data", str(folder / "scenes.h5")])
        scores = {name: round(value, 6) for name, value in result["scores"].items()}
        assert result["reconstruction"] < 1e-9
        if expected:
            assert set(scores.values()) == {1.0}
        else:
            assert scores["ari"] == scores["fg_ari"] == 0
            assert 0 < scores["miou"] < 0.5


def test_mass_that_supports_no_present_element_is_background():
    elements = torch.tensor([[[0.0, 0.51], [0.0, 0.5]]])  # present and absent
    supports = torch.tensor([[[[0.6, 0.3], [0.5, 0.0]], [[0.1, 0.6], [0.3, 0.0]]]])
    masks = scored_masks(voting(), Segments(elements, supports))
    expected = torch.tensor([[[[0.4, 0.7], [0.5, 1.0]], [[0.6, 0.3], [0.5, 0.0]], [[0.0, 0.0], [0.0, 0.0]]]])
    torch.testing.assert_close(masks, expected)
    assert scored_masks(discovery_model(), Segments(elements, supports)) is supports


def test_the_supports_of_a_supervised_model_are_scored_as_written_out(folder):
    batch, model = examples(folder), voting()
    result = evaluate([str(folder / "voting.ckpt"), "--data", str(folder / "scenes.h5"), "--segmentation"])
    with torch.no_grad():
        features = model.encode(batch["image"])
        elements = model(batch["image"])
        supports = model.decoder.objective.supports(elements, Problem(features, elements)).view(12, 4, 4, 4)
    present = elements[..., -1] > 0.5
    assert 0 < int(present.sum()) < present.numel()
    supports = supports * present[..., None, None]
    masks = torch.cat([1 - supports.sum(1, keepdim=True), supports], 1)
    labels = functional.interpolate(masks, (SIDE, SIDE), mode="bilinear").argmax(1)
    expected = {name: float(s.nanmean()) for name, s in segmentation_scores(labels, batch["instances"]).items()}
    assert result["scores"] == pytest.approx(expected, abs=1e-3)
    assert result["masks"] == "supports"
    assert len(labels.unique()) > 1
    assert "reconstruction" not in result
    alone = functional.interpolate(supports, (SIDE, SIDE), mode="bilinear").argmax(1)
    expected = float(adjusted_rand_index(alone, batch["instances"], foreground=True).nanmean())
    assert result["fg_ari_of_objects"] == pytest.approx(expected, abs=1e-3)
    assert abs(expected - result["scores"]["fg_ari"]) > 0.01


@pytest.mark.parametrize(
    ("checkpoint", "options", "match"),
    [
        *(
            ("slots", options, f"{options.split()[0]}: expected no option of average precision")
            for options in ("--protocol dataset", "--thresholds 1", "--within coords=1", "--report a.html")
        ),
        ("slots", "--data plain.h5", "masks of the objects .* --masks of `setpred data render`"),
        ("voting", "--data plain.h5 --segmentation", "make it again with --masks"),
        ("voting", "--data scenes.h5 --segmentation --seed 1", "--seed: the decoder of this model has no random start"),
        ("tiny", "--segmentation", "--segmentation: expected a model of images with masks, .* got the decoder IDSPN"),
        ("slots", "--data scenes.h5 --shown 25 --figures f", "--shown: expected at most 24"),
    ],
)
def test_what_cannot_be_scored_is_an_error(checkpoint, options, match, folder, tmp_path, monkeypatch):
    path = untrained(tmp_path / "run") if checkpoint == "tiny" else folder / f"{checkpoint}.ckpt"
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=match):
        evaluate([str(path), *options.split()])
    assert not (folder / "f").exists()


@pytest.mark.parametrize(("checkpoint", "options"), [("slots", ""), ("own", ""), ("voting", "--segmentation")])
def test_figures_are_drawn(checkpoint, options, folder, tmp_path):
    arguments = [str(folder / f"{checkpoint}.ckpt"), "--data", str(folder / "scenes.h5"), *options.split()]
    evaluate([*arguments, "--figures", str(tmp_path / "f"), "--shown", "2"])
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == [
        "segmentation.png",
        "segmentation_refinement.png",
    ]


def test_a_segment_alone_is_the_image_times_its_enlarged_support_on_white(folder):
    model, data = voting().eval(), open_data(folder / "scenes.h5", image_size=SIDE, instances=True)
    (image,) = segmented_images(model, data, [3], iterations=None, device=torch.device("cpu"))
    picture = data[3]["image"].unsqueeze(0)
    (segments,) = segment(model, picture)
    masks = functional.interpolate(scored_masks(model, segments), (SIDE, SIDE), mode="bilinear")[0]
    assert len(image.parts) > 2
    for label, part in image.parts.values():
        expected = masks[label] * picture[0] / 255 + 1 - masks[label]
        np.testing.assert_allclose(part, expected.permute(1, 2, 0), atol=1e-5)


def test_the_scores_of_a_discovery_training_are_drawn(tmp_path):
    head = "epoch,step,seconds,train_loss,val_ari,val_fg_ari,val_loss,val_mbo,val_miou\n"
    (tmp_path / "metrics.csv").write_text(f"{head}0,2,60,0.2,0.1,0.2,0.3,0.4,0.5\n1,4,120,0.1,0.2,0.3,0.3,nan,0.6\n")
    (drawn,) = draw_own_training(tmp_path / "figures", tmp_path / "best.ckpt")
    assert drawn.name == "training.png"
    (tmp_path / "metrics.csv").write_text(f"{head}0,2,60,0.2,soon,0.2,0.3,0.4,0.5\n")
    with pytest.raises(InputError, match="not as `setpred train` writes it"):
        draw_own_training(tmp_path / "figures", tmp_path / "best.ckpt")


def test_non_finite_predictions_are_an_error_that_names_the_images(folder, monkeypatch):
    layers = torch.zeros(64, SLOTS, 4 * SIDE**2)
    layers[10, 2, 3] = torch.nan
    monkeypatch.setattr(SpatialBroadcast, "forward", lambda self, features, iterations: layers)
    with pytest.raises(InputError, match=r"not finite for inputs 10 of the data"):
        evaluate([str(folder / "slots.ckpt"), "--data", str(folder / "scenes.h5")])


def test_a_segment_has_the_colour_of_the_object_that_it_is_matched_with():
    truth = np.zeros((4, 6), np.uint8)
    truth[:, 2:4], truth[:, 4:] = 1, 2
    permuted = np.array([7, 0, 3])[truth]
    image = SegmentedImage("a", np.zeros((4, 6, 3), np.uint8), truth, permuted[None], {})
    np.testing.assert_array_equal(image.painted(), image.truth)
    assert image.scores() == "FG-ARI 100, mIoU 100"
    assert SegmentedImage("a", np.zeros((4, 6, 3), np.uint8), 0 * truth, permuted[None], {}).scores() == ""
    split = permuted.copy()
    split[0, 4:] = 5  # a smaller part of object 2 has a colour that no true segment has
    image = SegmentedImage("a", np.zeros((4, 6, 3), np.uint8), truth, split[None], {})
    same = (image.painted() == image.truth).all(-1)
    np.testing.assert_array_equal(same, split != 5)
    assert not {tuple(c) for c in image.painted()[0, 4:]} & {tuple(c) for c in image.truth.reshape(-1, 3)}
    joined = np.array([0, 1, 1])[truth]
    joined[0, 0] = 2  # overlaps no object: it has not the colour of the missed one
    image = SegmentedImage("a", np.zeros((4, 6, 3), np.uint8), truth, joined[None], {})
    assert tuple(image.painted()[0, 0]) not in {tuple(c) for c in image.truth.reshape(-1, 3)}
    unknown = SegmentedImage("a", image.picture, None, split[None] % 7, {})  # 0 has most pixels, with 7
    assert unknown.painted()[0, 0].tolist() == image.truth[0, 0].tolist()
    assert len({tuple(c) for c in unknown.painted().reshape(-1, 3)}) == 3
    assert unknown.scores() == ""
    missed = np.zeros_like(truth)  # one segment for all, and one start with others
    image = SegmentedImage("a", np.zeros((4, 6, 3), np.uint8), truth, np.stack([split, missed]), {})
    assert image.painted(1)[0, 0].tolist() == image.truth[0, 0].tolist()
    assert len({tuple(c) for c in image.painted(0).reshape(-1, 3)}) == 4


@pytest.mark.parametrize("size", [(48, 32), (31, 50), (3, 4)])
def test_labels_of_an_image_are_those_of_enlarged_masks(size, monkeypatch):
    monkeypatch.setattr("setpred.commands.segmentation.NUMBERS_AT_ONCE", 700)  # a few rows at a time
    masks = normal(3, 8, 8, dtype=torch.float32)
    stretched = functional.interpolate(masks[None], size, mode="bilinear")[0].argmax(0)
    np.testing.assert_array_equal(image_labels(masks, size, padded=False), stretched)
    square = functional.interpolate(masks[None], (max(size), max(size)), mode="bilinear")[0].argmax(0)
    np.testing.assert_array_equal(image_labels(masks, size, padded=True), square[: size[0], : size[1]])


def test_the_background_of_slots_is_the_largest_or_the_decoders_own():
    masks = torch.zeros(3, 2, 4)
    masks[0, :, :1] = masks[1, :, 1:3] = masks[2, :, 3:] = 1
    masks[1, 0, 3] = 2
    labels = slot_labels(discovery_model(), masks, (2, 4), padded=False)
    np.testing.assert_array_equal(labels, [[1, 0, 0, 0], [1, 0, 0, 3]])
    labels = slot_labels(discovery_model(background=True), masks, (2, 4), padded=False)
    np.testing.assert_array_equal(labels, [[1, 2, 2, 2], [1, 2, 2, 0]])


def pixels_of(segment):
    """The mask of a segment from its runs."""
    height, width = segment["segmentation"]["size"]
    runs = segment["segmentation"]["counts"]
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def test_runs_boxes_and_areas_are_those_of_coco():
    coder = pytest.importorskip("pycocotools.mask")
    generator = np.random.default_rng(0)
    for labels in (generator.integers(0, 3, (7, 9)), np.ones((2, 3), int), np.zeros((3, 2), int)):
        found = to_segment(labels, 1)
        mask = labels == 1
        np.testing.assert_array_equal(pixels_of(found), mask)
        encoded = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
        assert coder.frPyObjects(found["segmentation"], *mask.shape)["counts"] == encoded["counts"]
        assert found["area"] == coder.area(encoded)
        assert found["bbox"] == coder.toBbox(encoded).tolist()


@pytest.mark.parametrize("checkpoint", ["slots", "own", "voting"])
def test_masks_of_images_and_their_runs_agree(checkpoint, folder, tmp_path):
    source, out, masks = str(folder / "images"), tmp_path / "p.json", tmp_path / "masks"
    arguments = [str(folder / f"{checkpoint}.ckpt"), source, "--out", str(out)]
    run(
        [*arguments, "--masks", str(masks), "--batch-size", "2", "--figures", str(tmp_path / "figures"), "--shown", "2"]
    )
    records = json.loads(out.read_text())
    assert sorted(path.name for path in masks.iterdir()) == ["a.png", "b.png", "c.png"]
    assert [path.name for path in sorted((tmp_path / "figures").iterdir())] == ["000-a.png", "001-b.png"]
    seen = 0
    for record, name in zip(records, "abc", strict=True):
        with Image.open(masks / f"{name}.png") as image, Image.open(folder / "images" / f"{name}.png") as original:
            assert (image.mode, image.size) == ("P", original.size)
            labels = np.asarray(image)
        objects = record.pop("objects", None)
        segments = record.get("segments") if objects is None else [obj.pop("segment") for obj in objects]
        if objects is None:
            assert [each["label"] for each in segments] == [k for k in np.unique(labels) if k]
            assert labels.max() <= SLOTS
        else:
            assert [each["label"] for each in segments] == [*range(1, len(objects) + 1)]
        for each in segments:
            np.testing.assert_array_equal(pixels_of(each), labels == each["label"])
        seen += len(segments)
    assert seen > 3
    run(arguments)  # without masks
    if checkpoint == "voting":
        assert not any("segment" in obj for record in json.loads(out.read_text()) for obj in record["objects"])
        run([*arguments, "--masks", str(masks), "--threshold", "1"])
        assert not any(np.asarray(Image.open(path)).any() for path in masks.iterdir())
    else:
        assert json.loads(out.read_text()) == records


def test_masks_leave_the_objects_as_they_were(folder, tmp_path):
    source, out = str(folder / "images"), tmp_path / "p.json"
    arguments = [str(folder / "voting.ckpt"), source, "--out", str(out)]
    run(arguments)
    plain = json.loads(out.read_text())
    run([*arguments, "--masks", str(tmp_path / "masks")])
    found = json.loads(out.read_text())
    for record in found:
        for obj in record["objects"]:
            assert obj.pop("segment")
    assert found == plain


def test_each_object_has_the_pixels_of_its_own_supports(folder, tmp_path):
    path, out = folder / "images" / "a.png", tmp_path / "p.json"
    run([str(folder / "voting.ckpt"), str(path), "--out", str(out), "--masks", str(tmp_path / "masks")])
    image = torch.tensor(load_image(path, SIDE)).permute(2, 0, 1).unsqueeze(0)
    model = voting()
    (segments,) = segment(model, image)
    masks = functional.interpolate(scored_masks(model, segments), (32, 48), mode="bilinear")
    labels = masks.argmax(1)[0].numpy()
    rows = CLEVR.values(segments.elements[0], "coords").tolist()
    (record,) = json.loads(out.read_text())
    numbers = [rows.index(pytest.approx(obj["coords"], abs=1e-4)) for obj in record["objects"]]
    assert numbers != sorted(numbers)
    for obj, number in zip(record["objects"], numbers, strict=True):
        np.testing.assert_array_equal(pixels_of(obj["segment"]), labels == number + 1)


def test_coco_files_have_the_masks():
    boxes = ElementSchema(
        "b", [continuous("coords", 2), continuous("extent", 2), categorical("kind", "a", "b")], max_objects=2
    )
    obj = {"coords": [1.0, 1.0], "extent": [2.0, 2.0], "kind": "b", "confidence": 0.9}
    diagonal = to_segment(np.eye(2, dtype=int), 1)
    text = "".join(to_coco([("a.png", [obj | {"segment": diagonal}])], boxes, ["a.png"]))
    (found,) = json.loads(text)["annotations"]
    assert (found["segmentation"], found["area"]) == (diagonal["segmentation"], 2)
    assert (found["bbox"], found["attributes"]) == ([0, 0, 2, 2], {})


@pytest.mark.parametrize(
    ("checkpoint", "options", "match"),
    [
        ("slots", "--out p.csv", "--format: expected json or jsonl .* got csv"),
        ("slots", "--out p.json --format coco", "--format: expected json or jsonl .* got coco"),
        ("slots", "--out p.json --threshold 0.5", "--threshold: expected no option of objects"),
        ("slots", "--out p.json --coco-ids a.json", "--coco-ids: expected no option of objects"),
        ("voting", "--out p.csv --masks m", "--masks: expected --format json, jsonl or coco"),
        ("voting", "--out p.json --masks images", "--masks images: the images to read are in this folder"),
        ("voting", "images2 --out p.json --masks m", "--masks: .* have masks of one name"),
        ("tiny", "--out p.json --masks m", "--masks: expected a model of images with masks"),
    ],
)
def test_masks_that_cannot_be_written_are_an_error_before_the_work(
    checkpoint, options, match, folder, tmp_path, monkeypatch
):
    path = untrained(tmp_path / "run") if checkpoint == "tiny" else folder / f"{checkpoint}.ckpt"
    (folder / "images2").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(folder / "images2" / "a.jpg")
    monkeypatch.setattr("setpred.commands.predict.predict", lambda *_, **__: pytest.fail("it predicts"))
    monkeypatch.chdir(folder)
    with pytest.raises(InputError, match=match):
        run([str(path), "images", *options.split()])
    assert not (folder / "p.json").exists()
    assert not (folder / "m").exists()


def test_a_checkpoint_without_schema_notes_that_its_images_were_padded(tmp_path):
    class Data:
        image_size = SIDE

        def __init__(self, schema):
            self.schema = schema

    points = ElementSchema("p", [continuous("coords", 2)], max_objects=2)
    assert open_data(set_file(tmp_path / "p.h5", points), image_size=SIDE, schema=points).schema == points
    task = SetPrediction(discovery_model(background=True).encoder, discovery_model().decoder, schema=None)
    for schema, padded in ((points, True), (CLEVR, None)):
        task.describe_data(Data(schema))
        assert task.data_description.get("padded") is padded
    # the command line describes the data before it opens them
    task.describe_data(SetDataModule(None, str(tmp_path / "p.h5")))
    assert task.data_description["padded"] is True
