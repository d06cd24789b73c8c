"""A prediction depends on image and model alone, not on batches, order, workers or threads.

It holds bit by bit for the released models, whose descents amplify a rounding of 1e-7 to another set for a few images
in a hundred, because every pass has one shape; see `setpred.evaluation`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import equal, metrics, run
from torch.utils.data import Subset

from setpred.checkpoint.load import load_checkpoint
from setpred.commands.predict import predict as predict_files
from setpred.data.dataset import SetFile
from setpred.data.images import find_images
from setpred.data.scenes import render_file
from setpred.evaluation import PASS, pad_to_pass, predict, predict_in_passes, report
from setpred.schema import CLEVR

ROOT = Path(__file__).resolve().parents[1]
RELEASED = {"quickstart": (3, 6), "slots-cpu": (3, 10)}  # and how many objects their scenes have
FEW, MANY = 20, 300  # scenes: in the ordinary suite, and in the slow one
slow = pytest.mark.slow
SIZES = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=slow)]


@pytest.fixture(scope="module", params=RELEASED)
def model(request):
    path = ROOT / "checkpoints" / f"{request.param}.safetensors"
    loaded = load_checkpoint(path)
    loaded.model.name = request.param
    return loaded.model


@pytest.fixture(scope="module", params=SIZES)
def scenes(request, model, tmp_path_factory):
    """Unseen scenes of the model's kind."""
    path = tmp_path_factory.mktemp("scenes") / "scenes.h5"
    render_file(path, images=request.param, image_size=64, objects=RELEASED[model.name], seed=2024)
    return SetFile(path)


@pytest.fixture(scope="module")
def expected(model, scenes):
    return predict(model, scenes, batch_size=256)


def test_the_scenes_tell_good_predictions_from_bad_ones(expected):
    """An equality of zeros would show little."""
    ap = report(expected, CLEVR, "dataset")["ap"]
    assert 0.3 < ap["inf"] < 1
    assert ap["0.0625"] < ap["0.25"] < ap["inf"]


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=slow), 7, pytest.param(PASS, marks=slow), 100])
def test_batches_do_not_matter(model, scenes, expected, batch_size):
    found = predict(model, scenes, batch_size=batch_size, workers=2 * (batch_size == 7))
    assert torch.equal(found.predicted, expected.predicted)
    assert torch.equal(found.target, expected.target)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow)])
def test_neither_order_nor_other_images_matter(model, scenes, expected, seed):
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed))
    found = predict(model, Subset(scenes, order.tolist()), batch_size=50)
    assert torch.equal(found.predicted, expected.predicted[order])
    assert torch.equal(found.index, expected.index[order])
    scores = [report(each, CLEVR, "dataset")["ap"] for each in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=0)
    alone = predict(model, Subset(scenes, [FEW - 1]), batch_size=1)
    assert torch.equal(alone.predicted[0], expected.predicted[FEW - 1])


def test_threads_do_not_matter(model, scenes, expected):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert torch.equal(predict(model, scenes, batch_size=PASS).predicted, expected.predicted)
    finally:
        torch.set_num_threads(before)


def test_a_pass_is_filled_with_the_last_image_in_the_same_layout():
    images = torch.randint(0, 256, (5, 4, 4, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    filled = pad_to_pass(images)
    assert filled.shape == (PASS, 3, 4, 4)
    assert filled.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(filled[:5], images)
    assert torch.equal(filled[5:], images[4:].expand(PASS - 5, -1, -1, -1))
    assert pad_to_pass(filled) is filled


def test_every_pass_has_one_shape():
    seen = []

    def model(images, *, iterations):
        assert not torch.is_grad_enabled()
        seen.append(len(images))
        return images[:, 0, :1, :1] * torch.ones(1, 2, 3)

    for count in (1, PASS, PASS + 1, 3 * PASS):
        found = predict_in_passes(model, torch.arange(count)[:, None, None, None] * torch.ones(1, 3, 4, 4))
        assert found[:, 0, 0].tolist() == list(range(count))
    assert set(seen) == {PASS}
    assert len(seen) == 1 + 1 + 2 + 3


# --- the commands -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(model, scenes, tmp_path_factory):
    """The scenes as PNG files, written last one first: a folder's own order is not that of the names."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in reversed(range(len(scenes))):
        Image.fromarray(scenes[number]["image"].permute(1, 2, 0).numpy()).save(folder / f"{number:04d}.png")
    return folder


def test_predictions_of_files_are_those_of_evaluation_in_any_order(model, folder, expected):
    paths = find_images([folder])
    for order in (paths, paths[::-1]):
        found = [elements for _, elements in predict_files(model, order, image_size=64, batch_size=11)]
        assert torch.equal(torch.stack(found if order is paths else found[::-1]), expected.predicted)
    alone = next(predict_files(model, paths[-1:], image_size=64))
    assert torch.equal(alone.elements, expected.predicted[-1])


# --- other arithmetic: equal up to rounding, which changes the set of a few images ---------------------------


def compare(ours, theirs):
    """Largest difference of each image, and differences of AP by threshold."""
    difference = (ours.predicted - theirs.predicted).abs().flatten(1).amax(1)
    scores = [report(each, CLEVR, "dataset")["ap"] for each in (ours, theirs)]
    return difference, {name: abs(score - scores[1][name]) for name, score in scores[0].items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a GPU with the CPU, and there is no GPU here")
def test_a_gpu_predicts_as_the_cpu(model, scenes, expected, monkeypatch):
    """In full precision for nearly all images; with the encoder in bfloat16, as evaluation has it, by the score."""
    _, scores = compare(predict(model, scenes, device="cuda"), expected)
    with monkeypatch.context() as full:
        full.setattr(torch.backends.cudnn, "allow_tf32", False)
        full.setattr("setpred.evaluation.encoder_autocast", lambda device: torch.autocast(device.type, enabled=False))
        difference, exact = compare(predict(model, scenes, device="cuda"), expected)
    model.cpu()
    assert difference.median() < 1e-4
    assert (difference < 1e-2).double().mean() > 0.8
    assert max(exact.values()) < 0.05
    assert max(scores.values()) < 0.1


# --- seeds --------------------------------------------------------------------------------------------------


@slow
def test_a_seed_is_one_run_in_another_process_with_workers_that_read_the_file(tmp_path, tiny_data):
    here, there = run(tmp_path / "here", data=tiny_data), tmp_path / "there"
    there.mkdir()
    command = [sys.executable, "-W", "ignore:This DataLoader", str(ROOT / "train.py")]
    command += ["--config", str(tmp_path / "here" / "tiny.yaml"), "--runs", str(there)]
    command += [f"--data.init_args.folder={tiny_data}", "--data.init_args.num_workers=2"]
    environment = os.environ | {"PYTHONHASHSEED": "7"}  # another order of Python's sets
    options = {"cwd": there, "env": environment, "check": True, "stdout": subprocess.DEVNULL}
    subprocess.run([*command, "--data.init_args.in_memory=false"], **options)
    ours, theirs = (torch.load(each / "last.ckpt", weights_only=True)["state_dict"] for each in (here, there / "tiny"))
    assert equal(ours, theirs)
    assert metrics(here) == metrics(there / "tiny")
