"""evaluate: the same answer for every batch size, other data, figures, checkpoints that are not ours."""

import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import untrained

from setpred.checkpoint.load import KEY, build, load_checkpoint, save_checkpoint
from setpred.commands.data import main as data_command
from setpred.commands.evaluate import evaluate, figures
from setpred.data.dataset import open_data
from setpred.decoders import IDSPN, GreedyVotes
from setpred.encoders import PositionedTokens, ResidualTrunk, Votes
from setpred.errors import InputError
from setpred.evaluation import predict
from setpred.inner import GradientDescent, Problem, Proximity, Sum, VotingEnergy
from setpred.metrics import average_precision, average_precision_per_image
from setpred.model import SetPredictor
from setpred.schema import CLEVR
from setpred.visualise import draw_own_training


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_data):
    """A model that was not trained, and the data on which it would have been validated."""
    return untrained(tmp_path_factory.mktemp("run"), data=tiny_data)


def prepared(root, path, *options):
    """A file of the validation split of a CLEVR folder."""
    arguments = ["prepare", str(root), "--split", "val", "--image-size", "16", "--workers", "1", "--out", str(path)]
    assert data_command([*arguments, *options]) == 0
    return str(path)


def changed(checkpoint, tmp_path, change):
    """A copy of the checkpoint with its content changed."""
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    path = tmp_path / "changed.ckpt"
    save_checkpoint(content, path)
    return path


def test_the_answer_does_not_depend_on_batches_or_workers(checkpoint):
    expected = evaluate([str(checkpoint)])
    for options in (["--batch-size", "1"], ["--batch-size", "7"], ["--workers", "2"]):
        result = evaluate([str(checkpoint), *options])
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
        assert list(result["ap"].values()) == list(function(predicted, target).values())
    assert average_precision(predicted, target) != average_precision_per_image(predicted, target)


def test_a_perfect_model_has_ap_1_and_a_distant_one_0(checkpoint, monkeypatch):
    data = open_data(load_checkpoint(checkpoint).data["path"], image_size=16)
    truth = data.__getitems__(range(len(data)))["elements"][:, :4]
    monkeypatch.setattr(SetPredictor, "forward", in_turn(truth))
    result = evaluate([str(checkpoint)])
    assert set(result["ap"].values()) | set(result["attributes"]["accuracy"].values()) == {1.0}
    monkeypatch.setattr(SetPredictor, "forward", in_turn(9 + 0 * truth))
    assert evaluate([str(checkpoint)])["ap"]["1"] == 0.0


def test_real_clevr_folder_and_pictures(checkpoint, clevr_blender, tmp_path, capsys):
    """Images with more objects than the model has slots are scored, and it says so."""
    result = evaluate(
        [str(checkpoint), "--data", str(clevr_blender), "--images", "6", "--figures", str(tmp_path / "figures")]
    )
    assert result["images"] == 6
    assert result["without_slot"] > 0
    assert "more objects than the model has slots" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names >= {"predictions.png", "refinement.png", "refinement.gif", "precision_recall.png", "confusion.png"}
    assert "supports.png" not in names
    assert not [name for name in names if "partial" in name]


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
    with pytest.raises(InputError, match=r"metrics\.csv is not as train.py writes it"):
        draw_own_training(tmp_path / "figures", checkpoint)


def test_a_prepared_clevr_file_and_its_folder_give_the_same_answer(checkpoint, clevr_blender, tmp_path):
    file = prepared(clevr_blender, tmp_path / "clevr.h5", "--images", "8")
    from_file = evaluate([str(checkpoint), "--data", file])
    from_folder = evaluate([str(checkpoint), "--data", str(clevr_blender), "--images", "8"])
    assert from_file["ap"] == from_folder["ap"]
    assert from_file["images"] == 8
    with pytest.raises(InputError, match=r"--split train: .* holds the split val"):
        evaluate([str(checkpoint), "--data", file, "--split", "train"])
    other = prepared(clevr_blender, tmp_path / "other.h5", "--images", "2", "--image-size", "32")
    with pytest.raises(InputError, match="expected images of 16x16"):
        evaluate([str(checkpoint), "--data", other])


