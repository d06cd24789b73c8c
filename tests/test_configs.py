"""Every configuration is complete: it builds, takes a training step, and a checkpoint of it can be rebuilt."""

from pathlib import Path

import pytest
import torch
import yaml
from tiny import untrained

from setpred.checkpoint import load as checkpoint
from setpred.commands.config import plain
from setpred.commands.train import build, check_fit
from setpred.decoders import IDSPN
from setpred.encoders import ResidualTrunk
from setpred.inner import Unrolled
from setpred.schema import CLEVR, ElementSchema

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COMPARED = sorted((CONFIGS / "compare").glob("*.yaml"))
EVERY = sorted(CONFIGS.glob("*.yaml")) + COMPARED
WORLDS = sorted((CONFIGS / "worlds").rglob("*.yaml"))

every = pytest.mark.parametrize("path", EVERY, ids=lambda path: str(path.relative_to(CONFIGS).with_suffix("")))
every_world = pytest.mark.parametrize("path", WORLDS, ids=lambda path: f"{path.parent.name}-{path.stem}")


def built(path, *options):
    return build(["--config", str(path), "--trainer.accelerator", "cpu", "--trainer.logger", "false", *options])


def test_the_promised_configurations_are_there():
    promised = {"quickstart", "clevr", "clevr_fspool", "clevr_equilibrium", "clevr_dspn", "rendered", "streamed"}
    promised |= {"voting_128"}
    assert {path.stem for path in EVERY} >= promised
    rivals = {f"slot_attention{kind}" for kind in ("", "_implicit", "_sinkhorn", "_mesh")} | {"slot_mixture", "detr"}
    rivals |= {"idspn_voting", "idspn_equilibrium", "idspn_fspool", "dspn", "seq2set", "mlp", "bilstm", "transformer"}
    assert {path.stem for path in COMPARED} >= rivals


@every
def test_builds_and_takes_a_step(path):
    cli = built(path)
    model, data = cli.model, cli.datamodule
    predictor = model.model
    assert predictor.decoder.set_size == (data.set_size or model.schema.max_objects)
    assert predictor.encoder.image_size == data.image_size
    generator = torch.Generator().manual_seed(0)
    size = data.image_size
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    target = torch.rand(2, predictor.decoder.set_size, model.schema.set_dim, generator=generator)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = model.configure_optimizers()
    # two descent steps are enough to reach every parameter
    loss = model.loss(model(images, iterations=2 if isinstance(predictor.decoder, IDSPN) else None), target).mean()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.5 * len(moved)
    if path in COMPARED:  # what a checkpoint would say of it, in plain types, builds the same model
        record = {part: plain(cli.config.model[part]) for part in ("encoder", "decoder")}
        classes = checkpoint.allowed_classes()
        rebuilt = checkpoint.SetPredictor(*(checkpoint.build(record[part], classes) for part in ("encoder", "decoder")))
        rebuilt.load_state_dict(predictor.state_dict())
        rebuilt.to(memory_format=torch.channels_last)  # the trained one's: a start that picks the largest sees rounding
        with torch.no_grad():
            torch.testing.assert_close(rebuilt.eval()(images), predictor.eval()(images))


@every
def test_is_short_and_says_where_its_numbers_come_from(path):
    text = path.read_text()
    assert text.startswith("#")
    assert len(text.splitlines()) < 60
    assert "set_dim" not in text  # it follows from the schema
    config = yaml.safe_load(text)
    assert {"model", "data", "trainer"} <= set(config)


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.stem)
def test_the_compared_have_the_same_data_trunk_and_budget(path):
    first, config = (yaml.safe_load(file.read_text()) for file in (COMPARED[0], path))
    assert config["data"] == first["data"]
    assert config["trainer"]["max_epochs"] == first["trainer"]["max_epochs"]
    trunks = [part for part in built(path).model.modules() if isinstance(part, ResidualTrunk)]
    assert [(trunk.channels, trunk.image_size) for trunk in trunks] == [(48, 64)]
    assert len(trunks[0]) == 4


