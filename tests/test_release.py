"""Releases: the rounded model exactly, wherever a checkpoint is read, without paths of this machine."""

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import untrained

from setpred.checkpoint import export, load_checkpoint, read_checkpoint, save_checkpoint
from setpred.checkpoint.load import KEY
from setpred.checkpoint.release import portable
from setpred.checkpoint.weights import LARGEST_ERROR, halved, unpack
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
            stored = load_file(release)[f"model.{name}"].dtype
            assert stored == (torch.float16 if value.is_floating_point() and value.ndim > 1 else value.dtype), name
        # not to the bit: where tensors lie in memory decides on the order of additions
        torch.testing.assert_close(after, original.model(images), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-2)
    assert not torch.equal(after, before)
    assert {value.dtype for value in loaded.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("value", "half"), [(6e4, True), (7e4, False), (1e-3, True), (1e-8, False), (0.0, True), (torch.nan, False)]
)
def test_matrices_beyond_half_precision_stay(value, half, layout):
    tensor = (value * (1 + torch.rand(4, 3, 2, 2) / 16)).to(memory_format=layout)
    stored = halved(tensor)
    assert stored.dtype == (torch.float16 if half else torch.float32)
    assert stored.is_contiguous()
    assert not half or (stored.float() - tensor).norm() <= LARGEST_ERROR * tensor.norm()
    assert halved(tensor[:, 0, 0, 0]).dtype == torch.float32  # a vector of statistics


def test_commands_read_a_release_as_a_checkpoint(checkpoint, release, tmp_path):
    data = tmp_path / "scenes.h5"
    render_file(data, images=3, image_size=16, objects=(3, 4), seed=1, workers=0)
    expected, result = (evaluate([str(path), "--data", str(data)]) for path in (checkpoint, release))
    distances = [found["attributes"]["distance"]["mean"] for found in (expected, result)]
    assert distances[1] == pytest.approx(distances[0], rel=0.02)
    assert (result["epoch"], result["step"]) == (expected["epoch"], expected["step"])
    assert check([str(release), "--data", str(data), "--images", "1", "--steps", "1"])["loss"] == "HungarianLoss"
    again = tmp_path / "again.safetensors"
    assert export(release, again) == [again]  # a second rounding changes nothing
    (tensors, record), (before, old) = unpack(again), unpack(release)
    assert (tensors.keys(), record) == (before.keys(), old)
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())
    with pytest.raises(InputError, match="holds weights only and cannot be resumed"):
        cli.build(["--config", str(release.with_suffix(".yaml")), f"--resume={release}"]).resume_path()


def test_paths_of_this_machine_are_shortened(checkpoint, release):
    parts = (b"/mnt/disk", str(checkpoint.parents[1]).encode())
    assert all(part in checkpoint.with_name("config.yaml").read_bytes() for part in parts)
    for path in (release, release.with_suffix(".yaml")):
        assert not any(part in path.read_bytes() for part in parts)
    assert load_checkpoint(release).data["path"].startswith("rendered-")
    assert portable(str(cli.Path.cwd() / "data" / "x.h5")) == "data/x.h5"
    values = {"a": ["/mnt/disk/clevr", "~me/runs", "data/file.h5", None, 3], "/x": True}
    assert portable(values) == {"a": ["clevr", "runs", "data/file.h5", None, 3], "/x": True}


def test_the_released_configuration_trains_the_same_model(release, checkpoint):
    config = yaml.safe_load(release.with_suffix(".yaml").read_text())
    assert config["data"]["init_args"]["folder"] not in (None, "")
    model = read_checkpoint(checkpoint)[KEY]["model"]
    assert {part: config["model"][part] for part in model} == model
    built = cli.build(["--config", str(release.with_suffix(".yaml"))])
    assert built.model.model.state_dict().keys() == load_checkpoint(release).model.state_dict().keys()


def test_a_yaml_of_the_user_is_not_overwritten(checkpoint, tmp_path):
    out, sidecar = tmp_path / "tiny.safetensors", tmp_path / "tiny.yaml"
    sidecar.write_text("# mine\n")
    with pytest.raises(InputError, match=r"tiny\.yaml is not of an earlier release"):
        export(checkpoint, out)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    assert sidecar.read_text() == "# mine\n"
    sidecar.unlink()
    assert export(checkpoint, out) == export(checkpoint, out) == [out, sidecar]


def test_the_command_writes_nothing_on_an_error(checkpoint, tmp_path, capsys):
    out = tmp_path / "b.safetensors"
    broken = tmp_path / "run" / "best.ckpt"
    broken.parent.mkdir()
    broken.write_bytes(checkpoint.read_bytes())
    (broken.parent / "config.yaml").write_text("a: [1\n")
    for source, options, words in (
        (checkpoint, ["--out", out, "--megabytes", "0.001"], "expected at most 0.001 MB"),
        (checkpoint, ["--out", tmp_path / "b.pt"], "ends in .safetensors"),
        (checkpoint, ["--export", tmp_path / "b.onnx"], "ends in .pt2"),
        (checkpoint, [], "nothing to write"),
        (tmp_path / "none.ckpt", ["--out", out], "no checkpoint at"),
        (broken, ["--out", out], "config.yaml: expected a configuration"),
    ):
        assert main(list(map(str, (source, *options)))) == 2
        assert words in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["state_dict"].update({"loss.huge": torch.ones(3001, 3500)}), r"would have 21\.\d MB"),
        (lambda c: c[KEY]["settings"]["model"].update(clip=float("inf")), "settings hold a non-finite number"),
        (lambda c: c[KEY]["model"]["encoder"].update(class_path="my_parts.MyEncoder"), "--allow"),
    ],
)
def test_checkpoints_that_cannot_be_released(change, words, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    save_checkpoint(content, tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=words):
        export(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()
