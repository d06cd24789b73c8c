"""Comparing under a budget: what counts, that schedules come to their end, that runs repeat, and the table."""

import json
import math
from contextlib import nullcontext
from fractions import Fraction
from types import SimpleNamespace

import pytest
import yaml
from tiny import CONFIG

from setpred.commands import compare as command
from setpred.commands.compare import budget as budget_module
from setpred.commands.compare import command_line, compare, main
from setpred.commands.compare.budget import Budget, BudgetedTraining, Plan, Stretched
from setpred.commands.compare.table import Results, markdown
from setpred.errors import InputError
from setpred.training.schedules import StepDecay, WarmupCosine
from setpred.visualise import draw_training_curves

MLP = {"class_path": "setpred.decoders.MLPDecoder", "init_args": {"set_size": 4, "latent_dim": 16}}


# budgets


@pytest.mark.parametrize(
    ("text", "amount", "in_steps"),
    [("90s", 90, False), ("10m", 600, False), ("1.5h", 5400, False), ("2000steps", 2000, True), ("1step", 1, True)],
)
def test_budgets_are_read(text, amount, in_steps):
    budget = Budget.parse(text)
    assert budget == Budget(amount, in_steps)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["", "10", "m", "ten minutes", "-5s", "0s", "0steps", "2.5steps", "1e3s", "infs", "5d"]
)
def test_other_budgets_are_refused(text):
    with pytest.raises(InputError, match="--budget"):
        Budget.parse(text)


# the schedule


def stretched_over(amount, schedule):
    """The factors of a schedule planned for 60 steps in epochs of 10, before each step of a budget and after it."""
    budget, steps = Budget(amount, in_steps=True), iter(range(amount + 1))
    stretched = Stretched(schedule, lambda: budget.progress(0.0, next(steps)), steps=60, steps_per_epoch=10)
    return [stretched(0, 0) for _ in range(amount + 1)]  # its own count goes, not what it is called with


@pytest.mark.parametrize("schedule", [WarmupCosine(warmup_steps=5, total_steps=60), StepDecay(epochs=[2, 5])])
def test_a_budget_of_the_planned_steps_leaves_the_schedule_as_it_is(schedule):
    assert stretched_over(60, schedule) == [schedule(step, step // 10) for step in range(61)]


@pytest.mark.parametrize("amount", [1, 7, 60, 61, 999, 12_345])
def test_a_schedule_ends_at_its_end_whatever_the_budget(amount):
    cosine = WarmupCosine(warmup_steps=5, total_steps=60, final=0.01)
    factors = stretched_over(amount, cosine)
    assert factors[0] == cosine(0, 0)
    assert factors[-1] == cosine(60, 6)
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_a_plan_is_the_shorter_of_epochs_and_steps():
    assert Plan(epochs=3, steps=None, validation_batches=1.0).length(10) == 30
    assert Plan(epochs=3, steps=7, validation_batches=1.0).length(10) == 7
    assert Plan(epochs=None, steps=7, validation_batches=1.0).length(math.inf) == 7
    assert Plan(epochs=None, steps=None, validation_batches=1.0).length(10) is None
    assert Plan(epochs=3, steps=None, validation_batches=1.0).length(math.inf) is None


# what counts


def test_validation_does_not_count_as_training_time(monkeypatch):
    """A step takes a second here and a validation a thousand: 20 seconds are 20 steps."""
    clock = SimpleNamespace(now=1e6)
    monkeypatch.setattr(budget_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    cosine, factors, validated = WarmupCosine(warmup_steps=0, total_steps=40), [], []

    def validate(batches):
        clock.now += 1000
        validated.append(list(batches))
        return {"val_loss": 0.5}

    model = SimpleNamespace(schedule=cosine, validate=validate)
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(val_dataloader=lambda: ["a", "b", "c", "d"]),
        num_training_batches=8,
        accumulate_grad_batches=2,
        precision_plugin=SimpleNamespace(val_step_context=nullcontext),
        global_step=0,
        should_stop=False,
    )
    plan = Plan(epochs=10, steps=None, validation_batches=0.5)  # 10 epochs of 4 steps
    training = BudgetedTraining(Budget(20, in_steps=False), points=4, plan=plan, report=lambda point: None)
    training.on_train_start(trainer, model)
    batches = 0
    while not trainer.should_stop:
        factors.append(model.schedule(0, 0))
        batches += 1
        clock.now += 0.5
        trainer.global_step = batches // 2
        training.on_train_batch_end(trainer, model, {"loss": batches / 2}, None, 0)
    assert training.steps == 20
    assert training.seconds == 20
    assert [(point["seconds"], point["step"]) for point in training.points] == [(5, 5), (10, 10), (15, 15), (20, 20)]
    assert [point["train_loss"] for point in training.points] == [5.5, 15.5, 25.5, 35.5]  # the means of tens
    assert training.first_loss == 6  # of the batches with which the first five steps ended
    assert validated == [["a", "b"]] * 4
    assert factors[:3] == [cosine(0, 0), cosine(1, 0), cosine(2, 0)]
    assert factors[-1] == cosine(39, 9)


# whole comparisons


@pytest.fixture(scope="module")
def configs(tmp_path_factory, tiny_data):
    """Configurations by name: an iDSPN, an MLP, and an MLP that cannot be trained."""
    folder = tmp_path_factory.mktemp("configs")
    content = yaml.safe_load(CONFIG)
    content["data"]["init_args"]["folder"] = str(tiny_data)
    trainer, mlp = content["trainer"], content["model"] | {"decoder": MLP}
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "nothing"}}
    written = {
        "idspn": content,
        "mlp": content | {"model": mlp},
        "broken": content | {"model": mlp, "trainer": trainer | {"callbacks": [stopping]}},
        "wild": content | {"model": mlp | {"learning_rate": 1e30, "schedule": None}},
        "loss": content | {"model": mlp | {"schema": None}},
        "own": content | {"model": mlp | {"decoder": MLP | {"class_path": "own_part.Mine"}}},
        "typo": content | {"model": mlp | {"learning_rat": 1.0}},
    }
    (folder / "own_part.py").write_text(
        "from setpred.decoders import MLPDecoder\n\n\nclass Mine(MLPDecoder):\n    pass\n"
    )
    paths = {name: folder / f"{name}.yaml" for name in written}
    for name, path in paths.items():
        path.write_text(yaml.safe_dump(written[name]))
    return paths


