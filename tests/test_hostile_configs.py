"""Configurations from strangers: none runs code, reads addresses, or takes the machine's time or memory."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from tiny import CONFIG, untrained

from setpred.checkpoint import untrusted
from setpred.checkpoint.load import load_checkpoint
from setpred.checkpoint.release import portable
from setpred.commands import config as configuration
from setpred.commands.compare import digest
from setpred.commands.config import allowed_paths, guarded
from setpred.commands.train import build, main
from setpred.errors import InputError

# Whoever imports it, or calls anything of it, leaves the file that the environment names.
PAYLOAD = """
import os
from pathlib import Path
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
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
class Log(Logger): ...
class Profile(Profiler): ...
class Strategic(Strategy): ...
"""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that is there once the module `payload` has been imported."""
    (tmp_path / "payload.py").write_text(PAYLOAD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    yield tmp_path / "canary"
    sys.modules.pop("payload", None)


def config(tmp_path, name="hostile.yaml", **changes) -> Path:
    """The tiny configuration with `section__key` set to something else."""
    content = yaml.safe_load(CONFIG)
    for where, value in changes.items():
        *keys, last = where.split("__")
        inside = content
        for key in keys:
            inside = inside[key]
        inside[last] = value
    path = tmp_path / name
    path.write_text(yaml.safe_dump(content))
    return path


def spec(name, **arguments):
    return {"class_path": name, "init_args": arguments}


RATE = "lightning.pytorch.callbacks.StochasticWeightAveraging"
PLACES = {
    "encoder": {"model__encoder": spec("payload.Encoder")},
    "encoder in short": {"model__encoder": "payload.Encoder"},
    "nested": {"model__decoder__init_args__objective__init_args__set_encoder": spec("payload.Encoder")},
    "nested in short": {"model__decoder__init_args__descent": "payload.Encoder"},
    "loss": {"model__loss": "payload.Encoder"},
    "metric": {"model__metric": spec("payload.Encoder")},
    "schedule": {"model__schedule": "payload.Encoder"},
    "data": {"data": spec("payload.Data")},
    "data in short": {"data": "payload.Data"},
    "callback": {"trainer__callbacks": spec("payload.Watch")},
    "callbacks": {"trainer__callbacks": [spec("payload.Watch")]},
    "callbacks in short": {"trainer__callbacks": ["payload.Watch"]},
    "logger": {"trainer__logger": spec("payload.Log")},
    "loggers": {"trainer__logger": ["payload.Log"]},
    "strategy": {"trainer__strategy": spec("payload.Strategic")},
    "profiler": {"trainer__profiler": spec("payload.Profile")},
    "plugins": {"trainer__plugins": [spec("payload.Encoder")]},
    "function": {"data": "payload.run"},
    "callable": {"model__metric": spec("setpred.metrics.AveragePrecision", protocol="payload.run")},
    "callable of a callback": {"trainer__callbacks": [spec(RATE, swa_lrs=0.1, avg_fn="payload.run")]},
    "callable class": {"model__metric": spec("setpred.metrics.AveragePrecision", protocol=spec("payload.Encoder"))},
    "through a module of ours": {"model__encoder": "setpred.data.datamodule.payload.Encoder"},
}


@pytest.mark.parametrize("changes", PLACES.values(), ids=PLACES)
def test_what_is_not_on_the_list_is_refused_before_it_is_imported(changes, canary, tmp_path):
    path = config(tmp_path, **changes)
    with pytest.raises(InputError) as refused:
        build(["--config", str(path)])
    assert "payload" in str(refused.value)
    assert str(path) in str(refused.value)
    assert "--allow" in str(refused.value)
    assert not canary.exists()


# on the machine already: no import is needed to do harm with them
ON_THE_MACHINE = {
    "os.system": {"data": spec("os.system", command="touch CANARY")},
    "subprocess": {"model__encoder": spec("subprocess.Popen", args=["touch", "CANARY"])},
    "lambdas": {
        "trainer__callbacks": [spec("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.abort")],
    },
    "lambdas by name": {"trainer__callbacks": ["LambdaCallback"]},
    "a pickle by a loader": {
        "data": spec("setpred.data.datamodule.RenderedScenes.load_from_checkpoint", checkpoint_path="CANARY")
    },
    "a loader of Lightning's": {
        "data": spec("lightning.pytorch.LightningDataModule.load_from_checkpoint", checkpoint_path="CANARY")
    },
    "torch.load": {"model__encoder": spec("torch.load", f="CANARY", weights_only=False)},
    "torch.hub": {"model__encoder": spec("torch.hub.load", repo_or_dir="stranger/repo", model="m")},
    "our own functions": {"model__encoder": spec("setpred.files.write_atomically", path="CANARY", content="")},
    "names through ours": {"model__encoder": spec("setpred.encoders.resnet.torch.load", f="CANARY")},
    "jsonargparse": {"data": spec("jsonargparse.set_parsing_settings", import_path_allowlist=["os"])},
}


@pytest.mark.parametrize("changes", ON_THE_MACHINE.values(), ids=ON_THE_MACHINE)
def test_functions_and_classes_that_are_there_are_refused(changes, tmp_path):
    witness = tmp_path / "canary"
    text = config(tmp_path, **changes).read_text().replace("CANARY", str(witness))
    path = tmp_path / "there.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match="--allow"):
        build(["--config", str(path)])
    assert not witness.exists()


def test_a_file_that_a_value_points_to_is_looked_into(canary, tmp_path):
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(spec("payload.Encoder")))
    path = config(tmp_path, model__encoder=str(tmp_path / "part.yaml"))
    with pytest.raises(InputError, match=r"asks for payload\.Encoder.*--allow payload\.Encoder"):
        build(["--config", str(path)])
    # also if the command line points there: what it says is still a file's
    with pytest.raises(InputError, match="asks for payload"):
        build(["--config", str(config(tmp_path)), f"--model.encoder={tmp_path / 'part.yaml'}"])
    assert not canary.exists()


