"""evaluate: the same answer for every batch size, other data, figures, checkpoints that are not ours."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_page import Page

from setpred.checkpoint.load import KEY, load_checkpoint, save_checkpoint
from setpred.commands.data import main as data_command
from setpred.commands.evaluate import evaluate, figures
from setpred.data.dataset import open_data
from setpred.data.scenes import render_command
from setpred.decoders import IDSPN, GreedyVotes
from setpred.encoders import PositionedTokens, ResidualTrunk, Votes
from setpred.errors import InputError
from setpred.evaluation import predict
from setpred.inner import GradientDescent, Problem, Proximity, Sum, VotingEnergy
from setpred.metrics import average_precision, average_precision_per_image
from setpred.model import SetPredictor
from setpred.schema import CLEVR
from setpred.visualise import draw_own_training


def test_the_answer_does_not_depend_on_batches_or_workers(checkpoint):
    expected = evaluate([str(checkpoint)])
    result = evaluate([str(checkpoint), "--workers", "2", "--batch-size", "7"])
    assert result["ap"] == pytest.approx(expected["ap"], abs=1e-6)
    assert result["attributes"]["distance"] == pytest.approx(expected["attributes"]["distance"], abs=1e-5)
    fewer = evaluate([str(checkpoint), "--iterations", "0"])
    assert fewer["attributes"]["distance"] != expected["attributes"]["distance"]
    other = evaluate([str(checkpoint), "--seed", "1"])
    assert other["attributes"]["distance"] != expected["attributes"]["distance"]
    assert evaluate([str(checkpoint), "--seed", "0"])["ap"] == expected["ap"]


def test_json_and_table_state_what_was_evaluated(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    result = evaluate([str(checkpoint), "--json", str(out), "--protocol", "per-image", "--images", "9"])
    written = json.loads(out.read_text())
    assert list(written["ap"]) == ["inf", "1", "0.5", "0.25", "0.125", "0.0625"]
    assert all(0 <= score <= 1 for score in written["ap"].values())
    assert (written["images"], written["protocol"], written["ap"]) == (9, "per-image", result["ap"])
    assert written["data"].endswith(".h5")
    printed = capsys.readouterr().out
    assert [word for word in ("9 images", "per-image", "color") if word not in printed] == []


def test_the_page_shows_the_worst_images_and_every_step(checkpoint, tmp_path):
    evaluate([str(checkpoint), "--report", str(tmp_path / "new" / "a.html"), "--shown", "2", "--images", "9"])
    found = Page((tmp_path / "new" / "a.html").read_text())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.html"]
    data = json.loads(found.scripts[0])
    assert len(data["cases"]) == 2
    assert data["numbers"] == [0, 1, 2, 3]
    figures = [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert figures == ["precision_recall", "reliability", "confusion", "distance_errors"]
    assert any("The 2 worst of 9 images" in text for text in found.texts)


def in_turn(sets):
    """A forward pass that predicts these sets, however the few images are filled up."""

    def forward(self, images, *, iterations):
        return sets[torch.arange(len(images)).clamp(max=len(sets) - 1)]

    return forward


def test_each_protocol_is_the_function_of_its_name(checkpoint, monkeypatch):
    loaded = load_checkpoint(checkpoint)
    target = open_data(loaded.data["path"], image_size=16).__getitems__(range(12))["elements"]
    # half right, the wrong ones more confident: the two protocols rank them differently
    predicted = target[:, :4].clone()
    predicted[::2, :2, 3:18] = predicted[::2, :2, 3:18].flip(-1)
    predicted[::2, :, -1] *= 2
    monkeypatch.setattr(SetPredictor, "forward", in_turn(predicted))
    for protocol, function in (("dataset", average_precision), ("per-image", average_precision_per_image)):
        result = evaluate([str(checkpoint), "--protocol", protocol])
        assert list(result["ap"].values()) == list(function(predicted, target, schema=CLEVR).values())
    both = [each(predicted, target, schema=CLEVR) for each in (average_precision, average_precision_per_image)]
    assert both[0] != both[1]


def test_a_perfect_model_has_ap_1_and_a_distant_one_0(checkpoint, monkeypatch):
    data = open_data(load_checkpoint(checkpoint).data["path"], image_size=16)
    truth = data.__getitems__(range(len(data)))["elements"][:, :4]
    monkeypatch.setattr(SetPredictor, "forward", in_turn(truth))
    result = evaluate([str(checkpoint)])
    assert set(result["ap"].values()) | set(result["attributes"]["accuracy"].values()) == {1.0}
    monkeypatch.setattr(SetPredictor, "forward", in_turn(9 + 0 * truth))
    assert evaluate([str(checkpoint)])["ap"]["1"] == 0.0


def voting_model(objective):
    """A model of 16 tokens, untrained, whose votes are apart."""
    torch.manual_seed(0)
    trunk = ResidualTrunk(image_size=16, widths=[4, 8], blocks=0)
    descent = GradientDescent(iterations=3)
    encoder = Votes(PositionedTokens(trunk, token_dim=8), set_dim=CLEVR.set_dim, precise=3)
    start = GreedyVotes(4, CLEVR.set_dim, weights=[2.0])
    return SetPredictor(encoder, IDSPN(objective, descent, set_size=4, start=start, set_dim=CLEVR.set_dim)).eval()


def test_what_the_tokens_support_is_drawn_where_they_vote_alone(checkpoint, tmp_path, monkeypatch):
    energy = VotingEnergy(set_dim=CLEVR.set_dim, precise=3, weights=[2.0])
    loaded = load_checkpoint(checkpoint)
    data = open_data(loaded.data["path"], image_size=16)
    handed = []
    monkeypatch.setattr("setpred.commands.evaluate.write_report", lambda *_, **given: handed.append(given) or [])
    for model in (voting_model(energy), voting_model(Sum([Proximity(), energy])), loaded.model):
        predictions = predict(model, data)
        options = {"iterations": None, "device": torch.device("cpu"), "title": "", "shown": 3}
        figures(tmp_path, replace(loaded, model=model), data, predictions, **options)
    alone, summed, without = handed
    assert without["voting"] is None
    for given in (alone, summed):
        voting, iterates = given["voting"], given["iterates"]
        assert iterates.shape == (4, 3, 4, CLEVR.set_dim)
        assert voting.votes.shape == (3, 16, CLEVR.set_dim)
        torch.testing.assert_close(iterates[-1], given["predicted"][:3])
    # a token's supports sum to its mass; the energy is that of the complete objective, and falls
    images = data.__getitems__(range(3))["image"]
    model = voting_model(energy)
    features = model.encode(images)
    torch.testing.assert_close(alone["voting"].supports.sum(1), features[..., -1])
    torch.testing.assert_close(alone["voting"].votes, features[..., : CLEVR.set_dim])
    problem = Problem(features, alone["iterates"][0])
    torch.testing.assert_close(alone["voting"].energies[2], energy(alone["iterates"][2], problem))
    both = energy(summed["iterates"][2], problem) + Proximity()(summed["iterates"][2], problem)
    torch.testing.assert_close(summed["voting"].energies[2], both)
    assert (alone["voting"].energies[:3].diff(dim=0) < 0).all()


def test_the_curve_of_a_training_is_drawn_where_its_metrics_lie_beside_it(tmp_path):
    checkpoint, metrics = tmp_path / "best.ckpt", tmp_path / "metrics.csv"
    assert draw_own_training(tmp_path / "figures", checkpoint) == []
    head = "epoch,step,seconds,val_ap,val_ap_0.5,val_ap_inf,val_loss\n"
    metrics.write_text(head)
    assert draw_own_training(tmp_path / "figures", checkpoint) == []
    metrics.write_text(f"{head}0,10,60.0,0.1,0.1,0.2,0.5\n1,20,120.0,0.3,0.2,nan,0.4\n")
    (drawn,) = draw_own_training(tmp_path / "figures", checkpoint)
    assert drawn.read_bytes().startswith(b"\x89PNG")
    metrics.write_text(f"{head}0,10,soon,0.1,0.1,0.2,0.5\n")
    with pytest.raises(InputError, match=r"metrics\.csv is not as `setpred train` writes it"):
        draw_own_training(tmp_path / "figures", checkpoint)


def test_a_prepared_clevr_file_and_its_folder_give_the_same_answer(checkpoint, clevr_blender, tmp_path, capsys):
    """Images with more objects than the model has slots are scored, and it says so."""
    file, figures = tmp_path / "clevr.h5", tmp_path / "figures"
    arguments = ["prepare", str(clevr_blender), "--split", "val", "--image-size", "16", "--images", "6"]
    assert data_command([*arguments, "--workers", "1", "--out", str(file)]) == 0
    from_file = evaluate([str(checkpoint), "--data", str(file)])
    options = ["--data", str(clevr_blender), "--images", "6", "--figures", str(figures)]
    from_folder = evaluate([str(checkpoint), *options])
    assert from_file["ap"] == from_folder["ap"]
    assert from_file["images"] == from_folder["images"] == 6
    assert from_folder["without_slot"] > 0
    assert "more objects than the model has slots" in capsys.readouterr().out
    names = {path.name for path in figures.iterdir()}
    assert names >= {"predictions.png", "refinement.png", "refinement.gif", "precision_recall.png", "confusion.png"}
    assert "supports.png" not in names
    with pytest.raises(InputError, match=r"--split train: .* holds the split val"):
        evaluate([str(checkpoint), "--data", str(file), "--split", "train"])


def test_missing_data_devices_and_schemas_are_errors_that_name_the_option(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.h5"):
        evaluate([str(checkpoint), "--data", str(tmp_path / "nowhere.h5")])
    with pytest.raises(InputError, match="--device meta: cannot be used here"):
        evaluate([str(checkpoint), "--device", "meta"])
    content, path = torch.load(checkpoint, weights_only=True), tmp_path / "changed.ckpt"
    content[KEY]["schema"]["fields"][2]["classes"][0] = "pink"
    known = content[KEY]["data"]["path"]
    gone = str(Path(known).with_name("rendered-16-3to4-seed7-5.h5"))
    cases = {known: "another schema", str(tmp_path / "gone.h5"): "gone.h5.*--data", None: "--data"}
    cases |= {gone: f"or make that file: {re.escape(render_command(gone))}$"}
    for data, match in cases.items():
        content[KEY]["data"]["path"] = data
        save_checkpoint(content, path)
        with pytest.raises(InputError, match=match):
            evaluate([str(path)])
