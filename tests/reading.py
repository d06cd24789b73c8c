"""Files read in a process of its own, which may crash, hang or run out of memory without taking the tests along."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import resource
import select
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from setpred import CLEVR, InputError
from setpred.checkpoint.load import Checkpoint, load_checkpoint
from setpred.commands.predict import predict
from setpred.commands.train import build, check_fit
from setpred.data.clevr import ClevrFolder
from setpred.data.dataset import SetFile
from setpred.data.hdf5 import malformed, verify
from setpred.data.images import decoded, load_image

SECONDS = 20  # a law says ten; a machine may have more to do than this
MEMORY = 500 * 2**20  # that a file may take, however large it says it is
Answer = dict[str, Any]


def digest(*parts: Any) -> str:
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.numpy()
        if isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
        else:
            found.update(repr(part).encode(errors="surrogatepass"))
    return found.hexdigest()


def read_scenes(path: Path) -> Answer:
    """The scenes of a CLEVR folder, each image too."""
    folder = ClevrFolder(path.parents[1], "val")
    assert not malformed(folder.elements, CLEVR).any(), "a malformed set"
    assert (folder.index >= 0).all(), "an image with a negative number"
    assert len(folder) == len(folder.elements) == len(folder.index) == len(folder.centres) == len(folder.pixels)
    present = folder.elements[..., -1] == 1
    assert np.isfinite(folder.centres[present]).all(), "an object that is nowhere"
    for number in range(min(4, len(folder))):
        assert not np.isinf(folder.camera(number)).any(), "a camera at infinity"
        assert folder.image(number, 16).shape == (16, 16, 3)
    return {"content": digest(folder.elements, folder.index, folder.centres, folder.pixels, folder.file_names)}


def read_hdf5(path: Path) -> Answer:
    """A prepared file as trainings read it, and by `verify`."""
    data = SetFile(path)
    batch = data.__getitems__(range(len(data)))
    elements = batch["elements"].numpy()
    assert not malformed(elements, data.schema).any(), "a malformed set"
    assert batch["image"].shape == (len(data), 3, data.image_size, data.image_size)
    assert batch["image"].dtype == torch.uint8
    cameras = [data.camera(number) for number in range(len(data))]
    content = digest(data.schema, data.source, data.image_index, np.stack(cameras), elements, batch["image"].clone())
    try:
        verify(path)
    except InputError:
        return {"content": content, "verified": False}
    return {"content": content, "verified": True}


def read_image(path: Path) -> Answer:
    """A picture as folders are read, and as `setpred.commands.predict` reads it."""
    image = load_image(path, 16)
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8
    (again,) = decoded([str(path)], 16, threads=1)
    assert isinstance(again, np.ndarray), "read the one way and not the other"
    assert (image == again).all()
    return {"content": digest(image)}


def read_config(path: Path) -> Answer:
    """A configuration as train.py reads it, up to the first batch."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            cli = build(["--config", str(path), "--runs", str(path.parent), "--trainer.logger", "false"])
            cli.datamodule.setup("fit")
            check_fit(cli)
    except SystemExit as stopped:
        _, _, sentence = said.getvalue().partition("error: ")
        raise (InputError(sentence) if stopped.code == 2 else RuntimeError(f"status {stopped.code}")) from stopped
    assert all(bool(parameter.isfinite().all()) for parameter in cli.model.parameters()), "weights that are not finite"
    return {"content": digest(repr(cli.model), cli.model.learning_rate, len(cli.datamodule.train_data))}


def read_checkpoint(path: Path) -> Answer:
    """A checkpoint as evaluate.py and the others read it; its model sees a picture."""
    loaded: Checkpoint = load_checkpoint(path)
    weights = loaded.model.state_dict()
    assert all(bool(value.isfinite().all()) for value in weights.values()), "weights that are not finite"
    described = (loaded.schema, loaded.seed, loaded.epoch, loaded.step, loaded.image_size, loaded.data)
    content = digest(repr(loaded.model), described, *(x for item in sorted(weights.items()) for x in item))
    loaded.require_images(path)
    (seen,) = predict(loaded.model, [str(path.parent / "seen.png")], image_size=loaded.image_size, iterations=1)
    assert seen.elements.isfinite().all()
    loaded.schema.decode(seen.elements)
    return {"content": content}


READERS: dict[str, Callable[[Path], Answer]] = {
    "scenes": read_scenes,
    "hdf5": read_hdf5,
    "image": read_image,
    "config": read_config,
    "checkpoint": read_checkpoint,
}


def answer(kind: str, path: Path) -> Answer:
    try:
        return READERS[kind](path)
    except InputError as error:
        return {"refused": str(error)}
    except BaseException:  # which is what this is to find
        return {"fault": traceback.format_exc()}


class Reader:
    """A process that reads one file after another, and is started anew when one has ended it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pid: int | None = None

    def __call__(self, kind: str, path: Path) -> Answer:
        """What came of reading a file: "content", "refused" or "fault"."""
        if self.pid is None:
            self._start()
        os.write(self.requests, f"{json.dumps([kind, str(path)])}\n".encode())
        if not select.select([self.answers], [], [], SECONDS)[0]:
            self.close()
            return {"fault": f"no answer within {SECONDS} s"}
        line = self.answers.readline()
        if not line:
            _, status = os.waitpid(self.pid, 0)
            self.pid = None
            self._forget()
            return {"fault": f"the process ended with status {os.waitstatus_to_exitcode(status)}"}
        return json.loads(line)

    def _start(self) -> None:
        ours, self.requests = os.pipe()
        answers, theirs = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads of this process, which the child does not have
            self.pid = os.fork()
        if self.pid == 0:
            os.close(self.requests)
            os.close(answers)
            with contextlib.suppress(BaseException):
                serve(ours, theirs, self.folder)
            os._exit(99)
        os.close(ours)
        os.close(theirs)
        self.answers = os.fdopen(answers)

    def close(self) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = None
            self._forget()

    def _forget(self) -> None:
        os.close(self.requests)
        self.answers.close()


def serve(requests: int, answers: int, folder: Path) -> None:
    """Answers for as long as it is asked, with no more memory than it has now and `MEMORY`."""
    os.chdir(folder)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MEMORY,) * 2)
    for line in os.fdopen(requests):
        kind, path = json.loads(line)
        os.write(answers, f"{json.dumps(answer(kind, Path(path)))}\n".encode())