def test_a_file_cannot_allow_itself(canary, tmp_path):
    path = config(tmp_path, model__encoder="payload.Encoder", allow=["payload.Encoder"])
    with pytest.raises((InputError, SystemExit)):
        build(["--config", str(path)])
    assert not canary.exists()


@pytest.mark.parametrize("key", ["config", "resume", "name"])
def test_other_keys_lead_no_further(key, canary, tmp_path):
    more = config(tmp_path, "more.yaml", model__encoder="payload.Encoder")
    path = tmp_path / "first.yaml"
    path.write_text(CONFIG + f"{key}: {more}\n")
    try:
        cli = build(["--config", str(path)])
    except (InputError, SystemExit):
        cli = None
    if cli is not None and key == "resume":
        with pytest.raises(InputError):
            cli.resume_path()
    assert not canary.exists()


def test_the_user_allows_by_name(canary, tmp_path, monkeypatch):
    path = config(tmp_path, trainer__callbacks=["payload.Watch"])
    cli = build(["--config", str(path), "--allow", "payload.Watch"])
    assert any(type(each).__name__ == "Watch" for each in cli.trainer.callbacks)
    assert canary.exists()  # so the payload does run where it is let
    with pytest.raises(InputError, match="cannot import"):
        build(["--config", str(path), "--allow", "payload.Nope"])
    # and one class allowed is not another
    other = config(tmp_path, "other.yaml", data="payload.Data")
    with pytest.raises(InputError, match=r"asks for payload\.Data"):
        build(["--config", str(other), "--allow=payload.Watch"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(other)])
    assert main() == 2


def test_class_paths_on_the_command_line_are_the_users_own(canary, tmp_path):
    path = config(tmp_path)
    watch = json.dumps({"class_path": "payload.Watch"})
    for given in ("payload.Watch", watch):
        cli = build(["--config", str(path), f"--trainer.callbacks+={given}"])
        assert any(type(each).__name__ == "Watch" for each in cli.trainer.callbacks)


@pytest.mark.parametrize("path", ["setpred.decoders.Nope", "payload.run", "no_such_package.Encoder"])
def test_what_is_typed_and_is_no_class_is_said(path, canary, tmp_path):
    with pytest.raises(InputError, match=f"the command line asks for {path}, which is no class.*--allow {path}"):
        build(["--config", str(config(tmp_path)), f"--model.decoder.class_path={path}"])
    assert not canary.exists()


def test_a_slip_in_a_file_is_said(tmp_path):
    with pytest.raises(InputError, match=r"hostile\.yaml asks for setpred\.decoders\.Nope, which is none of setpred's"):
        build(["--config", str(config(tmp_path, model__decoder="setpred.decoders.Nope"))])


