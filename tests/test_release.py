"""Release files: the rounded model exactly, everywhere that a checkpoint is read; damaged and hostile ones refused."""

import json
import struct

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny import untrained
from torch import nn

from setpred.checkpoint.load import KEY, load_checkpoint, read_checkpoint, save_checkpoint
from setpred.checkpoint.release import export, portable
from setpred.checkpoint.weights import DIGEST, LARGEST_ERROR, RECORD, halved, pack, unpack
from setpred.commands import release as release_command
from setpred.commands import train as cli
from setpred.commands.evaluate import evaluate
from setpred.commands.gradients import check
from setpred.commands.release import main
from setpred.data.scenes import render_file
from setpred.errors import InputError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("run"), "--data.init_args.folder=/mnt/disk/scenes")


@pytest.fixture(scope="module")
def release(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("release") / "tiny.safetensors"
    assert export(checkpoint, out) == [out, out.with_suffix(".yaml")]
    return out


def repacked(release, tmp_path, change=lambda tensors, record: None):
    """A copy with its tensors and record changed, as a whole file with a checksum that fits."""
    tensors, record = unpack(release)
    change(tensors, record)
    path = tmp_path / "changed.safetensors"
    path.write_bytes(pack(tensors, record))
    return path


def test_predictions_are_those_of_the_rounded_model(checkpoint, release):
    original, loaded = load_checkpoint(checkpoint), load_checkpoint(release)
    assert (loaded.schema.to_dict(), loaded.seed) == (original.schema.to_dict(), original.seed)
    assert (loaded.epoch, loaded.step, loaded.image_size) == (original.epoch, original.step, original.image_size)
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        before, after = original.model(images), loaded.model(images)
        for value in (*original.model.parameters(), *original.model.buffers()):
            if value.is_floating_point() and value.ndim > 1:
                value.copy_(value.half())
        for name, value in original.model.state_dict().items():
            assert torch.equal(loaded.model.state_dict()[name], value), name
        # not to the bit: where tensors lie in memory decides on the order of additions
        torch.testing.assert_close(after, original.model(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-2)
    assert not torch.equal(after, before)
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}


def test_matrices_are_in_half_precision_and_all_else_is_exact(checkpoint, release):
    stored, original = load_file(release), torch.load(checkpoint, weights_only=True)["state_dict"]
    assert stored.keys() == original.keys()
    for name, value in original.items():
        if value.is_floating_point() and value.ndim > 1:
            assert stored[name].dtype == torch.float16, name
        else:
            assert torch.equal(stored[name], value), name
            assert stored[name].dtype == value.dtype, name


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("value", "half"), [(1.0, True), (6e4, True), (7e4, False), (1e-3, True), (1e-8, False), (0.0, True)]
)
def test_what_half_precision_cannot_hold_stays(value, half, layout):
    tensor = (value * (1 + torch.rand(4, 3, 2, 2) / 16)).to(memory_format=layout)
    stored = halved(tensor)
    assert stored.dtype == (torch.float16 if half else torch.float32)
    assert stored.is_contiguous()
    assert (stored.float() - tensor).norm() <= LARGEST_ERROR * tensor.norm()


def test_not_a_number_and_statistics_stay():
    assert halved(torch.full((2, 2), torch.nan)).dtype == torch.float32
    norm = nn.BatchNorm2d(2)
    norm.running_var.copy_(torch.tensor([1e6, 1e-9]))
    for value in norm.state_dict().values():
        assert torch.equal(halved(value), value)


def test_everything_that_takes_a_checkpoint_takes_a_release(checkpoint, release, tmp_path):
    data = tmp_path / "scenes.h5"
    render_file(data, images=3, image_size=16, objects=(3, 4), seed=1, workers=0)
    expected, result = (evaluate([str(path), "--data", str(data)]) for path in (checkpoint, release))
    assert result["attributes"]["distance"]["mean"] == pytest.approx(
        expected["attributes"]["distance"]["mean"], rel=0.02
    )
    assert (result["epoch"], result["step"]) == (expected["epoch"], expected["step"])
    assert check([str(release), "--data", str(data), "--images", "1", "--steps", "1"])["loss"] == "HungarianLoss"
    again = tmp_path / "again.safetensors"
    assert export(release, again) == [again]  # nothing is lost a second time
    tensors, record = unpack(again)
    assert (tensors.keys(), record) == (unpack(release)[0].keys(), unpack(release)[1])
    assert all(torch.equal(value, unpack(release)[0][name]) for name, value in tensors.items())


