"""Compare: the budget and its schedule, repeatable and resumable runs, errors, the table."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import yaml
from tiny import CONFIG

from setpred.commands import compare as command
from setpred.commands.compare import compare, main
from setpred.commands.compare.results import add_result, markdown, ranked, read_results
from setpred.errors import InputError
from setpred.training import budget as budget_module
from setpred.training.budget import Budget, BudgetedTraining, Stretched
from setpred.training.schedules import StepDecay, WarmupCosine
from setpred.visualise import draw_training_curves

MLP = {"class_path": "setpred.decoders.MLPDecoder", "init_args": {"set_size": 4, "latent_dim": 16}}


WRONG = ("", "10", "m", "ten minutes", "-5s", "0s", "0steps", "2.5steps", "1e3s", "infs")


@pytest.mark.parametrize(
    ("text", "amount"),
    [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2000steps", 2000), ("1step", 1), *((text, None) for text in WRONG)],
)
def test_budgets_are_times_or_steps(text, amount):
    if amount is None:
        with pytest.raises(InputError, match="--budget"):
            Budget.parse(text)
    else:
        budget = Budget.parse(text)
        assert budget == Budget(amount, in_steps="step" in text)
        assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize("amount", [1, 7, 60, 61, 999, 12_345])
@pytest.mark.parametrize(
    "schedule", [WarmupCosine(warmup_steps=5, total_steps=60, final=0.01), StepDecay(epochs=[2, 5])]
)
def test_a_schedule_keeps_its_shape_and_its_end_under_every_budget(schedule, amount):
    """A budget of the 60 planned steps leaves every factor as it is."""
    budget, steps = Budget(amount, in_steps=True), iter(range(amount + 1))
    stretched = Stretched(schedule, lambda: budget.progress(0.0, next(steps)), steps=60, steps_per_epoch=10)
    factors = [stretched(0, 0) for _ in range(amount + 1)]  # the training's own count has no effect
    planned = [schedule(step, step // 10) for step in range(61)]
    assert (factors[0], factors[-1]) == (planned[0], planned[-1])
    peak = factors.index(max(factors))
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert amount != 60 or factors == planned


def test_validation_does_not_count_as_training_time(monkeypatch):
    """A step takes a second and a validation a thousand: 20 seconds are 20 steps."""
    clock = SimpleNamespace(now=1e6)
    monkeypatch.setattr(budget_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    cosine, factors, validated = WarmupCosine(warmup_steps=0, total_steps=40), [], []

    def validate(batches):
        clock.now += 1000
        validated.append(list(batches))
        return {"val_loss": 0.5}

    model = SimpleNamespace(schedule=cosine, validate=validate, monitor="val_loss")
    loop = SimpleNamespace(max_epochs=10, min_epochs=2, epoch_loop=SimpleNamespace(max_steps=-1, min_steps=5))
    plan = {"fit_loop": loop, "num_training_batches": 8, "accumulate_grad_batches": 2}  # 10 epochs of 4 steps
    plan |= {"global_step": 0, "should_stop": False, "limit_val_batches": 0.5}
    plan |= {"max_epochs": 10, "max_steps": -1, "callbacks": []}
    data = SimpleNamespace(val_dataloader=lambda: ["a", "b", "c", "d"])
    precision = SimpleNamespace(val_step_context=nullcontext)
    trainer = SimpleNamespace(**plan, datamodule=data, precision_plugin=precision)
    training = BudgetedTraining(Budget(20, in_steps=False), points=4, title="it")
    with pytest.raises(InputError, match="at least one step"):
        training.setup(SimpleNamespace(**plan | {"max_epochs": 0}), model, "fit")
    training.setup(trainer, model, "fit")
    training.on_train_start(trainer, model)
    assert (loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps, trainer.limit_val_batches) == (-1, None, -1, 0)
    batches = 0
    while not trainer.should_stop:
        factors.append(model.schedule(0, 0))
        batches += 1
        clock.now += 0.5
        trainer.global_step = batches // 2
        training.on_train_batch_end(trainer, model, {"loss": batches / 2}, None, 0)
    assert (training.steps, training.seconds) == (20, 20)
    assert [(point["seconds"], point["step"]) for point in training.points] == [(5, 5), (10, 10), (15, 15), (20, 20)]
    assert [point["train_loss"] for point in training.points] == [5.5, 15.5, 25.5, 35.5]  # the means of tens
    assert training.first == [2, 4, 6, 8, 10]  # the last batch of each of the first steps
    assert validated == [["a", "b"]] * 4
    assert factors[:3] == [cosine(0, 0), cosine(1, 0), cosine(2, 0)]
    assert factors[-1] == cosine(39, 9)


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_data):
    """Configurations by name: an iDSPN, an MLP, and faulty ones."""
    folder = tmp_path_factory.mktemp("configs")
    content = yaml.safe_load(CONFIG)
    content["data"]["init_args"]["folder"] = str(tiny_data)
    mlp = content["model"] | {"decoder": MLP}
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "nothing"}}
    models = {
        "mlp": mlp,
        "wild": mlp | {"learning_rate": 1e30, "schedule": None},
        "loss": mlp | {"schema": None},
        "own": mlp | {"decoder": MLP | {"class_path": "own_part.Mine"}},
        "typo": mlp | {"learning_rat": 1.0},
    }
    written = {"idspn": content} | {name: content | {"model": model} for name, model in models.items()}
    written["failing"] = written["mlp"] | {"trainer": content["trainer"] | {"callbacks": [stopping]}}
    (folder / "own_part.py").write_text("from setpred.decoders import MLPDecoder\nclass Mine(MLPDecoder):\n    pass\n")
    for name, each in written.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(each))
    return {name: folder / f"{name}.yaml" for name in written}


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_time(run):
    points = [{name: value for name, value in point.items() if name != "seconds"} for point in run["points"]]
    return run | {"points": points, "seconds": None}


@pytest.fixture(scope="module")
def compared(configs, tmp_path_factory):
    """Two configurations with two seeds, six steps each."""
    out = tmp_path_factory.mktemp("compared") / "out"
    arguments = [str(configs["idspn"]), str(configs["mlp"]), *["--budget", "6steps", "--seeds", "2", "--points", "3"]]
    arguments += ["--out", str(out)]
    assert compare(arguments) == 0
    return out, arguments


def test_a_budget_of_steps_is_exact(compared):
    out, _ = compared
    runs = lines(out)
    assert [(run["name"], run["seed"]) for run in runs] == [("idspn", 0), ("mlp", 0), ("idspn", 1), ("mlp", 1)]
    for run in runs:
        assert (run["steps"], run["failed"]) == (6, None)
        assert [point["step"] for point in run["points"]] == [2, 4, 6]
        assert {"val_loss", "val_ap", "val_ap_inf", "train_loss", "seconds"} <= set(run["points"][-1])
    assert not list(out.rglob("*.ckpt"))
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    assert "| idspn | 2 |" in table
    assert "budget 6 steps" in table


def test_runs_repeat_whatever_was_trained_before(compared, configs, tmp_path):
    arguments = ["--budget", "6steps", "--seeds", "1", "--first-seed", "1", "--points", "3", "--keep"]
    assert compare([str(configs["mlp"]), *arguments, "--out", str(tmp_path)]) == 0
    (again,), before = lines(tmp_path), lines(compared[0])
    assert without_time(again) == without_time(before[-1])
    assert without_time(again)["points"] != without_time(before[1])["points"]  # of another seed
    assert (tmp_path / "runs" / "mlp-seed1" / "last.ckpt").is_file()


def test_finished_runs_are_not_repeated(compared, monkeypatch, tmp_path, capsys):
    out, arguments = compared
    (tmp_path / "results.jsonl").write_bytes((out / "results.jsonl").read_bytes() + b'{"half a li')
    arguments = [*arguments[:-1], str(tmp_path)]
    trained = []

    def stub(path, seed, options):
        trained.append((path.stem, seed))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return {
            name: value for name, value in lines(out)[0].items() if name not in ("seed", "name", "digest", "options")
        }

    monkeypatch.setattr(command, "train_one", stub)
    monkeypatch.setattr(command, "prepare_data", lambda cli: None)
    monkeypatch.setattr(command.results, "draw_training_curves", lambda *_, **__: None)
    built = SimpleNamespace(datamodule=None, model=SimpleNamespace(monitor="val_ap", mode="max"))
    monkeypatch.setattr(command, "build_configuration", lambda path, options: built)
    assert main(arguments) == 0
    assert trained == []
    assert "skipped line 5" in capsys.readouterr().out  # of a killed process
    arguments[arguments.index("--seeds") + 1] = "3"
    assert main(arguments) == 130
    assert trained == [("idspn", 2), ("mlp", 2)]
    assert "| idspn | 3 |" in (tmp_path / "table.md").read_text()  # the finished run is kept
    assert main(arguments) == 0
    assert trained[2:] == [("mlp", 2)]
    assert main([*arguments, "--", "--data.init_args.batch_size", "4"]) == 0
    assert len(trained) == 3 + 6  # other options make other runs


def test_a_failing_configuration_leaves_the_others_and_own_parts_are_allowed(configs, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(configs["own"].parent)
    arguments = [str(configs[name]) for name in ("failing", "wild", "own")]
    budget = ["--budget", "8steps", "--points", "2", "--allow", "own_part.Mine", "--out"]
    assert main([*arguments, *budget, str(tmp_path)]) == 1
    failing, wild, own = lines(tmp_path)
    error = tmp_path / "runs" / "failing-seed0" / "error.txt"
    assert failing["failed"].endswith(f"(more in {error})")
    assert error.read_text().startswith("Traceback")
    assert [point["step"] for point in failing["points"]] == [4]
    assert "lower model.learning_rate" in wild["failed"]
    assert not own["failed"]
    table = capsys.readouterr().out
    assert table.index("| own | 1 |") < table.index("| failing | 0 of 1 |")
    assert f"- wild, seed 0, **failed**: {wild['failed']}" in table


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("mlp missing.yaml --budget 5s", "missing.yaml"),
        ("mlp mlp --budget 5s", "same name"),
        ("mlp --budget 5s --out FILE", "expected a folder, but it is a file"),
        ("mlp --budget 5s -- --seed_everything 3", "--seed_everything"),
        ("mlp typo --budget 5s", "typo.yaml"),
        ("mlp idspn --budget 5s -- --model.decoder setpred.decoders.MLPDecoder", "under its old name"),
        ("mlp idspn --budget 5s -- --model.encoder.class_path=setpred.encoders.SmallCNN", "same encoder"),
        ("mlp own --budget 5s", "--allow"),
        ("mlp --budget 5s -- --data none.h5 --val none.h5", "none.h5"),  # data of one's own
        ("mlp loss --budget 5s", "val_loss"),
        ("mlp --budget 5s -- --data.init_args.set_size 5", "set_size"),
    ],
)
def test_errors_come_before_any_training(arguments, sentence, configs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "train_one", lambda *_: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    assert main([str(configs.get(word, word)).replace("FILE", str(file)) for word in arguments.split()]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ")
    assert sentence in message


def known(name, seed, score, **changes):
    last = {"seconds": 2.0 + seed, "step": 10, "train_loss": 0.1 * (1 + seed), "val_loss": 0.2, "val_ap": score}
    run = {"name": name, "seed": seed, "budget": "120s", "steps": 10, "seconds": last["seconds"], "parameters": 12_345}
    run |= {"first_loss": 0.5, "points": [last | {"val_ap_0.5": 0.25}], "failed": None}
    return run | {"torch": "9.9", "threads": 2, "processor": "Abacus"} | changes


def test_the_table_of_known_results():
    runs = {
        "low": [known("low", 0, 0.1), known("low", 1, 0.2), known("low", 2, 0.3)],
        "never": [known("never", 0, 0.9, failed="it rained", points=[])],
        "high": [known("high", 0, 0.5), known("high", 1, 0.6, failed="it hailed")],
    }
    table = markdown(ranked(runs, "val_ap", "max"), monitor="val_ap", command="compare it")
    head, _, *rows = table.splitlines()
    columns = "| configuration | seeds | AP | 0.5 | val. loss | train loss | steps | ms/step | parameters |"
    assert head == columns
    # 0.1, 0.2, 0.3: mean 0.2, standard deviation of the sample 0.1; seconds 2, 3, 4 for ten steps
    assert rows[:3] == [
        "| high | 1 of 2 | 50.0 | 25.0 | 0.2000 | 0.5000 → 0.1000 | 10 | 200 | 12 k |",
        "| low | 3 | 20.0 ± 10.0 | 25.0 ± 0.0 | 0.2000 ± 0.0000 | 0.5000 → 0.2000 | 10 | 300 | 12 k |",
        "| never | 0 of 1 |  |  |  | failed |  |  |  |",
    ]
    assert rows[4].startswith("`compare it`; budget 2 minutes (training alone")
    assert "seeds 0, 1, 2; Abacus, 2 threads, torch 9.9;" in rows[4]
    assert sorted(rows[6:]) == ["- high, seed 1, **failed**: it hailed", "- never, seed 0, **failed**: it rained"]
    assert list(ranked(runs, "val_ap", "min")) == ["low", "high", "never"]
    assert "| never | 0 of 1 |" in markdown({"never": runs["never"]}, monitor="val_ap", command="")


def test_a_cut_off_line_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "results.jsonl"
    run = {"digest": "d", "seed": 0, "budget": "5s", "options": [], "value": 1}
    path.write_text("{")
    add_result(path, run)
    add_result(path, run | {"value": 2})  # repeated
    assert path.read_text().count("\n") == 3
    assert list(read_results(path).values()) == [run | {"value": 2}]


def test_curves_are_drawn_of_none_and_of_many(tmp_path):
    for count in (0, 13):
        curves = {f"configuration {number}": [[(1, 0.5), (2, number)], [(1.5, 0.7)]] for number in range(count)}
        draw_training_curves(tmp_path / "curves.png", curves, spent="steps", score="AP", subtitle="of nothing")
