"""A prediction depends on image and model alone, not on batches, order, workers or threads.

It holds bit by bit for the released models, whose descents amplify a rounding of 1e-7 to another set for a few images
in a hundred, because every pass has one shape; see `setpred.evaluation`.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import CONFIG, run
from torch.utils.data import Subset

from setpred.aggregators import FSPool, SetEncoder
from setpred.checkpoint.load import load_checkpoint
from setpred.commands.evaluate import evaluate
from setpred.commands.predict import predict as predict_files
from setpred.commands.predict import run as predict_command
from setpred.data.dataset import SetFile
from setpred.data.images import find_images
from setpred.data.scenes import render_file
from setpred.decoders import (
    IDSPN,
    MESH,
    GaussianStart,
    RandomStart,
    SinkhornAttention,
    SlotAttention,
    SlotMixture,
    TransformerDecoder,
)
from setpred.encoders import PositionedTokens, SmallCNN, SmallTrunk
from setpred.evaluation import PASS, PROTOCOLS, pad_to_pass, predict, predict_in_passes, report
from setpred.inner import GradientDescent, LatentMatching
from setpred.metrics import AveragePrecision
from setpred.model import SetPredictor
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


def numbers(result, name=""):
    """All numbers of a report, by name."""
    if isinstance(result, dict | list):
        items = result.items() if isinstance(result, dict) else enumerate(result)
        return {inner: number for key, value in items for inner, number in numbers(value, f"{name}/{key}").items()}
    return {name: result} if isinstance(result, int | float) else {}


def assert_same_reports(ours, theirs, *, within=1e-6):
    for protocol in PROTOCOLS:
        mine, its = (numbers(report(each, CLEVR, protocol)) for each in (ours, theirs))
        assert len(its) > 100
        assert mine == pytest.approx(its, abs=within, rel=0, nan_ok=True)


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
    assert_same_reports(found, expected, within=0)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=slow)])
def test_neither_order_nor_other_images_matter(model, scenes, expected, seed):
    order = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(seed))
    found = predict(model, Subset(scenes, order.tolist()), batch_size=50)
    assert torch.equal(found.predicted, expected.predicted[order])
    assert torch.equal(found.index, expected.index[order])
    assert_same_reports(found, expected, within=0)
    alone = predict(model, Subset(scenes, [FEW - 1]), batch_size=1)
    assert torch.equal(alone.predicted[0], expected.predicted[FEW - 1])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_metric_does_not_see_order_or_batches(expected, name):
    predicted, target, _ = expected
    first = None
    for seed in range(3):
        for size in (256, 7, 1):
            order = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
            metric = AveragePrecision(PROTOCOLS[name])
            for some in order.split(size):
                metric.update(predicted[some], target[some])
            found = {key: float(value) for key, value in metric.compute().items()}
            first = first or found
            assert found == pytest.approx(first, abs=1e-6)


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


@pytest.mark.parametrize("protocol", ["dataset", pytest.param("per-image", marks=slow)])
def test_evaluate_writes_the_same_file(model, scenes, tmp_path, protocol):
    out = tmp_path / "out.json"
    options = [str(ROOT / "checkpoints" / f"{model.name}.safetensors"), "--data", str(scenes.path), "--json", str(out)]
    written = set()
    for changed in (["--batch-size", "256"], ["--batch-size", "7"], ["--workers", "2"]):
        evaluate([*options, "--protocol", protocol, *changed])
        written.add(out.read_text())
    assert len(written) == 1


def test_predict_writes_the_same_file(model, folder, tmp_path):
    """With other batches and decoding threads."""
    checkpoint = ROOT / "checkpoints" / f"{model.name}.safetensors"
    written = set()
    for batch_size, threads in ((256, 1), (7, 4)):
        out = tmp_path / "out.json"
        options = ["--batch-size", str(batch_size), "--threads", str(threads), "--device", "cpu"]
        predict_command([str(checkpoint), str(folder), "--out", str(out), *options])
        written.add(out.read_text())
    assert len(written) == 1


def test_predictions_of_files_are_those_of_evaluation_in_any_order(model, folder, expected):
    paths = find_images([folder])
    for order in (paths, paths[::-1]):
        found = [elements for _, elements in predict_files(model, order, image_size=64, batch_size=11)]
        assert torch.equal(torch.stack(found if order is paths else found[::-1]), expected.predicted)
    alone = next(predict_files(model, paths[-1:], image_size=64))
    assert torch.equal(alone.elements, expected.predicted[-1])


# --- every decoder with random numbers ----------------------------------------------------------------------


def slots(**options):
    return SlotAttention(set_size=4, token_dim=8, slot_dim=8, hidden_dim=8, **options)


def sharp():
    return SlotAttention(
        SinkhornAttention(MESH(), dim=4, hidden_dim=8),
        heads=2,
        set_size=4,
        token_dim=8,
        slot_dim=8,
        hidden_dim=8,
        set_dim=CLEVR.set_dim,
    )


def idspn(start):
    objective = LatentMatching(SetEncoder(FSPool(8, set_size=4), hidden_dim=8, set_dim=CLEVR.set_dim))
    return IDSPN(objective, GradientDescent(iterations=5, momentum=0.9), set_size=4, start=start, set_dim=CLEVR.set_dim)


DRAWING = {
    "iDSPN": lambda: idspn(None),
    "iDSPN from a learned distribution": lambda: idspn(GaussianStart(4, CLEVR.set_dim)),
    "Slot Attention": slots,
    "Slot Attention, implicit": lambda: slots(gradient_steps=1),
    "slot mixture": lambda: SlotMixture(set_size=4, token_dim=8, slot_dim=8, hidden_dim=8, set_dim=CLEVR.set_dim),
    "Slot Attention with MESH": sharp,
    "transformer of random codes": lambda: TransformerDecoder(
        latent_dim=8, dim=8, heads=2, layers=1, hidden_dim=8, start=RandomStart(4, 8), set_size=4, set_dim=CLEVR.set_dim
    ),
}


@pytest.fixture(params=DRAWING)
def drawing(request):
    """A small model of random weights, in evaluation mode."""
    torch.manual_seed(0)
    decoder = DRAWING[request.param]()
    if getattr(decoder, "token_dim", None) is None:
        encoder = SmallCNN(image_size=16, latent_dim=8, width=4)
    else:
        encoder = PositionedTokens(SmallTrunk(image_size=16, width=4), token_dim=8)
    return SetPredictor(encoder, decoder).eval()


def some_images(count=9):
    return torch.randint(256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_random_numbers_depend_on_neither_batch_nor_generator(drawing):
    images = some_images()
    expected = predict_in_passes(drawing, images)
    torch.manual_seed(5)
    assert torch.equal(predict_in_passes(drawing, images.flip(0)).flip(0), expected)
    assert torch.equal(predict_in_passes(drawing, images[4:5])[0], expected[4])
    assert torch.equal(predict_in_passes(drawing, images[[2] * 70])[69], expected[2])
    with torch.no_grad():  # in any batch, up to rounding
        assert torch.allclose(torch.cat([drawing(image) for image in images.split(1)]), expected, atol=1e-4)


def test_the_last_iterate_is_the_prediction(drawing):
    images = pad_to_pass(some_images())
    with torch.no_grad():
        *_, last = drawing.refine(images)
        assert torch.equal(last, drawing(images))
    assert not list(drawing.decoder.buffers())  # which earlier checkpoints would lack


def test_training_draws_afresh(drawing):
    drawing.decoder.train()
    with torch.no_grad():
        first, second = (predict_in_passes(drawing, some_images()[[0, 0]]) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


# --- other arithmetic: equal up to rounding, which changes the set of a few images ---------------------------


def compare(ours, theirs):
    """Largest difference of each image, and differences of AP by threshold."""
    difference = (ours.predicted - theirs.predicted).abs().flatten(1).amax(1)
    scores = [report(each, CLEVR, "dataset")["ap"] for each in (ours, theirs)]
    return difference, {name: abs(score - scores[1][name]) for name, score in scores[0].items()}


@slow
def test_the_compiled_descent_is_the_plain_one_up_to_rounding(model, scenes, expected):
    if not hasattr(model.decoder, "compiled"):
        pytest.skip(f"{model.name} has no descent on an objective that could be compiled")
    model.decoder.compiled = True
    try:
        difference, scores = compare(predict(model, scenes), expected)
    finally:
        model.decoder.compiled = False
    assert difference.median() < 1e-5
    assert (difference < 1e-3).double().mean() > 0.85
    assert max(scores.values()) < 0.03


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


def results(folder):
    """Weights of the last checkpoint, and metrics without times."""
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in ("seconds", "data_waiting")} for row in csv.DictReader(file)]
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"], rows


def assert_equal_runs(ours, theirs):
    (mine, my_rows), (its, its_rows) = results(ours), results(theirs)
    assert mine.keys() == its.keys()
    assert all(torch.equal(value, its[name]) for name, value in mine.items())
    assert my_rows == its_rows


def in_a_process_of_its_own(folder, data, *arguments):
    (folder / "tiny.yaml").write_text(CONFIG)
    command = [sys.executable, "-W", "ignore:This DataLoader", str(ROOT / "train.py")]
    command += ["--config", str(folder / "tiny.yaml"), "--runs", str(folder), f"--data.init_args.folder={data}"]
    # in another order of sets
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return folder / "tiny"


@slow
def test_a_seed_is_one_run_in_another_process_with_workers_that_read_the_file(tmp_path, tiny_data):
    here = run(tmp_path / "here", data=tiny_data)
    (tmp_path / "there").mkdir()
    options = ["--data.init_args.num_workers=2", "--data.init_args.in_memory=false"]
    assert_equal_runs(in_a_process_of_its_own(tmp_path / "there", tiny_data, *options), here)


@slow
def test_streamed_scenes_of_a_seed_are_one_run_whatever_the_workers(tmp_path, tiny_data):
    def training(name, *options):
        (tmp_path / name).mkdir()
        text = CONFIG.replace("datamodule.RenderedScenes", "streamed.StreamedScenes")
        config = tmp_path / name / "streamed.yaml"
        config.write_text(text.replace("train_images: 40", "scenes_per_epoch: 40"))
        given = ["--config", str(config), "--runs", str(tmp_path / name), f"--data.init_args.folder={tiny_data}"]
        command = [sys.executable, "-W", "ignore:This DataLoader", str(ROOT / "train.py"), *given, *options]
        subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        return tmp_path / name / "streamed"

    without = training("without")
    assert_equal_runs(training("two", "--data.init_args.num_workers=2"), without)
    other, _ = results(training("other", "--seed_everything=1"))
    assert any(not torch.equal(value, other[name]) for name, value in results(without)[0].items())