def test_a_release_is_not_resumed(release):
    with pytest.raises(InputError, match="holds weights only and cannot be resumed"):
        cli.build(["--config", str(release.with_suffix(".yaml")), f"--resume={release}"]).resume_path()


def test_neither_file_has_a_path_of_this_machine(checkpoint, release):
    parts = (b"/mnt/disk", str(checkpoint.parents[1]).encode())
    assert all(part in checkpoint.with_name("config.yaml").read_bytes() for part in parts)
    for path in (release, release.with_suffix(".yaml")):
        assert not any(part in path.read_bytes() for part in parts)
    assert load_checkpoint(release).data["path"].startswith("rendered-")


def test_paths_are_cut():
    here = portable(str(cli.Path.cwd() / "data" / "x.h5"))
    assert here == "data/x.h5"
    values = {"a": ["/mnt/disk/clevr", "~me/runs", "data/file.h5", None, 3], "/x": True}
    assert portable(values) == {"a": ["clevr", "runs", "data/file.h5", None, 3], "/x": True}


def test_the_configuration_beside_it_trains_the_same_model(release, checkpoint):
    config = yaml.safe_load(release.with_suffix(".yaml").read_text())
    assert config["data"]["init_args"]["folder"] not in (None, "")
    model = read_checkpoint(checkpoint)[KEY]["model"]
    assert {part: config["model"][part] for part in model} == model
    built = cli.build(["--config", str(release.with_suffix(".yaml"))])
    assert built.model.model.state_dict().keys() == load_checkpoint(release).model.state_dict().keys()


def test_a_damaged_configuration_is_a_sentence(checkpoint, tmp_path):
    alone = tmp_path / "run" / "best.ckpt"
    alone.parent.mkdir()
    alone.write_bytes(checkpoint.read_bytes())
    assert len(export(alone, tmp_path / "a.safetensors")) == 1
    (alone.parent / "config.yaml").write_text("a: [1\n")
    with pytest.raises(InputError, match=r"config\.yaml is not a configuration"):
        export(alone, tmp_path / "b.safetensors")
    assert not (tmp_path / "b.safetensors").exists()