def test_what_one_run_allows_the_next_does_not(canary, tmp_path):
    path = config(tmp_path, trainer__callbacks=["payload.Watch"])
    build(["--config", str(path), "--allow", "payload.Watch"])
    with pytest.raises(InputError, match="asks for payload"):
        build(["--config", str(path)])


def test_other_parsers_of_the_process_are_left_alone():
    before = dict(configuration.parsing_settings)
    with guarded([]):
        assert configuration.parsing_settings != before
    assert configuration.parsing_settings == before


# --- reading ------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha, ha]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
UNREADABLE = "expected a configuration in YAML"  # whoever finds it first, PyYAML or we
TEXTS = {
    "a tag that calls": ("model: !!python/object/apply:os.system ['touch CANARY']\n", "plain values"),
    "a tag that makes": ("model: !!python/object/new:payload.Encoder {}\n", "plain values"),
    "a tag that names": ("model: !!python/name:payload.run\n", "plain values"),
    "a tag of a module": ("model: !!python/module:payload\n", "plain values"),
    "a harmless tag": ("name: !!binary aGE=\n", "plain values"),
    "a tag of the sort": ("name: !own x\n", "plain values"),
    "billion laughs": (LAUGHS, "at most 2,000 values"),
    "an alias in itself": ("model: &a {encoder: *a}\n", UNREADABLE),
    "merged into itself": ("model: &a {<<: *a}\n", UNREADABLE),
    "deep": ("model: " + "[" * 5000 + "]" * 5000, UNREADABLE),
    "deeper": ("model: " + "{a: " * 100_000 + "}" * 100_000, UNREADABLE),
    "long": ("name: x\n# " + "y" * untrusted.LARGEST_YAML, "at most 1,000,000 characters"),
    "many": ("name: [" + "1, " * 50_000 + "]", "at most 2,000 values"),
    "a long number": ("name: 1" + ":59" * 20_000, "at most 4,096 characters"),
    "a number of many digits": ("name: [" + "9" * 4_400 + "]", "at most 4,096 characters"),
    "a day that is none": ("name: 2026-99-99", UNREADABLE),
    "twice": (CONFIG + "trainer: {max_epochs: 1}\n", "'trainer' stands twice"),
    "no text": (b"\xff\xfe\x00\x00name: x", UNREADABLE),
    "nothing": (b"\0" * 100, UNREADABLE),
    "not closed": ("model: {", UNREADABLE),
}


@pytest.mark.parametrize(("text", "said"), TEXTS.values(), ids=TEXTS)
def test_yaml_is_plain_and_small(text, said, canary, tmp_path):
    path = tmp_path / "bad.yaml"
    if isinstance(text, str):
        text = text.replace("CANARY", str(canary)).encode()
    path.write_bytes(text)
    for read in (lambda: build(["--config", str(path)]), lambda: digest(path)):
        with pytest.raises(InputError, match=said) as refused:
            read()
        assert str(path) in str(refused.value)
        assert "\n" not in str(refused.value)
    assert not canary.exists()


@pytest.mark.parametrize(
    "error", [RecursionError("a"), ValueError("a"), yaml.YAMLError("a\nb"), yaml.scanner.ScannerError(problem="a")]
)
@pytest.mark.parametrize("function", ["parse", "safe_load"])
def test_whatever_pyyaml_says_is_a_sentence_of_ours(function, error, tmp_path, monkeypatch):
    path = config(tmp_path)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(yaml, function, fails)
    with pytest.raises(InputError, match=rf"hostile\.yaml: {UNREADABLE} that can be read, got: .*a") as refused:
        untrusted.read_yaml(path)
    assert "\n" not in str(refused.value)


def test_as_many_levels_as_are_allowed_are_read():
    levels = untrusted.DEEPEST_YAML
    assert untrusted.load_yaml("[" * levels + "]" * levels)
    with pytest.raises(yaml.YAMLError, match=f"at most {levels} lists and mappings within each other"):
        untrusted.load_yaml("[" * (levels + 1) + "]" * (levels + 1))


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "[" * 5000,
        "!!python/name:payload.run",
        "class_path: payload.Encoder\nclass_path: setpred.encoders.SmallCNN\n",
    ],
)
def test_files_that_values_point_to_are_plain_and_small_too(text, canary, tmp_path, capsys):
    (tmp_path / "part.yaml").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        build(["--config", str(config(tmp_path, model__encoder=str(tmp_path / "part.yaml")))])
    assert stopped.value.code == 2
    assert not canary.exists()
    assert 0 < len(capsys.readouterr().err) < 10_000


