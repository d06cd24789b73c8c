"""Training in two processes (gloo, on the CPU) gives the numbers of one; one process writes; an error ends both."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import yaml
from tiny import CONFIG as TINY
from tiny import equal, metrics
from torch import Tensor, nn

from setpred.commands.train import build, train
from setpred.errors import InputError
from setpred.metrics import AveragePrecision
from setpred.schema import CLEVR
from setpred.training import distributed as processes
from setpred.workers import end_with_parent

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds, after which a training counts as hanging
SCENES, VAL, BATCH = 24, 13, 4  # of an epoch, of a validation (an odd number), of a step and process
MIDDLE = 4  # the second step of the second epoch
WATCHED = "SETPRED_TEST_WATCHED"  # environment variable of processes whose writing is recorded

CONFIG = yaml.safe_load(TINY)
CONFIG["model"] |= {
    "encoder": {"class_path": "test_processes.Pixels", "init_args": {"latent_dim": 16}},
    "weight_decay": 0.1,
    "schedule": None,
}
start = {"class_path": "setpred.decoders.LearnedStart", "init_args": {"set_size": 4, "set_dim": 19}}
CONFIG["model"]["decoder"]["init_args"]["start"] = start
CONFIG["data"] = {
    "class_path": "setpred.data.streamed.StreamedScenes",
    "init_args": {
        **{"scenes_per_epoch": SCENES, "val_images": VAL, "image_size": 16, "objects": [3, 4], "set_size": 4},
        **{"batch_size": BATCH, "eval_batch_size": 1, "workers": 0},
    },
}
CONFIG["trainer"]["deterministic"] = True


class Pixels(nn.Module):
    """Image to latent vector, without batch normalisation, whose statistics are those of one process."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.image_size, self.latent_dim = 16, latent_dim
        self.linear = nn.Linear(3 * 16, latent_dim)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, image: Tensor) -> Tensor:
        return self.scale * self.linear(nn.functional.avg_pool2d(image, 4).flatten(1))


class Recorder(pl.Callback):
    """Records what this process sees and writes; `fail` is (process, step, how)."""

    def __init__(self, folder: str, fail: tuple[int, int, str] | None = None) -> None:
        self.folder, self.fail = Path(folder), fail
        self.seen: dict[str, list] = {"steps": [], "losses": [], "gradients": [], "validated": [], "scores": []}
        self.written: list[tuple[str, str]] = []
        if WATCHED in os.environ:
            sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.written.append((event, str(arguments[0])))
        elif event == "os.rename":
            self.written.append((event, str(arguments[1])))

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen["steps"].append(batch["index"].tolist())
        if self.fail is not None and tuple(self.fail[:2]) == (trainer.global_rank, trainer.global_step):
            how = self.fail[2]
            if how == "raise":
                raise RuntimeError("on purpose")
            if how == "file":
                raise InputError("data.h5 is damaged; copy or make it again")
            if how == "nan":
                batch["elements"].fill_(float("nan"))
            else:
                os.kill(os.getpid(), getattr(signal, how))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen["losses"].append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer, module, optimizer):
        named = module.named_parameters()
        self.seen["gradients"].append({name: value.grad.clone() for name, value in named if value.grad is not None})

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        self.seen["validated"].append(batch["index"].tolist())

    def on_validation_epoch_end(self, trainer, module):
        self.seen["scores"].append((torch.cat(module.metric.predicted), torch.cat(module.metric.target)))

    def on_train_end(self, trainer, module):
        weights = {name: value.detach().clone() for name, value in module.state_dict().items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        content = self.seen | {"weights": weights, "metrics": metrics, "written": self.written}
        torch.save(content, self.folder / f"seen-{trainer.global_rank}-of-{trainer.world_size}.pt")


def command(
    folder: Path,
    data: Path,
    *options: str,
    fail: tuple[int, int, str] | None = None,
    config: str = yaml.safe_dump(CONFIG),
) -> list[str]:
    """Options of train.py for a recorded run in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    recorder = {"class_path": "test_processes.Recorder", "init_args": {"folder": str(folder), "fail": fail and [*fail]}}
    return [
        *("--config", str(folder / "config.yaml"), "--runs", str(folder / "runs"), "--name", "run"),
        *("--allow=test_processes.Pixels", f"--trainer.callbacks={json.dumps([recorder])}"),
        *(f"--data.init_args.folder={data}", "--trainer.logger=false", *options),
    ]


def launch(options: list[str], *, torchrun: bool = False) -> subprocess.CompletedProcess[str]:
    """Run train.py with two processes until the last one ends; a hang ends after `LIMIT`."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if torchrun else []
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name and "MASTER" not in name}
    environment |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", WATCHED: "1"}
    many = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    started = subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *options, *many],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        printed, complained = started.communicate(timeout=LIMIT)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    return subprocess.CompletedProcess(started.args, started.returncode, printed, complained)


