"""Scenes from several cameras: their files and batches, and the encoder that reads them as a set."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import check_slope, close, normal, weighted_sum

from setpred.commands.evaluate import evaluate
from setpred.commands.train import train
from setpred.data.datamodule import RenderedScenes
from setpred.data.dataset import SetFile, open_data
from setpred.data.scenes import built_in_scenes, render_file
from setpred.data.streamed import StreamedScenes
from setpred.data.views import SceneViews, camera_pose
from setpred.encoders import ResidualTrunk, ViewTokens
from setpred.encoders.vsformer import view_rays
from setpred.errors import InputError
from setpred.nn import POSE
from setpred.rendering.camera import NOMINAL_CAMERA

SIDE, VIEWS = 16, 3
SCENES = {"image_size": SIDE, "objects": (2, 4)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "views.h5"
    render_file(path, images=4 * VIEWS, views=VIEWS, **SCENES)
    return path


def test_cameras_go_round_the_scene_and_fewer_are_the_first_ones():
    scenes, several = (built_in_scenes(range(n), seed=0, objects=(2, 4), views=v) for n, v in ((2, None), (6, VIEWS)))
    for number, seen in enumerate(several):
        scene, turns = scenes[number // VIEWS], number % VIEWS
        assert (seen.objects, seen.lamps) == (scene.objects, scene.lamps)
        ours, theirs = (complex(*camera.location[:2]) for camera in (seen.camera, scene.camera))
        assert ours == pytest.approx(theirs * np.exp(1j * turns * math.pi * (3 - math.sqrt(5))))
        assert seen.camera.location[2] == scene.camera.location[2]
    assert built_in_scenes(range(4), seed=0, objects=(2, 4), views=2) == [several[k] for k in (0, 1, 3, 4)]


def test_an_example_is_the_set_of_images_of_a_scene(path):
    rows, scenes = SetFile(path), open_data(path, image_size=None)
    assert (len(scenes), scenes.image_size, scenes.inputs.dim) == (4, None, POSE + 3 * SIDE**2)
    batch = scenes.__getitems__([2, 0])
    for example, number in enumerate((2, 0)):
        images = rows.__getitems__(range(VIEWS * number, VIEWS * (number + 1)))
        pixels = images["image"].permute(0, 2, 3, 1).flatten(1) / 255
        poses = np.stack([camera_pose(rows.camera(VIEWS * number + k)) for k in range(VIEWS)])
        torch.testing.assert_close(batch["input"][example, :, POSE:], pixels)
        torch.testing.assert_close(batch["input"][example, :, :POSE], torch.from_numpy(poses).float())
        assert (images["elements"] == batch["elements"][example]).all()
    assert "input_mask" not in batch
    assert scenes.name(2) == "scene 2"
    first = rows.__getitems__([2 * VIEWS, 0])["image"].permute(0, 2, 3, 1)
    assert (scenes.first_views([2, 0]) == first.numpy()).all()
    scenes.mixed = True
    assert scenes.__getitems__([2, 3])["input_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert len(SceneViews(path, images=2)) == 2


def test_only_files_of_several_images_a_scene_are_sets_of_views(path, tmp_path):
    render_file(tmp_path / "images.h5", images=2, **SCENES)
    for build_data, message in (
        (lambda: open_data(tmp_path / "images.h5", image_size=None), "has images"),
        (lambda: SceneViews(tmp_path / "images.h5"), "with views in its source"),
        (lambda: open_data(path, image_size=None, instances=True), "no masks"),
        (lambda: render_file(tmp_path / "a.h5", images=4, views=3, **SCENES), "views .* divide"),
        (lambda: RenderedScenes(views=0), "views of at least 1"),
        (lambda: RenderedScenes(views=2, masks=True), "without augmentation and masks"),
        (lambda: RenderedScenes(mixed_views=True), "expected views for mixed_views"),
        (lambda: StreamedScenes(views=2), "no views of streamed scenes"),
    ):
        with pytest.raises(InputError, match=message):
            build_data()


def test_the_ray_of_a_cell_meets_what_the_camera_shows_there():
    cells, camera = 400, NOMINAL_CAMERA.turned(2.0)
    rays = view_rays(torch.from_numpy(camera_pose(np.array(camera.location)))[None], cells, cells)
    nearest, directions = rays[0].unflatten(0, (cells, cells)).split(3, dim=-1)
    close(directions.norm(dim=-1), torch.ones(cells, cells).double())
    close((nearest * directions).sum(-1), torch.zeros(cells, cells).double())
    for point in np.random.default_rng(0).uniform(-2, 2, (5, 3)):
        column, row = camera.project(point, cells, cells)[:2].astype(int)
        apart = torch.from_numpy(point) - nearest[row, column]
        off = apart - (apart @ directions[row, column]) * directions[row, column]
        assert off.norm() < 15 / cells  # half a cell, which is about 0.01 of a distance of 11


def encoder(layers=1):
    torch.manual_seed(0)
    trunk = ResidualTrunk(image_size=4, widths=[3], blocks=1)
    return ViewTokens(trunk, token_dim=4, layers=layers, heads=2, hidden_dim=5).double()


@pytest.mark.parametrize("training", [True, False])
def test_tokens_know_neither_the_order_of_views_nor_absent_ones(training):
    model = encoder().train(training)
    views, mask = normal(3, 4, model.in_dim), torch.arange(4) < torch.tensor([[4], [2], [0]])
    expected = model(views, mask)
    tokens = expected.unflatten(1, (4, 4))
    order = torch.tensor([2, 0, 3, 1])
    close(model(views[:, order], mask[:, order]).unflatten(1, (4, 4)), tokens[:, order])
    absent = views.masked_fill(~mask.unsqueeze(-1), torch.nan)
    close(model(absent, mask), expected)
    wider = torch.cat([absent, absent[:, :1] * torch.nan], dim=1)
    close(model(wider, torch.cat([mask, mask[:, :1] & False], dim=1)).unflatten(1, (5, 4))[:, :4], tokens)
    if not training:  # batch statistics are of all examples
        close(model(views[1:2, :2]), expected[1:2, :8])
        close(model(views[:1], mask[:1]), model(views[:1]))
    apart = encoder(layers=0).eval()
    close(apart(views[:, :1]), apart(views)[:, :4])  # without attention every view is read by itself


def test_gradients_of_tokens_are_those_of_finite_differences():
    model, views = encoder().eval(), normal(2, 3, 60).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    with torch.no_grad():  # away from the norms' zeros, where ReLU has no slope
        for parameter in model.parameters():
            parameter += 0.1 * normal(*parameter.shape)
    for tensors in ([views], list(model.parameters())):
        check_slope(lambda: weighted_sum(model(views, mask)[:, :8]), tensors, least=1e-4)


def test_a_model_of_views_trains_and_is_scored_with_any_number_of_them(path, tmp_path):
    config = Path(__file__).resolve().parents[1] / "configs" / "views" / "attention.yaml"
    few = {"train_images": 8, "val_images": 3, "image_size": SIDE, "batch_size": 4, "folder": tmp_path, "workers": 0}
    options = [f"--data.init_args.{name}={value}" for name, value in few.items()]
    size = {"image_size": SIDE, "objects": (3, 6), "workers": 0}
    for seed, scenes in ((0, 8), (1_000_000, 3)):  # as the command would, in another process
        file = f"rendered-{SIDE}-3to6-views4-seed{seed}-{4 * scenes}.h5"
        render_file(tmp_path / file, images=4 * scenes, views=4, seed=seed, **size)
    folder = train(["--config", str(config), "--runs", str(tmp_path), "--trainer.max_epochs=1", *options])
    assert evaluate([str(folder / "last.ckpt"), "--data", str(path)])["images"] == 4
    drawn = tmp_path / "figures"
    assert evaluate([str(folder / "last.ckpt"), "--figures", str(drawn)])["images"] == 3
    names = {figure.name for figure in drawn.iterdir()}
    assert {"predictions.png", "refinement.gif"} < names  # on the first views
    assert "supports.png" not in names  # the tokens of four square maps are a square number, but of no one image