def lines(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def without_time(run):
    points = [{name: value for name, value in point.items() if name != "seconds"} for point in run["points"]]
    return run | {"points": points, "seconds": None, "config": None}


@pytest.fixture(scope="module")
def compared(configs, tmp_path_factory):
    """Two configurations with two seeds, six steps each."""
    out = tmp_path_factory.mktemp("compared") / "out"
    arguments = [str(configs["idspn"]), str(configs["mlp"]), *["--budget", "6steps", "--seeds", "2", "--points", "3"]]
    arguments += ["--out", str(out)]
    assert compare(arguments) == 0
    return out, arguments


def test_a_budget_of_steps_is_taken_to_the_step(compared):
    out, _ = compared
    runs = lines(out)
    assert [(run["name"], run["seed"]) for run in runs] == [("idspn", 0), ("mlp", 0), ("idspn", 1), ("mlp", 1)]
    for run in runs:
        assert run["steps"] == 6
        assert [point["step"] for point in run["points"]] == [2, 4, 6]
        assert {"val_loss", "val_ap", "val_ap_inf", "train_loss", "seconds"} <= set(run["points"][-1])
        assert not run["failed"]
    assert not list(out.rglob("*.ckpt"))
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.md").read_text()
    assert "| idspn | 2 |" in table
    assert "budget 6 steps" in table


def test_runs_repeat_whatever_was_trained_before(compared, configs, tmp_path):
    arguments = ["--budget", "6steps", "--seeds", "1", "--first-seed", "1", "--points", "3", "--keep"]
    assert compare([str(configs["mlp"]), *arguments, "--out", str(tmp_path)]) == 0
    (again,), before = lines(tmp_path), lines(compared[0])[-1]
    assert without_time(again) == without_time(before)
    assert without_time(again)["points"] != without_time(lines(compared[0])[1])["points"]  # another seed's
    assert (tmp_path / "runs" / "mlp-seed1" / "last.ckpt").is_file()


def test_what_is_in_the_file_is_not_trained_again(compared, monkeypatch, tmp_path, capsys):
    out, arguments = compared
    (tmp_path / "results.jsonl").write_bytes((out / "results.jsonl").read_bytes() + b'{"half a li')
    arguments = [*arguments[:-1], str(tmp_path)]
    trained = []

    def stub(which, seed, settings):
        trained.append((which.name, seed))
        if len(trained) == 2:
            raise KeyboardInterrupt
        return lines(out)[0] | {"seed": seed, "digest": which.digest, "options": list(settings.options)}

    monkeypatch.setattr(command, "train_one", stub)
    monkeypatch.setattr(command, "prepare", lambda which, settings: None)
    assert main(arguments) == 0
    assert trained == []
    assert "left out" in capsys.readouterr().out  # the line of a process that was killed
    arguments[arguments.index("--seeds") + 1] = "3"
    assert main(arguments) == 130
    assert trained == [("idspn", 2), ("mlp", 2)]
    assert "| idspn | 3 |" in (tmp_path / "table.md").read_text()  # what was finished is kept
    assert main(arguments) == 0
    assert trained[2:] == [("mlp", 2)]
    assert main([*arguments, "--", "--data.init_args.batch_size", "4"]) == 0
    assert len(trained) == 3 + 6  # with other options it is another training


def test_a_failing_configuration_does_not_take_the_others_with_it(configs, tmp_path, capsys):
    arguments = [str(configs[name]) for name in ("broken", "wild", "mlp")]
    assert main([*arguments, *["--budget", "8steps", "--points", "2", "--out"], str(tmp_path)]) == 1
    broken, wild, mlp = lines(tmp_path)
    told = tmp_path / "runs" / "broken-seed0" / "error.txt"
    assert broken["failed"].endswith(f"(more in {told})")
    assert told.read_text().startswith("Traceback")
    assert [point["step"] for point in broken["points"]] == [4]
    assert "lower model.learning_rate" in wild["failed"]
    assert not mlp["failed"]
    table = capsys.readouterr().out
    assert table.index("| mlp | 1 |") < table.index("| broken | 0 of 1 |")
    assert f"- wild, seed 0, **failed**: {wild['failed']}" in table


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("mlp --budget 10", "--budget"),
        ("mlp --budget 5s --seeds 0", "--seeds"),
        ("mlp --budget 5s --points 0", "--points"),
        ("mlp --budget 5s --first-seed -1", "--first-seed"),
        ("mlp missing.yaml --budget 5s", "missing.yaml"),
        ("mlp mlp --budget 5s", "same name"),
        ("mlp --budget 5s --out FILE", "not a folder"),
        ("mlp --budget 5s -- --seed_everything 3", "--seed_everything"),
        ("mlp typo --budget 5s", "typo.yaml"),
        ("mlp idspn --budget 5s -- --model.decoder setpred.decoders.MLPDecoder", "under its old name"),
        ("mlp idspn --budget 5s -- --model.encoder.class_path=setpred.encoders.SmallCNN", "same encoder"),
        ("mlp own --budget 5s", "--allow"),
        ("mlp loss --budget 5s", "val_loss"),
        ("mlp --budget 5s -- --data.init_args.set_size 5", "set_size"),
    ],
)
def test_faults_are_said_before_anything_is_trained(arguments, sentence, configs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "train_one", lambda *_: pytest.fail("trained"))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.touch()
    words = [str(configs.get(word, word)).replace("FILE", str(file)) for word in arguments.split()]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    assert sentence in said


