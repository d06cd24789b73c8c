"""Untrusted configurations: none runs code, reads URLs, or takes the machine's time or memory."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from jsonargparse._common import parsing_settings
from tiny import CONFIG, untrained

from setpred.checkpoint import load_checkpoint, untrusted
from setpred.commands.compare import digest
from setpred.commands.config import allowed_paths
from setpred.commands.linking import fill_sizes
from setpred.commands.train import build, main
from setpred.errors import InputError
from setpred.schema import CLEVR

# importing it, or calling anything of it, creates the file that the environment names
PAYLOAD = """
import os
from pathlib import Path
from lightning.pytorch import Callback, LightningDataModule
from torch import nn

def run(*_, **__):
    Path(os.environ["CANARY"]).touch()

run()

class Encoder(nn.Module):
    in_dim = image_size = 16
    def __init__(self, size: int = 16):
        super().__init__()

class Watch(Callback): ...
class Data(LightningDataModule): ...
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that exists once the module `payload` has been imported."""
    (tmp_path / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    yield tmp_path / "canary"
    sys.modules.pop("payload", None)


def config(tmp_path, name="hostile.yaml", **changes) -> Path:
    """The tiny configuration with other values at `section__key`."""
    content = yaml.safe_load(CONFIG)
    for where, value in changes.items():
        *keys, last = where.split("__")
        inside = content
        for key in keys:
            inside = inside[key]
        inside[last] = value
    path = tmp_path / name
    path.write_text(yaml.safe_dump(content).replace("CANARY", str(tmp_path / "canary")))
    return path


def spec(name, **arguments):
    return {"class_path": name, "init_args": arguments}


AVERAGING = "lightning.pytorch.callbacks.StochasticWeightAveraging"
CALLBACKS = "lightning.pytorch.callbacks"
PLACES = [  # where a configuration can name a class, in both forms
    {"model__encoder": spec("payload.Encoder")},
    {"model__decoder__init_args__objective__init_args__set_encoder": spec("payload.Encoder")},
    {"model__decoder__init_args__descent": "payload.Encoder"},
    {"model__loss": "payload.Encoder"},
    {"model__metric": spec("payload.Encoder")},
    {"model__schedule": "payload.Encoder"},
    {"data": "payload.Data"},
    {"trainer__callbacks": spec("payload.Watch")},
    {"trainer__callbacks": ["payload.Watch"]},
    {"trainer__logger": spec("payload.Encoder")},
    {"trainer__strategy": spec("payload.Encoder")},
    {"trainer__profiler": spec("payload.Encoder")},
    {"trainer__plugins": [spec("payload.Encoder")]},
    {"data": "payload.run"},
    {"model__metric": spec("setpred.metrics.AveragePrecision", protocol="payload.run")},
    {"model__metric": spec("setpred.metrics.AveragePrecision", protocol=spec("payload.Encoder"))},
    {"trainer__callbacks": [spec(AVERAGING, swa_lrs=0.1, avg_fn="payload.run")]},
    {"model__encoder": "setpred.data.datamodule.payload.Encoder"},  # through a module of ours
    # installed already, so harmful without an import
    {"data": spec("os.system", command="touch CANARY")},
    {"trainer__callbacks": [spec(f"{CALLBACKS}.LambdaCallback", on_fit_start="os.abort")]},
    {"trainer__callbacks": ["LambdaCallback"]},
    {"data": spec("setpred.data.datamodule.RenderedScenes.load_from_checkpoint", checkpoint_path="CANARY")},
    {"model__encoder": spec("torch.load", f="CANARY", weights_only=False)},
    {"model__encoder": spec("setpred.files.write_atomically", path="CANARY", content="")},
    {"model__encoder": spec("setpred.encoders.resnet.torch.load", f="CANARY")},
    {"data": spec("jsonargparse.set_parsing_settings", import_path_allowlist=["os"])},
]


def test_filling_sizes_imports_nothing(canary):
    """A part may take values of any type, which the parser does not look into."""
    hostile = Namespace(class_path="payload.Encoder", init_args=Namespace(anything=1))
    given = Namespace(class_path="setpred.encoders.Votes", init_args=Namespace(tokens=hostile, set_dim=None))
    fill_sizes(Namespace(model=Namespace(encoder=hostile, decoder=given, schema="clevr"), data=hostile))
    assert not canary.exists()
    assert given.init_args.set_dim == CLEVR.set_dim


@pytest.mark.parametrize("changes", PLACES, ids=lambda changes: f"{next(iter(changes))}")
def test_classes_outside_the_list_are_rejected_before_their_import(changes, canary, tmp_path):
    path = config(tmp_path, **changes)
    with pytest.raises(InputError, match="--allow"):
        build(["--config", str(path)])
    assert not canary.exists()


def test_files_and_keys_of_a_configuration_cannot_allow_more(canary, tmp_path):
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(spec("payload.Encoder")))
    part = str(tmp_path / "part.yaml")
    for arguments in (
        ["--config", str(config(tmp_path, model__encoder=part))],
        ["--config", str(config(tmp_path, "ours.yaml")), f"--model.encoder={part}"],
    ):
        with pytest.raises(InputError, match=r"payload\.Encoder is no public part.*--allow payload\.Encoder"):
            build(arguments)
    with pytest.raises((InputError, SystemExit)):
        build(["--config", str(config(tmp_path, model__encoder="payload.Encoder", allow=["payload.Encoder"]))])
    assert not canary.exists()


@pytest.mark.parametrize("key", ["config", "resume"])
def test_keys_that_name_files_do_not_load_them(key, canary, tmp_path):
    more = config(tmp_path, "more.yaml", model__encoder="payload.Encoder")
    (tmp_path / "first.yaml").write_text(CONFIG + f"{key}: {more}\n")
    with pytest.raises((InputError, SystemExit)):
        build(["--config", str(tmp_path / "first.yaml")]).resume_path()
    assert not canary.exists()


def test_the_user_allows_classes_by_name_for_one_run(canary, tmp_path, monkeypatch):
    path = config(tmp_path, trainer__callbacks=["payload.Watch"])
    cli = build(["--config", str(path), "--allow", "payload.Watch"])
    assert any(type(each).__name__ == "Watch" for each in cli.trainer.callbacks)
    assert canary.exists()  # so the payload does run where it is allowed
    with pytest.raises(InputError, match="cannot import"):
        build(["--config", str(path), "--allow", "payload.Nope"])
    other = config(tmp_path, "other.yaml", data="payload.Data")
    for arguments in (["--config", str(other), "--allow=payload.Watch"], ["--config", str(path)]):
        with pytest.raises(InputError, match=r"payload\.\w+ is no public part"):
            build(arguments)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(other)])
    assert main() == 2


def test_class_paths_on_the_command_line_are_allowed(canary, tmp_path):
    for value in ("payload.Watch", json.dumps({"class_path": "payload.Watch"})):
        cli = build(["--config", str(config(tmp_path)), f"--trainer.callbacks+={value}"])
        assert any(type(each).__name__ == "Watch" for each in cli.trainer.callbacks)


def test_mistyped_class_paths_are_reported_as_such(canary, tmp_path):
    for path in ("setpred.decoders.Nope", "payload.run", "no_such_package.Encoder"):
        with pytest.raises(InputError, match=f"{path} is no public part.*correct a mistyped path.*--allow {path}"):
            build(["--config", str(config(tmp_path)), f"--model.decoder.class_path={path}"])
    assert not canary.exists()


def test_settings_of_other_parsers_are_restored(tmp_path):
    before = dict(parsing_settings)
    for changes in ({}, {"model__encoder": "payload.Encoder"}):
        with nullcontext() if not changes else pytest.raises(InputError):
            build(["--config", str(config(tmp_path, **changes))])
        assert parsing_settings == before


LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
UNREADABLE = "expected a configuration"
TEXTS = {
    "a tag that calls": ("model: !!python/object/apply:os.system ['touch CANARY']\n", "python/object"),
    "a tag that makes": ("model: !!python/object/new:payload.Encoder {}\n", "python/object"),
    "a tag that names": ("model: !!python/name:payload.run\n", "python/name"),
    "an unknown tag": ("name: !own x\n", "!own"),
    "billion laughs": (LAUGHS, "at most 2,000 values"),
    "an alias in itself": ("model: &a {encoder: *a}\n", UNREADABLE),
    "deep": ("model: " + "[" * 1000 + "]" * 1000, UNREADABLE),
    "long": ("name: x\n# " + "y" * untrusted.LARGEST_YAML, "at most 100,000 characters"),
    "many": ("name: [" + "1, " * 5000 + "]", "at most 2,000 values"),
    "a long number": ("name: 1" + ":59" * 20_000, "64 bits"),
    "a number of many digits": ("name: [" + "9" * 4_400 + "]", UNREADABLE),
    "no date": ("name: 2026-99-99", UNREADABLE),
    "twice": (CONFIG + "trainer: {max_epochs: 1}\n", "duplicate key 'trainer'"),
    "no text": (b"\xff\xfe\x00\x00name: x", UNREADABLE),
    "not closed": ("model: {", UNREADABLE),
    "no mapping": ("- x", "with model: and data:"),
    "empty": ("", "with model: and data:"),
}


@pytest.mark.parametrize(("text", "words"), TEXTS.values(), ids=TEXTS)
def test_yaml_is_plain_and_small(text, words, canary, tmp_path):
    path = tmp_path / "bad.yaml"
    if isinstance(text, str):
        text = text.replace("CANARY", str(canary)).encode()
    path.write_bytes(text)
    for read in (lambda: build(["--config", str(path)]), lambda: digest(path)):
        with pytest.raises(InputError, match=words) as caught:
            read()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not canary.exists()


def test_files_of_values_and_long_values_are_reported_shortly(canary, tmp_path):
    part = tmp_path / "part.yaml"
    duplicate = "class_path: payload.Encoder\nclass_path: setpred.encoders.SmallCNN\n"
    for text in (LAUGHS, "[" * 1000, "!!python/name:payload.run", duplicate):
        part.write_text(text)
        with pytest.raises(InputError) as stopped:
            build(["--config", str(config(tmp_path, model__encoder=str(part)))])
        assert len(str(stopped.value)) < 1000
    for value in ("x" * 4000, ["x" * 40] * 400):
        with pytest.raises(InputError) as stopped:
            build(["--config", str(config(tmp_path, data=value))])
        assert 0 < len(str(stopped.value)) < 1000
    assert not canary.exists()


def test_a_model_beyond_the_memory_is_not_built(tmp_path):
    for width, words in ((2**16, "GB of memory"), (2**40, "at most 65536"), (-16, "cannot be built")):
        encoder = spec("setpred.encoders.SmallCNN", image_size=16, latent_dim=2**16 - 1, width=width)
        with pytest.raises(InputError, match=words):
            build(["--config", str(config(tmp_path, model__encoder=encoder))])


def test_aliases_are_read_and_urls_and_the_environment_are_not(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("PL_TRAINER__MAX_EPOCHS", "77")
    path = tmp_path / "aliases.yaml"
    path.write_text(
        CONFIG.replace("max_epochs: 2", "max_epochs: &n 2, check_val_every_n_epoch: *n") + "name: ${oc.env:HOME}\n"
    )
    cli = build(["--config", str(path)])
    assert cli.trainer.check_val_every_n_epoch == cli.trainer.max_epochs == 2
    assert cli.config.name == "${oc.env:HOME}"
    monkeypatch.setattr(fsspec, "open", lambda *_, **__: pytest.fail("a URL was read"))
    for url in ("memory://part.yaml", "https://localhost/part.yaml", "simplecache::http://localhost/p.yaml"):
        with pytest.raises((InputError, SystemExit)):
            build(["--config", str(config(tmp_path, model__encoder=url))])


def test_the_list_has_classes_of_plain_arguments():
    found = allowed_paths()
    assert {"setpred.encoders.ResNet", "setpred.data.toy.QM9", "torch.nn.Linear"} <= found
    assert {"lightning.pytorch.callbacks.EarlyStopping", "setpred.training.FASet"} <= found
    assert {path.split(".")[0] for path in found} == {"setpred", "torch", "lightning"}
    assert not [path for path in found if "Lambda" in path or path.split(".")[-1] in ("Module", "load", "Callback")]


def test_a_layer_of_torch_can_be_configured_and_loaded(tmp_path):
    parts = {"encoder": spec("torch.nn.Flatten"), "decoder": spec("setpred.decoders.MLPDecoder", latent_dim=768)}
    path = untrained(tmp_path, *(f"--model.{name}={json.dumps(part)}" for name, part in parts.items()))
    assert type(load_checkpoint(path).model.encoder).__name__ == "Flatten"