def test_the_compared_voting_is_the_quickstart_but_for_its_length_and_loss():
    quickstart, compared = (
        yaml.safe_load((CONFIGS / name).read_text()) for name in ("quickstart.yaml", "compare/idspn_voting.yaml")
    )
    quickstart["trainer"]["max_epochs"] = 10
    quickstart["data"]["init_args"]["train_images"] = 20000
    del quickstart["model"]["loss"]  # the others have the published one
    assert quickstart == compared


def test_dspn_is_one_option_away():
    for name in ("clevr_fspool.yaml", "compare/idspn_fspool.yaml"):
        cli = built(CONFIGS / name, "--model.decoder.init_args.differentiation=setpred.inner.Unrolled")
        assert isinstance(cli.model.model.decoder.differentiation, Unrolled)


# --- small worlds -------------------------------------------------------------------------------------------------


@every_world
def test_a_world_builds_takes_a_step_and_is_scored(path):
    if "Digit" in path.read_text():
        pytest.importorskip("sklearn")
    few = {"train_sets": 4, "val_sets": 3, "batch_size": 2, "eval_batch_size": 2}
    cli = built(path, *(word for name, count in few.items() for word in (f"--data.init_args.{name}", str(count))))
    model, data = cli.model, cli.datamodule
    data.setup("fit")
    check_fit(cli)
    batch = next(iter(data.train_dataloader()))
    steps = 2 if isinstance(model.model.decoder, IDSPN) else None
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = model.configure_optimizers()
    predicted = model(batch["input"], mask=batch.get("input_mask"), iterations=steps)
    loss = model.loss(predicted, batch["elements"]).mean()
    loss.backward()
    optimizer.step()
    moved = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert sum(moved) > 0.4 * len(moved)  # a potential with a gain of 0 comes in at the second
    scores = model.validate(data.val_dataloader())
    assert model.monitor in scores
    assert torch.isfinite(torch.tensor([float(loss.detach()), *scores.values()])).all()
    record = {part: plain(cli.config.model[part]) for part in ("encoder", "decoder")}
    classes = checkpoint.allowed_classes()
    rebuilt = checkpoint.SetPredictor(*(checkpoint.build(record[part], classes) for part in ("encoder", "decoder")))
    rebuilt.load_state_dict(model.model.state_dict())


def test_functions_and_classes_are_their_import_paths():
    assert plain({"a": [plain, ElementSchema], "b": (1, None)}) == {
        "a": ["setpred.commands.config.plain", "setpred.schema.ElementSchema"],
        "b": [1, None],
    }


def test_a_metric_whose_default_is_a_function_leaves_a_checkpoint_that_is_read(tmp_path):
    path = untrained(tmp_path, "--model.metric=setpred.metrics.AveragePrecision")
    metric = checkpoint.read_checkpoint(path)[checkpoint.KEY]["settings"]["model"]["metric"]
    assert metric["init_args"]["protocol"].endswith(".average_precision")
    assert metric["init_args"]["schema"] == plain(CLEVR)


@every_world
def test_a_world_is_short_and_says_where_its_numbers_come_from(path):
    text = path.read_text()
    assert len(text.splitlines()[0]) > 60
    assert text.startswith("# ")
    assert len(text.splitlines()) < 60
    config = yaml.safe_load(text)
    assert config["model"]["schema"] is None
    epochs = config["trainer"]["max_epochs"]
    siblings = [yaml.safe_load(other.read_text()) for other in path.parent.glob("*.yaml")]
    assert all(other["data"] == config["data"] for other in siblings)
    assert {other["trainer"]["max_epochs"] for other in siblings} == {epochs}


@pytest.mark.parametrize("world", ["median", "counting"])
def test_aggregators_are_compared_at_one_number_of_parameters(world):
    counts = [
        sum(parameter.numel() for parameter in built(path).model.parameters())
        for path in WORLDS
        if path.parent.name == world
    ]
    assert len(counts) > 2
    assert max(counts) < 1.1 * min(counts)