def test_a_part_of_the_users_own_is_compared_once_it_is_allowed(configs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(configs["own"].parent)
    arguments = [str(configs["own"]), str(configs["mlp"]), *["--budget", "2steps", "--points", "1", "--out"]]
    assert main([*arguments, str(tmp_path), "--allow", "own_part.Mine"]) == 0
    assert [run["name"] for run in lines(tmp_path)] == ["own", "mlp"]
    # what one seed of another configuration gives does not depend on it
    assert main([str(configs["mlp"]), *arguments[2:], str(tmp_path / "alone")]) == 0
    assert without_time(lines(tmp_path)[1]) == without_time(lines(tmp_path / "alone")[0])


# table and plot


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
    head, _, *rows = markdown(runs, monitor="val_ap", mode="max", command="compare it").splitlines()
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
    assert rows[6:] == ["- never, seed 0, **failed**: it rained", "- high, seed 1, **failed**: it hailed"]
    least = markdown(runs, monitor="val_ap", mode="min", command="").splitlines()
    assert [row.split(" | ")[0] for row in least[2:5]] == ["| low", "| high", "| never"]


def test_a_table_of_nothing_but_failures():
    runs = {"never": [known("never", 0, 0.9, failed="it rained", points=[])]}
    assert "| never | 0 of 1 |" in markdown(runs, monitor="val_ap", mode="max", command="")


def test_all_of_a_folder_is_called_so(tmp_path):
    paths = [tmp_path / f"{name}.yaml" for name in "abc"]
    for path in paths:
        path.touch()
    arguments = [*map(str, paths), "--budget", "5s"]
    assert command_line(arguments, paths) == f"python -m setpred compare {tmp_path}/*.yaml --budget 5s"
    assert command_line(arguments[1:], paths[1:]).count(".yaml") == 2


def test_a_line_without_its_end_does_not_swallow_the_next(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    run = {"digest": "d", "seed": 0, "budget": "5s", "options": [], "value": 1}
    results.path.write_text("{")
    results.add(run)
    results.add(run | {"value": 2})  # tried again
    assert results.path.read_text().count("\n") == 3
    assert list(results.read().values()) == [run | {"value": 2}]


@pytest.mark.parametrize("count", [0, 1, 13])
def test_curves_are_drawn(count, tmp_path):
    curves = {f"configuration {number}": [[(1, 0.5), (2, number)], [(1.5, 0.7)]] for number in range(count)}
    path = draw_training_curves(tmp_path / "curves.png", curves, spent="steps", score="AP", subtitle="of nothing")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_progress_is_exact():
    assert Budget(3, in_steps=True).progress(9.9, 1) == Fraction(1, 3)
    assert Budget(3, in_steps=False).progress(9.9, 1) == 1