def test_missing_data_and_devices_are_errors_that_name_the_option(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.h5"):
        evaluate([str(checkpoint), "--data", str(tmp_path / "nowhere.h5")])
    for path, match in ((str(tmp_path / "gone.h5"), r"cannot be read .*gone\.h5.*give --data"), (None, "give --data")):
        with pytest.raises(InputError, match=match):
            evaluate([str(changed(checkpoint, tmp_path, lambda content: content[KEY]["data"].update(path=path)))])  # noqa: B023
    with pytest.raises(InputError, match="--device meta: cannot be used here"):
        evaluate([str(checkpoint), "--device", "meta"])


# --- checkpoints that are not ours ------------------------------------------------------------------------------------


def test_a_missing_or_foreign_checkpoint_is_a_sentence(checkpoint, tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        evaluate([str(tmp_path / "none.ckpt")])
    whole, path = checkpoint.read_bytes(), tmp_path / "damaged.ckpt"
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2], whole[:-100]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="is not a checkpoint, or is damaged"):
            evaluate([str(path)])
    flipped = bytearray(whole)
    with zipfile.ZipFile(checkpoint) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    flipped[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="checksum"):
        evaluate([str(path)])
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="not a checkpoint of setpred"):
        evaluate([str(path)])


@pytest.mark.parametrize(
    "path", ["os.system", "subprocess.Popen", "setpred.commands.train.TrainCLI", "setpred.encoders.os", 7]
)
def test_class_paths_outside_the_list_are_errors(checkpoint, tmp_path, path):
    def change(content):
        content[KEY]["model"]["encoder"]["class_path"] = path

    with pytest.raises(InputError, match="not on the list of allowed classes"):
        load_checkpoint(changed(checkpoint, tmp_path, change))
    strings = {"projection": "os.system", "list": ["os.system", {"a": path}]}
    assert build(strings, {}) == strings  # which are never imported


def test_own_parts_are_allowed_by_name(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "from torch import nn\n"
        "class MyEncoder(nn.Sequential):\n"
        "    def __init__(self, *, size):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(3 * size * size, 16))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def change(content):
        content[KEY]["model"]["encoder"] = {"class_path": "my_parts.MyEncoder", "init_args": {"size": 16}}
        for name in [name for name in content["state_dict"] if name.startswith("model.encoder")]:
            del content["state_dict"][name]
        content["state_dict"] |= {
            "model.encoder.1.weight": torch.zeros(16, 768),
            "model.encoder.1.bias": torch.ones(16),
        }

    path = changed(checkpoint, tmp_path, change)
    with pytest.raises(InputError, match="--allow"):
        load_checkpoint(path)
    assert type(load_checkpoint(path, allow=["my_parts.MyEncoder"]).model.encoder).__name__ == "MyEncoder"
    assert evaluate([str(path), "--allow", "my_parts.MyEncoder"])["images"] == 12
    with pytest.raises(InputError, match="cannot import"):
        load_checkpoint(path, allow=["my_parts.Nope"])


def at(*keys, value):
    """A change that sets a value within a checkpoint's record; None removes it."""

    def change(content):
        inside = content
        for key in keys[:-1]:
            inside = inside[key]
        inside.pop(keys[-1]) if value is None else inside.__setitem__(keys[-1], value)

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda content: content[KEY]["schema"]["fields"][2]["classes"].__setitem__(0, "pink"), "another schema"),
        *((at(KEY, name, value=[1]), ".") for name in ("seed", "data", "schema")),
        (at("state_dict", value=[1]), "."),
        (at("state_dict", "model.encoder.head.weight", value=None), "do not fit"),
        (at("state_dict", "model.encoder.head.weight", value=torch.zeros(3)), "do not fit"),
        (at(KEY, "model", "decoder", "init_args", "nonsense", value=1), "cannot be built"),
        (at(KEY, "version", value=99), "checkpoint format 99"),
    ],
)
def test_checkpoints_that_do_not_fit_are_errors(change, match, checkpoint, tmp_path):
    with pytest.raises(InputError, match=match):
        evaluate([str(changed(checkpoint, tmp_path, change))])


def test_the_model_is_the_one_that_was_trained(checkpoint):
    model = load_checkpoint(checkpoint).model
    assert isinstance(model.decoder, IDSPN)
    assert (model.decoder.set_size, model.decoder.descent.iterations) == (4, 3)
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), weights[f"model.{name}"].numpy())