@pytest.mark.parametrize("value", ["x" * 4000, ["x" * 40] * 400])
def test_what_is_said_of_a_long_value_is_short(value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        build(["--config", str(config(tmp_path, data=value))])
    assert len(capsys.readouterr().err) < 10_000


@pytest.mark.parametrize("text", ["", "x", "- x", "7", "7: x", "null"])
def test_a_configuration_has_named_values(text, tmp_path):
    path = tmp_path / "none.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"none\.yaml: expected a configuration, with model: and data: in it"):
        build(["--config", str(path)])


def test_a_model_that_no_machine_holds_is_not_made(tmp_path):
    for width, said in (
        (2**16, "GB of memory, this machine has"),
        (2**40, "cannot be meant"),
        (-16, "cannot be built"),
    ):
        encoder = spec("setpred.encoders.SmallCNN", image_size=16, latent_dim=2**16 - 1, width=width)
        with pytest.raises(InputError, match=said):
            build(["--config", str(config(tmp_path, model__encoder=encoder))])


def test_aliases_that_stand_for_little_are_taken(tmp_path):
    path = tmp_path / "aliases.yaml"
    path.write_text(CONFIG.replace("max_epochs: 2", "max_epochs: &n 2, max_time: null, check_val_every_n_epoch: *n"))
    assert build(["--config", str(path)]).trainer.check_val_every_n_epoch == 2


def test_addresses_are_not_read(tmp_path, monkeypatch):
    import fsspec

    def read(*_, **__):
        raise AssertionError("somebody reads an address")

    monkeypatch.setattr(fsspec, "open", read)
    for address in ("memory://part.yaml", "https://localhost/part.yaml", "simplecache::http://localhost/p.yaml"):
        with pytest.raises((InputError, SystemExit)):
            build(["--config", str(config(tmp_path, model__encoder=address))])


def test_the_environment_is_not_read(tmp_path, monkeypatch, canary):
    monkeypatch.setenv("PL_MODEL__ENCODER", "payload.Encoder")
    monkeypatch.setenv("PL_TRAINER__MAX_EPOCHS", "77")
    path = tmp_path / "environment.yaml"
    path.write_text(CONFIG + "name: $CANARY ${oc.env:HOME}\n")
    cli = build(["--config", str(path)])
    assert cli.trainer.max_epochs == 2
    assert cli.config.name == "$CANARY ${oc.env:HOME}"
    assert not canary.exists()


# --- what may be named --------------------------------------------------------------------------------------------


def test_the_list_is_of_what_takes_plain_data():
    found = allowed_paths()
    assert {"setpred.encoders.ResNet", "setpred.data.toy.QM9", "torch.nn.Linear"} <= found
    assert {"lightning.pytorch.callbacks.EarlyStopping", "setpred.training.FASet"} <= found
    packages = {path.split(".")[0] for path in found}
    assert packages == {"setpred", "torch", "lightning"}
    assert not [path for path in found if "Lambda" in path or path.split(".")[-1] in ("Module", "load", "Callback")]


def test_a_layer_of_torch_goes_from_configuration_to_checkpoint(tmp_path):
    parts = {"encoder": spec("torch.nn.Flatten"), "decoder": spec("setpred.decoders.MLPDecoder", latent_dim=768)}
    path = untrained(tmp_path, *(f"--model.{name}={json.dumps(part)}" for name, part in parts.items()))
    assert type(load_checkpoint(path).model.encoder).__name__ == "Flatten"


def test_a_written_configuration_is_taken_again(tmp_path):
    saving = json.dumps(spec("lightning.pytorch.callbacks.ModelCheckpoint", every_n_epochs=1))
    options = ["--model.metric=setpred.metrics.AveragePrecision", f"--trainer.callbacks+={saving}"]
    options += [
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    untrained(tmp_path, *options)
    again = build(["--config", str(tmp_path / "tiny" / "config.yaml")])
    assert type(again.model.metric).__name__ == "AveragePrecision"
    assert portable(again.config.name) == "tiny"
