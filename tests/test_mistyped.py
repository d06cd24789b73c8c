"""A mistake on the command line gives one line with the nearest name that exists; overrides always count."""

import sys

import pytest
import yaml
from tiny import CONFIG

from setpred.__main__ import main as program
from setpred.commands import parts
from setpred.commands.train import build
from setpred.errors import InputError

# words after the configuration, and what the message has
MISTAKES = {
    "--trainer.max_epoch 3": "there is no option --trainer.max_epoch; did you mean --trainer.max_epochs",
    "--model.lr 1e-3": "--model.lr; did you mean --model.learning_rate?",
    "--epoch 3": "did you mean --trainer.max_epochs?",
    "--batchsize 3": "did you mean --data.init_args.batch_size?",
    "--num_workers 3": "did you mean --data.init_args.num_workers?",
    "--gpus 1": "did you mean --trainer.devices?",
    "--resum last": "did you mean --resume?",
    "--allw a.B": "did you mean --allow?",
    "--zzzz": "no option --zzzz; setpred train --help",
    "--data mine.npz --val val.h5": "--data mine.npz: expected FILE.h5; make one with `setpred data import`",
    "mine.h5": "expected options, got 'mine.h5'; write --data mine.h5",
    "--name": "--name: expected one argument",
    "--data.init_args.batchsize 8": "RenderedScenes has no argument 'batchsize'; did you mean batch_size",
    "--model.decoder.init_args.descent.iteration 3": "GradientDescent has no argument 'iteration'; did you mean iter",
    "--model.schedule.init_args.warmup 3": "no argument 'warmup'; it takes warmup_steps, total_steps, final",
    "--model.encoder SmalCNN": "expected a class, got 'SmalCNN'; did you mean setpred.encoders.SmallCNN?",
    "--model.encoder setpred.encoders.Smal": "setpred.encoders.Smal is no public part",
    "--model.encoder setpred.encoders.SmalCNN": "did you mean setpred.encoders.SmallCNN?",
    "--trainer.callbacks=EMAA": "did you mean setpred.training.EMA?",
    "--model.loss Qqq": "expected a class, got 'Qqq'; `setpred parts`",
    "--trainer.max_epochs three": "trainer.max_epochs: expected int, got 'three'",
    "--data.init_args.batch_size few": "data.batch_size: expected int, got 'few'",
    "--config none.yaml": "none.yaml",
}
KEYS = {  # in a configuration
    "model: {encodr: 3}": "there is no key model.encodr; did you mean --model.encoder",
    "trainer: {max_epoch: 3}": "there is no key trainer.max_epoch; did you mean --trainer.max_epochs",
    "model: {loss: {class_path: setpred.losses.HungarianLoss, init_args: {weigths: 3}}}": "did you mean weights?",
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line_with_the_nearest_name(words, tiny):
    with pytest.raises(InputError) as caught:
        build(["--config", str(tiny), *words.split()])
    assert MISTAKES[words] in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 320


@pytest.mark.parametrize("text", KEYS)
def test_a_mistyped_key_of_a_configuration_is_one_line(text, tiny, tmp_path):
    (tmp_path / "more.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        build(["--config", str(tiny), "--config", str(tmp_path / "more.yaml")])
    assert KEYS[text] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("evalute", "did you mean evaluate?"),
        ("evaluate x.ckpt --threshold 3", "did you mean --thresholds?"),
        ("predict x.ckpt i --out o --figure f", "did you mean --figures?"),
        ("data imprt", "did you mean import?"),
        ("data import --cvs x.csv --images i --out o.h5", "did you mean --csv?"),
        ("parts FSPol", "did you mean FSPool?"),
        ("evaluate x.ckpt --nope", "--nope; see setpred evaluate --help"),
        ("predict x.ckpt", "--out"),
        ("nope", "nope"),
    ],
)
def test_other_commands_name_the_nearest_too(words, found, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["setpred", *words.split()])
    assert program() == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert found in message
    assert message.count("\n") == 1


def test_overrides_count_wherever_they_are(tiny):
    cli = build(
        ["--epochs=3", "--batch-size", "4", "--config", str(tiny), "--lr", "0.5", "--seed", "7", "--save-minutes", "2"]
    )
    assert (cli.trainer.max_epochs, cli.datamodule.batch_size, cli.model.learning_rate) == (3, 4, 0.5)
    assert (cli.model.seed, cli.config.save_minutes) == (7, 2.0)


@pytest.mark.parametrize("option", ["descent.iterations=7", "init_args.descent.init_args.iterations=7"])
def test_steps_that_an_option_gives_replace_those_by_epoch(tiny, option):
    more = tiny.with_name("more.yaml")
    more.write_text("model: {iterations_by_epoch: {0: 3}}")
    configs, steps = ["--config", str(tiny), "--config", str(more)], f"--model.decoder.{option}"
    assert build(configs).model.training_iterations() == 3
    cli = build([*configs, steps])
    assert (cli.model.iterations_by_epoch, cli.model.model.decoder.descent.iterations) == (None, 7)
    cli = build([*configs, steps, "--model.iterations_by_epoch", "{0: 5}"])
    assert cli.model.training_iterations() == 5


def test_parts_are_listed_once_and_described(capsys):
    listed = [path for _, members in parts.parts().values() for path in members]
    assert len(listed) == len(set(listed)) > 60
    assert parts.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    for path in listed:
        assert sum(line.split()[:1] == [path.rpartition(".")[2]] for line in lines) == 1
    assert parts.main(["losses"]) == 0
    assert "HungarianLoss" in capsys.readouterr().out
    assert parts.main(["detr"]) == 0  # any case
    printed = capsys.readouterr().out
    assert "heads: int = 8" in printed
    assert "set_size: int (from the data)" in printed


def test_every_part_has_yaml_that_names_it():
    for group, members in parts.parts().values():
        for path, part in members.items():
            example, source = parts.snippet(path, part, group)
            assert path in str(yaml.safe_load(example))
            described = parts.description(path, part, group)
            for name, each in parts.parameters(part).items():
                assert f"  {name}" in described
                required = each.default is each.empty and name not in parts.FILLED
                assert source or not required or f"{name}: '...'" in example
    known = set(parts.parameters(parts.found_part("SetDataModule")[1]))
    assert {"train", "batch_size", "num_workers", "augment", "seed"} <= known  # passed on to base classes
