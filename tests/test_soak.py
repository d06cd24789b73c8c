"""Half an hour of training: memory, files, threads, processes, folders and the time of a step do not grow."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from soak import FILES, MEMORY, WORKERS_MEMORY, Sample, family, growth, look, rows, table

ROOT = Path(__file__).resolve().parents[1]
MINUTES = float(os.environ.get("SETPRED_SOAK_MINUTES", "30"))
EVERY = 10 if MINUTES >= 10 else 2  # seconds
WARM_UP = 0.15  # of the time: the first validations and checkpoints take memory that stays

CONFIG = """
model:
  encoder:
    class_path: setpred.encoders.SmallCNN
    init_args: {image_size: 32, latent_dim: 32, width: 8}
  decoder:
    class_path: setpred.decoders.IDSPN
    init_args:
      set_size: 6
      objective:
        class_path: setpred.inner.EquilibriumMatching
        init_args:
          set_encoder:
            class_path: setpred.aggregators.SetEncoder
            init_args:
              hidden_dim: 32
              aggregator:
                class_path: setpred.aggregators.EquilibriumAggregation
                init_args:
                  in_dim: 32
                  prior: {class_path: setpred.aggregators.FSPool, init_args: {in_dim: 32, set_size: 6}}
                  potential:
                    class_path: setpred.aggregators.ResidualPotential
                    init_args: {in_dim: 32, state_dim: 32, widths: [32, 16]}
                  gain: 0.0
      descent:
        class_path: setpred.inner.GradientDescent
        init_args: {iterations: 10, learning_rate: 4.0, momentum: 0.9, clip: 10.0}
  learning_rate: 1.0e-3
trainer: {max_epochs: -1, accelerator: cpu, precision: 32-true, logger: false}
data:
  class_path: setpred.data.datamodule.CLASS
  init_args:
    {LENGTH, val_images: 32, image_size: 32, objects: [3, 6], set_size: 6, batch_size: 16, num_workers: 2, workers: 1,
     in_memory: false, folder: FOLDER}
"""
DATA = {
    "file": ("setpred.data.datamodule.RenderedScenes", "train_images: 160"),
    "streamed": ("setpred.data.streamed.StreamedScenes", "scenes_per_epoch: 160"),
}


def metrics(run: Path) -> list[dict[str, str]]:
    try:
        with (run / "metrics.csv").open(newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
def test_half_an_hour_of_training_leaves_nothing_behind(data, tmp_path, capsys):
    """Half of the time with two workers on a file, half with streamed scenes; SETPRED_SOAK_MINUTES says how long.

    Validation and two checkpoints come with every epoch, a few seconds each. The table is printed, and with
    SETPRED_SOAK_OUT written into that folder, with all samples.
    """
    cls, length = DATA[data]
    config, log, run, temporary = (tmp_path / name for name in ("soak.yaml", "log", "soak", "temporary"))
    temporary.mkdir()
    text = CONFIG.replace("setpred.data.datamodule.CLASS", cls).replace("LENGTH", length)
    config.write_text(text.replace("FOLDER", str(tmp_path / "scenes")))
    samples: list[Sample] = []
    with log.open("w") as out:
        training = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(config), "--runs", str(tmp_path)],
            cwd=tmp_path,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            while not metrics(run):  # imports, rendering, the first epoch
                time.sleep(1)
                assert training.poll() is None, log.read_text()
            start = time.monotonic()
            while (seconds := time.monotonic() - start) < 60 * MINUTES / len(DATA):
                samples.append(look(training.pid, seconds, int(metrics(run)[-1]["step"]), run, temporary))
                time.sleep(EVERY)
                assert training.poll() is None, log.read_text()[-2000:]
            processes = family(training.pid)
        finally:
            training.send_signal(signal.SIGTERM)
            training.wait(timeout=120)
    time.sleep(1)
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]

    warm = [sample for sample in samples if sample.seconds >= WARM_UP * samples[-1].seconds]
    epochs = metrics(run)
    summary = {"epochs": len(epochs), "steps": epochs[-1]["step"], "seconds": round(samples[-1].seconds)}
    lines = [f"{data}: {summary['epochs']} epochs, {summary['steps']} steps, {summary['seconds']} s"]
    lines += [f"  {name:26}{first:>10}{last:>10}" for name, (first, last) in table(warm).items()]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    if out := os.environ.get("SETPRED_SOAK_OUT"):
        Path(out).mkdir(parents=True, exist_ok=True)
        told = [{"what": name, "first": a, "last": b} for name, (a, b) in table(warm).items()]
        told += [{"what": name, "last": value} for name, value in summary.items()]
        for name, content in ((f"soak-{data}.csv", told), (f"soak-{data}-samples.csv", rows(samples))):
            with (Path(out) / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, content[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(content)

    assert [int(row["epoch"]) for row in epochs] == list(range(len(epochs)))
    step = int(epochs[0]["step"])
    assert [int(row["step"]) for row in epochs] == [step * (epoch + 1) for epoch in range(len(epochs))]
    assert not [path for path in temporary.iterdir() if path.name != "torchinductor_root"]
    assert not [path for path in run.iterdir() if "partial" in path.name]
    assert not growth(warm)


# --- the watching itself ------------------------------------------------------------------------------------


def steady(count: int = 60) -> list[Sample]:
    """What a training without leaks looks like."""
    names = ("best.ckpt", "config.yaml", "last.ckpt", "metrics.csv")
    return [Sample(10.0 * i, 500_000_000, 800_000_000, 80, 9, 4, 9.0 * i, 100 * i, 10**6, names) for i in range(count)]


def test_a_steady_training_is_one_that_does_not_grow():
    assert growth(steady()) == []
    assert table(steady())["steps a second"] == (10.0, 10.0)


@pytest.mark.parametrize(
    ("what", "grow"),
    [
        ("memory", lambda value, i: value + i * 2 * MEMORY // 60),
        ("workers_memory", lambda value, i: value + i * 2 * WORKERS_MEMORY // 60),
        ("files", lambda value, i: value + i * 2 * FILES // 40),
        ("threads", lambda value, i: value + (i > 50)),
        ("workers", lambda value, i: value + (i > 50)),
        ("processor", lambda value, i: value * (1 + 0.01 * i)),
        ("seconds", lambda value, i: value * (1 + 0.2 * i)),
        ("folder_bytes", lambda value, i: value + 1000 * i),
        ("names", lambda value, i: (*value, "left-over") if i > 30 else value),
    ],
)
def test_growth_is_noticed(what, grow):
    samples = [
        dataclasses.replace(sample, **{what: grow(getattr(sample, what), i)}) for i, sample in enumerate(steady())
    ]
    assert len(growth(samples)) == 1


def test_a_process_is_seen_with_its_workers(tmp_path):
    """One that holds a file open and has a child of its own, which has one."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.ckpt").write_bytes(b"12345")
    (tmp_path / "run" / "last.ckpt.partial-1").write_bytes(b"123")
    (tmp_path / "run" / "metrics.csv").write_text("step")
    (tmp_path / "temporary").mkdir()
    child = "import sys; file = open(sys.executable); print('ready', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        seen = look(process.pid, 3.0, 7, tmp_path / "run", tmp_path / "temporary")
        process.stdin.close()
    assert (seen.seconds, seen.step, seen.workers, seen.threads) == (3.0, 7, 1, 2)
    assert 10**6 < seen.memory < 10**8
    assert 10**6 < seen.workers_memory < 10**8
    assert seen.files > 6
    assert seen.folder_bytes == 5
    assert seen.names == ("last.ckpt", "metrics.csv")
    assert family(process.pid) == [process.pid]
