"""Half an hour of training: memory, files, threads, processes, folders and the time of a step do not grow."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tiny import CONFIG, metrics

ROOT = Path(__file__).resolve().parents[1]
MINUTES = float(os.environ.get("SETPRED_SOAK_MINUTES", "30"))
EVERY = 10 if MINUTES >= 10 else 2  # seconds
WARM_UP = 0.15  # of the time: the first validations and checkpoints take memory that stays
MEGABYTE = 2**20
ALLOWED = {  # growth of the maximum from the first third of the time to the last
    "memory": 24 * MEGABYTE,  # malloc's fluctuation
    "workers_memory": 16 * MEGABYTE,
    "files": 8,  # batches on their way between processes are open files
    "threads": 0,
    "workers": 0,
}
SLOWER = {"processor": 1.3, "seconds": 4.0}  # growth of a step's time: caches and the clock are shared with other jobs
DATA = {  # both with epochs of ten steps
    "file": CONFIG.replace("train_images: 40", "train_images: 80, in_memory: false"),
    "streamed": CONFIG.replace("datamodule.RenderedScenes", "streamed.StreamedScenes").replace(
        "train_images: 40", "scenes_per_epoch: 80"
    ),
}


@dataclass(frozen=True)
class Sample:
    """State of a process and its children, the workers, at one moment."""

    seconds: float
    memory: int  # resident bytes of the process
    workers_memory: int  # resident bytes of all workers, shared memory counted for each
    files: int  # open files of all processes
    threads: int  # of all processes
    workers: int
    processor: float  # seconds used by all processes
    step: int  # of the last row of metrics.csv
    folder_bytes: int  # of the run's folder without metrics.csv
    names: tuple[str, ...]  # in the run's folder and the temporary folder


def stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; empty once the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def family(pid: int) -> list[int]:
    """The process and its descendants."""
    found = [pid]
    parents = {int(entry): int((stat(int(entry)) or ["", 0])[1]) for entry in os.listdir("/proc") if entry.isdigit()}
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def look(pid: int, seconds: float, step: int, run: Path, temporary: Path) -> Sample:
    """Sample a process and its workers."""
    memory, total = [], Counter()
    for each in family(pid):
        try:
            status = dict(line.split(":\t") for line in Path(f"/proc/{each}/status").read_text().splitlines())
            if "VmRSS" not in status:
                continue  # a zombie
            total["files"] += len(os.listdir(f"/proc/{each}/fd"))
        except OSError:
            continue  # gone by now
        memory.append(1024 * int(status["VmRSS"].split()[0]))
        total["threads"] += int(status["Threads"])
        total["processor"] += sum(map(int, stat(each)[11:13] or ["0"])) / os.sysconf("SC_CLK_TCK")
    sizes = {path.name: path.stat().st_size for path in run.glob("*") if ".partial" not in path.name}
    size = sum(sizes.values()) - sizes.get("metrics.csv", 0)
    names = tuple(sorted([*sizes, *os.listdir(temporary)]))
    workers = len(memory) - 1
    return Sample(
        seconds, memory[0], sum(memory[1:]), workers=workers, step=step, folder_bytes=size, names=names, **total
    )


def thirds(samples: list[Sample]) -> dict[str, tuple[float, float]]:
    """Numbers of the first and the last third: maxima, and seconds of a step."""
    count = len(samples) // 3
    parts = samples[:count], samples[-count:]
    found = {name: tuple(max(getattr(each, name) for each in part) for part in parts) for name in ALLOWED}
    for name in SLOWER:
        ends = [(part[0], part[-1]) for part in parts]
        found[name] = tuple((getattr(b, name) - getattr(a, name)) / (b.step - a.step) for a, b in ends)
    found["folder_bytes"] = tuple(sorted(each.folder_bytes for each in part)[len(part) // 2] for part in parts)
    return found


def growth(samples: list[Sample]) -> list[str]:
    """Numbers that grew, after a warm-up; empty for a training without leaks."""
    count, found = len(samples) // 3, []
    most = {name: (lambda before, more=more: before + more) for name, more in ALLOWED.items()}
    most |= {name: (lambda before, factor=factor: factor * before) for name, factor in SLOWER.items()}
    most["folder_bytes"] = lambda before: 1.02 * before
    for name, (before, after) in thirds(samples).items():
        if after > most[name](before):
            found.append(f"{name} grew from {before:,} to {after:,}")
    names = [set.intersection(*(set(each.names) for each in part)) for part in (samples[:count], samples[-count:])]
    return found + ([f"files came or went: {sorted(names[0] ^ names[1])}"] if names[0] != names[1] else [])


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
def test_half_an_hour_of_training_leaves_nothing_behind(data, tmp_path, capsys):
    """Half of the time with two workers on a file, half with streamed scenes; SETPRED_SOAK_MINUTES sets the time.

    Validation and two checkpoints come with every epoch, a few seconds each. The table is printed.
    """
    config, log, run, temporary = (tmp_path / name for name in ("soak.yaml", "log", "soak", "temporary"))
    temporary.mkdir()
    config.write_text(DATA[data])
    options = [f"--data.init_args.folder={tmp_path / 'scenes'}", "--data.init_args.num_workers=2"]
    options += ["--trainer.max_epochs=-1", "--trainer.logger=false", "--model.schedule=null"]
    samples: list[Sample] = []
    with log.open("w") as out:
        training = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(config), "--runs", str(tmp_path), *options],
            cwd=tmp_path,
            env=os.environ | {"TMPDIR": str(temporary)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            while not (run / "metrics.csv").exists():  # imports, rendering, the first epoch
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
    assert all(each.memory > 10**7 and each.files > 6 and each.threads > each.workers >= 0 for each in samples)
    warm, epochs = [sample for sample in samples if sample.seconds >= WARM_UP * samples[-1].seconds], metrics(run)
    with capsys.disabled():
        print(f"\n{data}: {len(epochs)} epochs, {epochs[-1]['step']} steps, {samples[-1].seconds:.0f} s")
        for name, (first, last) in thirds(warm).items():
            print(f"  {name:26}{first:>16,.4g}{last:>16,.4g}")
    assert [int(row["epoch"]) for row in epochs] == list(range(len(epochs)))
    step = int(epochs[0]["step"])
    assert [int(row["step"]) for row in epochs] == [step * (epoch + 1) for epoch in range(len(epochs))]
    assert not [path for path in temporary.iterdir() if path.name != "torchinductor_root"]
    assert not [path for path in run.iterdir() if "partial" in path.name]
    assert max(each.workers for each in samples) >= 2
    assert not growth(warm)


# --- the samples themselves -----------------------------------------------------------------------------------------


def steady(count: int = 60) -> list[Sample]:
    """Samples of a training without leaks."""
    names = ("best.ckpt", "config.yaml", "last.ckpt", "metrics.csv")
    return [Sample(10.0 * i, 500_000_000, 800_000_000, 80, 9, 4, 9.0 * i, 100 * i, 10**6, names) for i in range(count)]


@pytest.mark.parametrize(
    ("name", "grow"),
    [
        ("memory", lambda value, i: value + i * 2 * ALLOWED["memory"] // 60),
        ("workers_memory", lambda value, i: value + i * 2 * ALLOWED["workers_memory"] // 60),
        ("files", lambda value, i: value + i * 2 * ALLOWED["files"] // 40),
        ("threads", lambda value, i: value + (i > 50)),
        ("workers", lambda value, i: value + (i > 50)),
        ("processor", lambda value, i: value * (1 + 0.01 * i)),
        ("seconds", lambda value, i: value * (1 + 0.2 * i)),
        ("folder_bytes", lambda value, i: value + 1000 * i),
        ("names", lambda value, i: (*value, "left-over") if i > 30 else value),
    ],
)
def test_growth_is_noticed(name, grow):
    assert growth(steady()) == []
    samples = [replace(sample, **{name: grow(getattr(sample, name), i)}) for i, sample in enumerate(steady())]
    assert len(growth(samples)) == 1