def seen(folder: Path, processes: int = 2) -> list[dict]:
    """Records of all processes."""
    return [torch.load(folder / f"seen-{rank}-of-{processes}.pt", weights_only=True) for rank in range(processes)]


def apart(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest difference, relative to the largest number."""
    assert ours.keys() == theirs.keys()
    flat = [torch.cat([part[name].flatten() for name in part]) for part in (ours, theirs)]
    return float((flat[0] - flat[1]).abs().max() / flat[1].abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder):
    """One process with the doubled batch."""
    train(command(folder / "alone", folder / "data", f"--data.init_args.batch_size={2 * BATCH}"))
    torch.use_deterministic_algorithms(False)  # which the trainer leaves on; it fills uninitialised memory
    return seen(folder / "alone", 1)[0]


@pytest.fixture(scope="module")
def printed(folder, alone):
    """What two processes print."""
    ended = launch(command(folder / "two", folder / "data", "--save_minutes=0"))
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(scope="module")
def two(folder, printed):
    return seen(folder / "two")


def test_scenes_gradients_and_weights_are_those_of_one_process_with_the_doubled_batch(alone, two):
    """Scenes differ by process; sums are in float32, in another order; one parameter of the start has no gradient."""
    for ours, *theirs in zip(alone["steps"], *(each["steps"] for each in two), strict=True):
        assert [number for pair in zip(*theirs, strict=True) for number in pair] == ours
    assert list(chain(*alone["steps"])) == list(range(2 * SCENES))
    for ours, theirs, expected in zip(two[0]["gradients"], two[1]["gradients"], alone["gradients"], strict=True):
        assert equal(ours, theirs)
        assert apart(ours, expected) < 1e-5
    assert apart(two[0]["gradients"][0], alone["gradients"][0]) < 3e-6
    assert "model.decoder.start.initial" not in alone["gradients"][0]
    assert equal(two[0]["weights"], two[1]["weights"])
    assert apart(two[0]["weights"], alone["weights"]) < 1e-5


def test_every_image_is_validated_once_and_the_scores_are_those_of_one_process(alone, two):
    """In their order; one process has a batch more than the other."""
    assert [len(each["validated"]) for each in two] == [2 * 6, 2 * 7]
    for epoch in range(2):
        first, second = (
            each["validated"][epoch * batches :][:batches] for each, batches in zip(two, (6, 7), strict=True)
        )
        assert list(chain(*first, *second)) == list(range(VAL))
    for epoch, (predicted, target) in enumerate(alone["scores"]):
        parts = [each["scores"][epoch] for each in two]
        together = [torch.cat(halves) for halves in zip(*parts, strict=True)]
        torch.testing.assert_close(together[0], predicted, rtol=1e-4, atol=1e-5)
        assert torch.equal(together[1], target)
    metric = AveragePrecision(schema=CLEVR)
    metric.update(*together)
    for name, value in metric.compute().items():
        assert two[0]["metrics"][f"val_{name}"] == float(value.float())


def test_what_is_logged_is_the_same_in_all_processes_and_in_one(alone, two):
    latest, mean_of_own = "loss", "val_residual_growth"  # the latter over the first images of each process
    for name, value in two[0]["metrics"].items():
        assert name == latest or value == two[1]["metrics"][name]
        if name.startswith(("val_", "train_")) and name != mean_of_own:
            assert value == pytest.approx(alone["metrics"][name], rel=1e-5)
    assert 0 < two[0]["metrics"]["data_waiting"] < 1


def test_process_0_alone_writes_and_prints(folder, printed, two):
    """Each file aside, then under its name."""
    runs = folder / "two" / "runs"
    written = [[(event, path) for event, path in each["written"] if str(runs) in path] for each in two]
    assert written[1] == []
    opened = [path for event, path in written[0] if event == "open"]
    assert all(path in (str(runs), str(runs / ".run.lock")) or ".partial-" in path for path in opened)
    final = [Path(path).name for event, path in written[0] if event == "os.rename"]
    assert {path.name for path in (runs / "run").iterdir()} == set(final)
    assert set(final) == {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt"}
    assert final.count("config.yaml") == 1
    assert final.count("metrics.csv") == len(metrics(folder / "two" / "runs" / "run")) == 2
    assert {path.name for path in runs.iterdir()} - {".run.lock"} == {"run"}
    lines = printed.stdout.splitlines()
    assert len(lines) == len(set(lines)) == 3
    assert [line[:8] for line in lines] == ["epoch 0:", "epoch 1:", "checkpoi"]
    assert "error: " not in printed.stderr


def test_an_error_of_one_process_ends_both_with_a_sentence(folder, alone):
    ended = launch(command(folder / "failed", folder / "data", fail=(1, 1, "file")))
    assert ended.returncode == 2
    assert [line for line in ended.stderr.splitlines() if line.startswith("error: ")] == [
        "error: process 1 of 2: data.h5 is damaged; copy or make it again",
        "error: process 0 of 2: another process of this training has ended; see its message",
    ]


def test_a_process_ends_with_its_parent_wherever_it_waits(tmp_path):
    watch = inspect.getsource(end_with_parent)
    lines = ("from __future__ import annotations", "import os, threading, time", watch, "end_with_parent()")
    (tmp_path / "child.py").write_text("\n".join((*lines, "time.sleep(60)")))
    # without pipes, for which `run` would wait
    start = f"subprocess.Popen([sys.executable, {str(tmp_path / 'child.py')!r}], stdout=-3, stderr=-3)"
    parent = f"import subprocess, sys, time; print({start}.pid, flush=True); time.sleep(3)"
    started = subprocess.run([sys.executable, "-c", parent], capture_output=True, check=True)
    pid, deadline = int(started.stdout), time.monotonic() + 20
    try:
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not Path(f"/proc/{pid}").exists()
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_torchrun_and_the_trainer_count_the_same_processes():
    trainer, elastic = SimpleNamespace(world_size=1), {"TORCHELASTIC_RUN_ID": "x"}
    processes.check_started(trainer, {"WORLD_SIZE": "2"})  # as Lightning's own launcher leaves it
    processes.check_started(trainer, elastic | {"WORLD_SIZE": "1"})
    with pytest.raises(InputError, match="torchrun has started 2 processes, but the training is for 1; give --trainer"):
        processes.check_started(trainer, elastic | {"WORLD_SIZE": "2"})


def test_the_starter_numbers_the_processes():
    assert processes.process_number({}) == 0
    assert processes.process_number({"RANK": "9", "LOCAL_RANK": "1"}) == 9  # torchrun
    assert processes.process_number({"LOCAL_RANK": "1", "SLURM_PROCID": "0"}) == 1  # Lightning, in a job of one task
    assert processes.process_number({"SLURM_PROCID": "9"}) == 9  # srun


def test_lightning_does_not_requeue_the_jobs_of_slurm(tmp_path, monkeypatch):
    for name in ("NTASKS", "NTASKS_PER_NODE", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    cli = build(command(tmp_path, tmp_path))
    environment = cli.trainer._accelerator_connector.cluster_environment
    assert isinstance(environment, processes.SLURMEnvironment)
    assert not environment.auto_requeue


# --- slow ---------------------------------------------------------------------------------------------------------

launched = pytest.mark.parametrize("torchrun", [False, True], ids=["lightning", "torchrun"])


@pytest.mark.slow
def test_a_repeated_training_is_equal_to_the_last_bit(folder, two):
    """By torchrun, in the same folder, which keeps the earlier run."""
    ended = launch(command(folder / "two", folder / "data"), torchrun=True)
    assert ended.returncode == 0, ended.stderr
    for ours, theirs in zip(seen(folder / "two"), two, strict=True):
        assert ours["steps"] == theirs["steps"]
        assert ours["losses"] == theirs["losses"]
        assert equal(ours["weights"], theirs["weights"])
    runs = folder / "two" / "runs"
    assert {path.name for path in runs.iterdir()} - {".run.lock"} == {"run", "run-before-1"}
    assert ended.stdout.count("moved the previous run: it is kept in") == 1


@pytest.mark.slow
@launched
@pytest.mark.parametrize("how", ["raise", "nan", "SIGKILL"])
@pytest.mark.parametrize("process", [0, 1])
def test_a_failing_process_ends_both(folder, process, how, torchrun):
    run = folder / f"ends-{process}-{how}-{torchrun}"
    ended = launch(command(run, folder / "data", fail=(process, 1, how)), torchrun=torchrun)
    assert ended.returncode != 0
    if how == "SIGKILL":
        assert torchrun or process == 0 or "error: process 0 of 2: another process" in ended.stderr
    else:
        assert {"raise": "on purpose", "nan": "step 1 (epoch 0)"}[how] in ended.stderr


@pytest.mark.slow
@launched
def test_a_signal_to_one_process_saves_and_stops_both_and_a_resume_is_exact(folder, two, torchrun):
    run = folder / f"signal-{torchrun}"
    ended = launch(command(run, folder / "data", fail=(1, MIDDLE, "SIGUSR1")), torchrun=torchrun)
    assert ended.returncode != 0
    assert "last.ckpt" in ended.stderr
    ended = launch(command(run, folder / "data", "--resume=last"), torchrun=torchrun)
    assert ended.returncode == 0, ended.stderr
    for ours, theirs in zip(seen(run), two, strict=True):
        assert ours["steps"] == theirs["steps"][MIDDLE + 1 :]
        assert equal(ours["weights"], theirs["weights"])
    after, undisturbed = (metrics(each / "runs" / "run") for each in (run, folder / "two"))
    for name in ("epoch", "step", "val_loss", "val_ap", "train_loss"):
        assert [row[name] for row in after] == [row[name] for row in undisturbed]


@pytest.mark.slow
def test_compiled_descents_train_in_two_processes(folder, alone, two):
    run = folder / "compiled"
    ended = launch(command(run, folder / "data", "--model.decoder.init_args.compile=true", "--trainer.max_epochs=1"))
    assert ended.returncode == 0, ended.stderr
    assert "uncompiled" not in ended.stderr
    for ours, theirs in zip(seen(run), two, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"][: len(ours["losses"])], rel=1e-4)


@pytest.mark.slow
def test_files_batch_normalisation_and_random_starts_train_in_two_processes(tmp_path, tiny_data):
    """The processes agree, though each has its own batches and random numbers."""
    options = ("--data.init_args.num_workers=1", "--save_minutes=0")
    ended = launch(command(tmp_path, tiny_data, *options, config=TINY))
    assert ended.returncode == 0, ended.stderr
    ours, theirs = seen(tmp_path)
    shown = [sorted(chain(*ours["steps"][at : at + 2], *theirs["steps"][at : at + 2])) for at in (0, 2)]
    assert all(len(set(epoch)) == 32 for epoch in shown)
    assert equal(ours["weights"], theirs["weights"])
    saved = torch.load(tmp_path / "runs" / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, ours["weights"][name]) for name, value in saved.items())
    for each in (ours, theirs):
        del each["metrics"]["loss"]
    assert ours["metrics"] == theirs["metrics"]