def test_the_command_says_what_it_wrote(checkpoint, tmp_path, capsys):
    out = tmp_path / "deep" / "a.safetensors"
    assert main([str(checkpoint), "--out", str(out)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        str(out),
        str(out.with_suffix(".yaml")),
    ]
    small = tmp_path / "b.safetensors"
    assert main([str(checkpoint), "--out", str(small), "--megabytes", "0.001"]) == 2
    assert "expected at most 0.001 MB" in capsys.readouterr().err
    assert main([str(checkpoint), "--out", str(tmp_path / "b.pt")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err
    assert main([str(tmp_path / "none.ckpt"), "--out", str(small)]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert not small.exists()


def test_a_model_beyond_the_limit_is_refused(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["loss.huge"] = torch.ones(3001, 3500)  # beside the model; 21 MB in half precision
    save_checkpoint(content, tmp_path / "large.ckpt")
    with pytest.raises(InputError, match=r"would have 21\.\d MB, expected at most 20 MB"):
        export(tmp_path / "large.ckpt", tmp_path / "large.safetensors")
    assert not (tmp_path / "large.safetensors").exists()


def test_damaged_files_are_refused(release, checkpoint, tmp_path):
    whole = release.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    bad_json = whole[:8] + b"{" * header + whole[8 + header :]
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    contents = (
        *(b"", b"x", b"not a checkpoint", bytes(range(256)) * 64, checkpoint.read_bytes()),
        *(whole[:4], whole[:100], whole[: len(whole) // 2], whole[:-1], whole + b"\0"),
        *(struct.pack("<Q", 2**63) + whole[8:], struct.pack("<Q", len(whole) * 2) + whole[8:], bad_json),
        bytes(flipped),
    )
    broken = tmp_path / "broken.safetensors"
    for content in contents:
        broken.write_bytes(content)
        with pytest.raises(InputError, match="is not a checkpoint, or is damaged"):
            evaluate([str(broken)])
    with pytest.raises(InputError, match="no checkpoint at"):
        evaluate([str(tmp_path / "none.safetensors")])
    renamed = tmp_path / "renamed.ckpt"
    renamed.write_bytes(whole)
    with pytest.raises(InputError, match="is not a whole torch file"):
        evaluate([str(renamed)])


def test_offsets_outside_the_file_are_refused(release, tmp_path):
    whole = release.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    for change in ({"shape": [2**40, 2**40]}, {"data_offsets": [0, 2**62]}, {"dtype": "F4096"}, {"shape": [-1]}):
        text = json.dumps(header | {name: header[name] | change}).encode()
        path = tmp_path / "hostile.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
        with pytest.raises(InputError, match="is not a checkpoint, or is damaged"):
            load_checkpoint(path)


@pytest.mark.parametrize("record", ["{", "[" * 100_000, "[1]", "3"])
def test_a_record_that_is_no_json_object_is_refused(tmp_path, record):
    from setpred.checkpoint import weights

    tensors = {"a": torch.zeros(2)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {RECORD: record, DIGEST: weights._digest(record, tensors)})
    with pytest.raises(InputError, match="JSON"):
        load_checkpoint(path)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(InputError, match="is not a checkpoint of setpred: it lacks the record"):
            load_checkpoint(path)
    save_file({"a": torch.zeros(2)}, path, {RECORD: "{}"})
    with pytest.raises(InputError, match="checksum"):
        load_checkpoint(path)
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, path, {RECORD: "{}"})
    with pytest.raises(InputError, match=r"holds torch\.complex64"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("class", "not on the list of allowed classes"),
        ("shape", "do not fit"),
        ("missing", "do not fit"),
        ("version", "checkpoint format 99"),
        ("record", "lacks the record"),
        ("epoch", "record is damaged"),
        ("data", "record is damaged"),
        ("model", "does not say how its model is built"),
    ],
)
def test_releases_that_do_not_fit_are_refused(release, tmp_path, what, message):
    def change(tensors, record):
        if what == "class":
            record[KEY]["model"]["encoder"]["class_path"] = "os.system"
        elif what == "shape":
            tensors["model.encoder.head.weight"] = torch.zeros(3)
        elif what == "missing":
            del tensors["model.encoder.head.weight"]
        elif what == "version":
            record[KEY]["version"] = 99
        elif what == "record":
            record[KEY] = [1]
        elif what == "epoch":
            del record["epoch"]
        elif what == "data":
            record[KEY]["data"] = None
        else:
            record[KEY]["model"] = None

    with pytest.raises(InputError, match=message):
        load_checkpoint(repacked(release, tmp_path, change))


def test_a_yaml_of_somebody_else_is_not_overwritten(checkpoint, tmp_path):
    out, beside = tmp_path / "tiny.safetensors", tmp_path / "tiny.yaml"
    beside.write_text("# mine\n")
    with pytest.raises(InputError, match=r"tiny\.yaml is not of an earlier release"):
        export(checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    assert beside.read_text() == "# mine\n"
    beside.unlink()
    assert export(checkpoint, out) == export(checkpoint, out) == [out, beside]


def test_an_export_that_fails_leaves_nothing_or_says_what(checkpoint, tmp_path, monkeypatch, capsys):
    out, taken = tmp_path / "tiny.safetensors", tmp_path / "taken.pt2"
    taken.mkdir()
    arguments = [str(checkpoint), "--out", str(out), "--export", str(taken)]

    def fails(loaded):
        raise InputError("cannot export")

    monkeypatch.setattr(release_command, "export_program", fails)
    assert main(arguments) == 2
    assert not out.exists()
    monkeypatch.setattr(release_command, "export_program", lambda loaded: b"program")
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "a folder has this name" in printed
    assert f"{out} was written" in printed
    assert out.exists()


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_settings_that_are_not_finite_are_a_sentence(checkpoint, tmp_path, number):
    content = torch.load(checkpoint, weights_only=True)
    content[KEY]["settings"]["model"]["clip"] = number
    save_checkpoint(content, tmp_path / "endless.ckpt")
    with pytest.raises(InputError, match="settings hold a number that is not finite"):
        export(tmp_path / "endless.ckpt", tmp_path / "endless.safetensors")


def test_own_parts_need_a_name(release, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content[KEY]["model"]["encoder"]["class_path"] = "my_parts.MyEncoder"
    save_checkpoint(content, tmp_path / "own.ckpt")
    with pytest.raises(InputError, match="--allow"):
        export(tmp_path / "own.ckpt", tmp_path / "own.safetensors")
