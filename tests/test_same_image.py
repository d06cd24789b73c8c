"""One image has one answer: in every format, with hidden colours, turned, as a strip; and names of any bytes work."""

import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from tiny import CONFIG

from setpred import CLEVR
from setpred.checkpoint import save_model
from setpred.checkpoint.load import KEY, read_checkpoint
from setpred.commands.compare import digest
from setpred.commands.evaluate import evaluate
from setpred.commands.predict import run as predict
from setpred.commands.train import build, data_digests, train
from setpred.data.images import load_image, pixel_size
from setpred.data.scenes import render_file
from setpred.decoders import MLPDecoder
from setpred.encoders import SmallCNN
from setpred.model import SetPredictor
from setpred.visualise import report

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
ALPHA = (RNG.random((20, 30)) > 0.5).astype(np.uint8) * 255


def pictures(folder: Path):
    """The same visible image, with other colours under its transparent pixels, and in other formats."""
    for number, hidden in enumerate((COLOURS, 255 - COLOURS, 0 * COLOURS)):
        image = Image.fromarray(np.where(ALPHA[..., None] > 0, COLOURS, hidden))
        image.putalpha(Image.fromarray(ALPHA))
        for name, options in ((f"{number}.png", {}), (f"{number}.webp", {"lossless": True}), (f"{number}.tif", {})):
            image.save(folder / name, **options)
    Image.fromarray(COLOURS * (ALPHA[..., None] > 0)).save(folder / "flat.bmp")
    return sorted(folder.iterdir())


@pytest.mark.parametrize("padded", [False, True])
def test_hidden_colours_and_formats_do_not_matter(padded, tmp_path):
    first, *others = (load_image(path, 16, padded=padded) for path in pictures(tmp_path))
    assert len(others) == 9
    assert all(np.array_equal(first, each) for each in others)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_the_size_of_an_image_is_that_of_its_upright_pixels(suffix, tmp_path):
    for orientation in range(1, 9):
        note = Image.Exif()
        note[ExifTags.Base.Orientation] = orientation
        Image.fromarray(COLOURS).save(tmp_path / f"a.{suffix}", exif=note)
        assert pixel_size(tmp_path / f"a.{suffix}") == ((30, 20) if orientation < 5 else (20, 30))


def test_a_strip_takes_little_memory_and_keeps_its_place(tmp_path):
    strip = np.zeros((20, 20000, 3), np.uint8)
    strip[:, :10000] = 200
    Image.fromarray(strip).save(tmp_path / "strip.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = load_image(tmp_path / "strip.png", 64, padded=True)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB; its square has 1.2 GB
    assert (found[0, :30] > 0).all()
    assert not found[1:].any()
    assert not found[0, 34:].any()


def test_names_of_any_bytes_work_in_every_command(tmp_path, monkeypatch):
    for drawing in ("predictions", "refinement_film", "refinement_strip", "confusion", "distance_errors"):
        monkeypatch.setattr(report, f"draw_{drawing}", lambda path, *_, **__: path)  # slow, with the same heading
    folder = tmp_path / (name := 'it\'s "quoted" in\ntwo lines, каталог \udcff\udce9')
    own = folder / f"{name}.ckpt"
    decoder = MLPDecoder(latent_dim=8, hidden_dim=8, set_size=4, set_dim=CLEVR.set_dim)
    save_model(own, SetPredictor(SmallCNN(image_size=16, latent_dim=8, width=4), decoder), CLEVR)
    Image.fromarray(COLOURS).save(folder / f"{name}.png")
    predict([str(own), str(folder), "--out", str(folder / "p.json"), "--figures", str(folder / "f")])
    assert len(list((folder / "f").iterdir())) == 1
    data = folder / f"{name}.h5"
    render_file(data, images=2, image_size=16, objects=(3, 4))
    evaluate([str(own), "--data", str(data), "--figures", str(folder / "e"), "--json", str(folder / "e.json")])
    assert (folder / "e" / "precision_recall.png").is_file()


def test_home_is_expanded_in_configurations(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    config = CONFIG.replace("data:\n", 'runs: ~/runs\nname: "~"\ninit: ~/a.ckpt\ndata:\n')
    (tmp_path / "c.yaml").write_text(config)
    cli = build(["--config", "c.yaml", "--trainer.logger=false"])
    assert cli.config.runs == str(tmp_path / "home/runs")
    assert cli.config.init == str(tmp_path / "home/a.ckpt")


def test_a_replaced_data_file_is_noticed(tmp_path, capsys):
    """By a resumed training, and by a comparison, which would mix two data sets in one table."""
    (tmp_path / "val").mkdir()
    for name, seed in (("train", 0), ("val/val", 1)):
        render_file(tmp_path / f"{name}.h5", images=8, image_size=16, objects=(3, 4), seed=seed)
    module = {"class_path": "setpred.data.datamodule.SetDataModule"}
    model = CONFIG.split("data:\n")[0] + "trainer: {max_epochs: 1, accelerator: cpu}\n"
    (tmp_path / "c.yaml").write_text(model)
    options = ["--config", str(tmp_path / "c.yaml"), "--runs", str(tmp_path), "--name", "r", "--trainer.logger=false"]
    options += [f"--data={module['class_path']}", f"--data.init_args.train={tmp_path}/train.h5"]
    options += [
        f"--data.init_args.val={tmp_path}/val/val.h5",
        "--data.init_args.batch_size=4",
        "--data.init_args.set_size=4",
    ]
    train(options)
    before = read_checkpoint(tmp_path / "r" / "last.ckpt")[KEY]["settings"]["content"]
    again = [*options, "--resume", "last"]
    cli = build(again)
    first = digest(tmp_path / "c.yaml", data_digests(cli.datamodule))
    cli.resume_path()
    assert "content" not in capsys.readouterr().out
    render_file(tmp_path / "train.h5", images=8, image_size=16, objects=(3, 4), seed=7, force=True)
    cli = build(again)
    cli.resume_path()
    assert f"content.train: {before['train']} in the checkpoint against " in capsys.readouterr().out
    assert digest(tmp_path / "c.yaml", data_digests(cli.datamodule)) != first
