"""The command line of train.py."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse.typing import NonNegativeFloat
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from setpred.checkpoint import load as checkpoint
from setpred.checkpoint.load import read_checkpoint
from setpred.commands.common import exit_code
from setpred.commands.config import MODE, Parser, differences, guarded, plain, require_room, split_allow, without
from setpred.data.toy import World
from setpred.errors import InputError, reason
from setpred.files import make_folder, remove_leftovers, write_atomically
from setpred.training import distributed as processes
from setpred.training.callbacks import DataWaiting, EpochLines, MetricsFile, ResidualGrowth, SkippedSteps, TrainLoss
from setpred.training.checkpointing import AtomicCheckpointIO, BestCheckpoint, Interrupted, LastCheckpoint
from setpred.training.mixed_precision import training_precision
from setpred.training.run_folder import earlier_run_aside, newest_checkpoint, run_lock
from setpred.training.statistics import HASTY_IMAGES, STATISTICS_IMAGES
from setpred.training.task import SetPrediction

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"
CHECKPOINTS = Path("checkpoints")
NEWEST = ("last", "auto")  # what --resume takes besides a path


class TrainCLI(LightningCLI):
    """LightningCLI with a run folder and `--resume`.

    What is in force, the later over the earlier: defaults, `--config` files in order, other options. A resumed run
    takes weights, optimiser state and position from the checkpoint, and all settings from there too; the model must
    be the same, and other settings that have changed are said.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="run name; the configuration's unless given")
        parser.add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="'last', or the path of a checkpoint, to go on from; 'auto' is 'last' if there is one, else a new run",
        )
        parser.add_argument(
            "--init",
            type=str | None,
            default=None,
            help="a checkpoint whose weights a new run starts from (fine-tuning); the model must have the same parts",
        )
        parser.add_argument(
            "--save_minutes",
            type=NonNegativeFloat,
            default=10.0,
            help="last.ckpt is written at least so often within an epoch, besides its end. Each time the encoder also "
            f"sees {STATISTICS_IMAGES} images, to estimate batch statistics. 0: after every step, each time over "
            f"{HASTY_IMAGES} images, 1.4 times the quickstart's time",
        )
        parser.add_argument("--runs", type=str, default=str(CHECKPOINTS), help="folder that holds the runs")

    @property
    def folder(self) -> Path:
        return Path(self.config.runs) / self.config.name

    def resume_path(self) -> Path | None:
        """The checkpoint to go on from, checked to be readable and of the same model."""
        if self.config.resume is None:
            return None
        if self.config.resume == "auto" and not (self.folder / "last.ckpt").exists():
            return None
        if self.config.resume in NEWEST:
            found, content = newest_checkpoint(self.folder, self.say)
        else:
            found, content = Path(self.config.resume), read_checkpoint(self.config.resume)
        if "optimizer_states" not in content:
            raise InputError(f"{found} holds weights only and cannot be resumed; resume from the .ckpt it was made of")
        saved = content[checkpoint.KEY]
        models = (without(config, "compile") for config in (saved.get("model"), self.model.model_config))
        if saved.get("model") and (changes := differences(*models)):
            raise InputError(
                f"{found} is of another model than asked for: {'; '.join(changes[:5])}; "
                "resume with the configuration it was trained with"
            )
        if changes := differences(saved.get("settings") or {}, self.model.settings):
            self.say("resumed with other settings: " + "; ".join(changes))
        done, most = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"], self.trainer.max_epochs
        if most not in (None, -1) and done >= most:
            self.say(f"nothing left to train: {found} has {done} epochs of {most}")
        return found

    def initial_weights(self) -> dict[str, Tensor] | None:
        """The weights that `--init` names, checked to fit the model; None without it."""
        if self.config.init is None:
            return None
        state, own = read_checkpoint(self.config.init)["state_dict"], self.model.state_dict()
        sizes = [
            {name: list(tensor.shape) for name, tensor in weights.items() if name.startswith("model.")}
            for weights in (state, own)
        ]
        if changes := differences(*sizes):
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise InputError(
                f"--init {self.config.init}: its weights do not fit the model: {'; '.join(changes[:3])}{more}; "
                "use a configuration with the same parts"
            )
        return own | {name: state[name] for name in sizes[0]}

    def say(self, sentence: str) -> None:
        """Prints it, once for all processes."""
        if self.trainer.is_global_zero:
            print(sentence, flush=True)

    def before_instantiate_classes(self) -> None:
        if self.config.name is None:
            configs = self.config.config or []
            self.config.name = Path(str(configs[-1])).stem if configs else "run"

    def instantiate_classes(self) -> None:
        require_room(plain(self.config.model))
        try:
            super().instantiate_classes()
        except Exception as error:  # whatever a part makes of its arguments
            raise InputError(f"the configuration cannot be built: {str(error) or type(error).__name__}") from error

    def instantiate_trainer(self, **arguments: Any) -> pl.Trainer:
        model = plain(self.config.model)
        self.model.model_config = {part: model.pop(part) for part in ("encoder", "decoder")}
        self.model.settings = {"model": model, "data": plain(self.config.data), "seed": self.config.seed_everything}
        self.model.seed = int(self.config.seed_everything or 0)
        if getattr(self.datamodule, "seed", 0) is None:
            self.datamodule.seed = self.model.seed
        named = {"path": "val_path", "split": "val_split", "image_size": "image_size"}
        described = {key: getattr(self.datamodule, name, None) for key, name in named.items()}
        if described["image_size"] is None:
            described["image_size"] = getattr(self.model.model.encoder, "image_size", None)
        self.model.data_description = described
        terminal = sys.stdout.isatty()  # where Lightning's bar goes
        minutes = self.config.save_minutes
        # two, since one with `save_last` writes last.ckpt only when it also saves a better one
        saving = [BestCheckpoint(self.folder, self.model.monitor, self.model.mode)]
        saving += [LastCheckpoint(self.folder / "last.ckpt", minutes=minutes)]
        measuring = [TrainLoss(), DataWaiting(), SkippedSteps(), ResidualGrowth()]
        callbacks = [*measuring, MetricsFile(self.folder / "metrics.csv"), *saving]
        callbacks += [EpochLines(), *([TQDMProgressBar(leave=False)] if terminal else [])]
        given = self.config_init.trainer.callbacks or []
        arguments |= {
            "callbacks": [*given, *callbacks],
            "enable_progress_bar": terminal,
            "default_root_dir": str(self.folder),
            "plugins": [*(self.config_init.trainer.plugins or []), AtomicCheckpointIO(), *processes.slurm_plugins()],
            "logger": self._logger(),
        }
        if str(self.config.trainer.precision) in ("64", "64-true"):
            raise InputError(
                "expected a precision of 32 bits or less, got 64-true: data and descent are float32; leave it out"
            )
        if str(self.config.trainer.strategy).endswith(("_spawn", "_fork", "_notebook")):
            raise InputError(
                f"expected strategy auto or ddp, got {self.config.trainer.strategy}, whose processes would each begin "
                "a run; pass --trainer.strategy ddp"
            )
        if self.config.trainer.precision is None:
            arguments["precision"] = training_precision(self.config.trainer.accelerator)
        trainer = super().instantiate_trainer(**arguments)
        processes.check_started(trainer)
        if trainer.world_size > 1 and self.config.trainer.strategy in ("auto", "ddp"):
            arguments |= {"strategy": processes.STRATEGY, "callbacks": [*given, *callbacks]}
            trainer = super().instantiate_trainer(**arguments)
        return trainer

    def _logger(self) -> Any:
        """TensorBoard where it is installed, unless the configuration says otherwise; metrics.csv is always written."""
        chosen = self.config_init.trainer.logger
        if chosen is not None:
            return chosen
        if importlib.util.find_spec("tensorboard") is None:
            return False
        return TensorBoardLogger(self.config.runs, name=self.config.name, version="tensorboard")


def check_fit(cli: TrainCLI) -> None:
    """Model and data must speak of the same inputs and of sets of the same size."""
    takes, gives = cli.model.model.takes_sets, isinstance(cli.datamodule, World)
    if takes != gives:
        kinds = ("images", "sets")
        raise InputError(
            f"the encoder {type(cli.model.model.encoder).__name__} takes {kinds[takes]}, the data "
            f"{type(cli.datamodule).__name__} has {kinds[gives]}; give both of one kind"
        )
    if gives and cli.datamodule.input_dim != cli.model.model.encoder.in_dim:
        raise InputError(
            f"the encoder takes elements of {cli.model.model.encoder.in_dim} numbers, the data has elements of "
            f"{cli.datamodule.input_dim}; give the encoder that set_dim"
        )
    sees, given = (getattr(part, "image_size", None) for part in (cli.model.model.encoder, cli.datamodule))
    if None not in (sees, given) and sees != given:
        raise InputError(
            f"the encoder takes images of {sees}x{sees}, the data has {given}x{given}; give both the same image_size "
            "(model.encoder.init_args.image_size and data.init_args.image_size)"
        )
    model_size = getattr(cli.model.model.decoder, "set_size", None)
    data_size = getattr(getattr(cli.datamodule, "train_data", None), "set_size", model_size)
    if model_size not in (None, data_size):
        raise InputError(
            f"the decoder predicts sets of {model_size}, the data has sets of {data_size}; give both the same "
            "set_size (model.decoder.init_args.set_size and data.init_args.set_size)"
        )
    size = cli.model.data_description["image_size"]
    if size is None and not gives:
        names = " nor ".join(type(part).__name__ for part in (cli.datamodule, cli.model.model.encoder))
        cli.say(
            f"evaluate.py and predict will not read the checkpoints of this run: neither {names} has an image_size; "
            "give one of them that attribute"
        )
    elif not gives:
        check_prediction(cli.model, image_size=size)


def check_prediction(module: SetPrediction, *, image_size: int) -> None:
    """Predict the sets of two black images, to find a user's part with a wrong interface before training.

    Raises:
        InputError: the model raises an error, or does not return elements of the schema.
    """
    model = module.model
    names = f"{type(model.encoder).__name__} and {type(model.decoder).__name__}"
    if getattr(model.decoder, "compiled", False):  # would compile for this batch, too
        return
    training = module.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            predicted = module.eval()(torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8))
    except InputError:
        raise
    except Exception as error:  # a user's part can raise any exception
        raise InputError(
            f"the model of {names} cannot predict: {reason(error)}; see docs/parts.md for the interface of parts"
        ) from error
    finally:
        module.train(training)
    dim = None if module.schema is None else module.schema.set_dim
    shape = list(predicted.shape) if isinstance(predicted, Tensor) else None
    if shape is None or len(shape) != 3 or shape[0] != 2 or (dim is not None and shape[2] != dim):
        given = type(predicted).__name__ if shape is None else shape
        raise InputError(
            f"the model of {names}: expected elements [batch, set_size, {'set_dim' if dim is None else dim}], got "
            f"{given} for a batch of 2; see docs/parts.md for the interface of parts"
        )


def quiet() -> None:
    """Drops Lightning's advertising and advice that does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own calls
    for message in (
        ".*LightningCLI's args parameter.*",
        ".*does not have many workers.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*GPU available but not used.*",
        ".*callbacks used to create the checkpoint.*",  # resumed from one of other callbacks
        ".*The dirpath has changed.*",  # resumed from elsewhere: the best so far starts anew
        ".*find_unused_parameters=True was specified.*",  # where all happen to be used
        ".*LeafSpec.*",  # of torch, on itself
    ):
        warnings.filterwarnings("ignore", message=message)


def default_config(arguments: list[str]) -> Path:
    """What to run without `--config`: the configuration beside a checkpoint that is resumed, else the quickstart."""
    look = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    look.add_argument("--resume")
    resumed = look.parse_known_args(arguments)[0].resume
    beside = Path(resumed or "last").parent / "config.yaml"
    return beside if resumed not in (None, *NEWEST) and beside.is_file() else QUICKSTART


def build(arguments: list[str]) -> TrainCLI:
    """Parses the options of train.py and builds model, data and trainer; the quickstart if no config is given.

    Raises:
        InputError: what cannot be built; a file that asks for classes which may not be named, see `guarded`.
    """
    allow, arguments = split_allow(arguments)
    if not any(argument in ("-c", "--config") or argument.startswith("--config=") for argument in arguments):
        arguments = ["--config", str(default_config(arguments)), *arguments]
    quiet()
    with guarded(arguments, allow):
        return TrainCLI(
            SetPrediction,
            subclass_mode_data=True,
            datamodule_class=pl.LightningDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            trainer_defaults={
                "inference_mode": False,  # the inner descent needs gradients in validation too
                "enable_model_summary": False,
                "num_sanity_val_steps": 0,
            },
            run=False,
            args=arguments,
            parser_class=Parser,
            parser_kwargs={
                "description": "Train a set predictor; without --config, the quickstart on built-in scenes.",
                "usage": "train.py [--config FILE] [--resume last] [--allow PACKAGE.CLASS] [options]   "
                "(train.py --help lists them all)",
                "parser_mode": MODE,
                "allow_abbrev": False,  # a mistyped key is refused, not taken for a longer one
            },
        )


def train(arguments: list[str] | None = None) -> Path:
    """Runs train.py with these command line arguments (`sys.argv` unless given).

    Returns:
        The run's folder, with best.ckpt, last.ckpt, config.yaml and metrics.csv.

    Raises:
        InputError: bad configuration, data or checkpoint; a loss that is not finite; a disk that does not take files.
    """
    cli = build(sys.argv[1:] if arguments is None else arguments)
    with ExitStack() as held:
        if cli.trainer.is_global_zero:
            held.enter_context(run_lock(cli.folder))
        resume = cli.resume_path()
        weights = cli.initial_weights() if resume is None else None
        if cli.trainer.is_global_zero:
            # what can fail by the user's mistakes comes first, so that an earlier run stays in place
            cli.datamodule.prepare_data()
            cli.datamodule.setup("fit")
            check_fit(cli)
            if resume is None or resume.resolve().parent != cli.folder.resolve():
                held.enter_context(earlier_run_aside(cli.folder))
            make_folder(cli.folder)
            remove_leftovers(cli.folder)
            repeatable = cli.config.clone()
            repeatable.resume = None
            write_atomically(cli.folder / "config.yaml", cli.parser.dump(repeatable, skip_none=False))
        if weights is not None:
            cli.model.load_state_dict(weights)
        fit(cli, resume)
    cli.say(f"checkpoints, configuration and metrics are in {cli.folder}")
    return cli.folder


def fit(cli: TrainCLI, resume: Path | None) -> None:
    """Train; raise `Interrupted` where a signal stops the training."""
    last = cli.folder / "last.ckpt"
    try:
        with processes.common_end(cli.trainer):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
    except SystemExit as stopped:  # Lightning's end on a second Ctrl-C, and on signals before the first step
        raise Interrupted(last) from stopped
    except (MisconfigurationException, ValueError) as error:
        if isinstance(error, InputError) or cli.trainer.global_step or not _raised_by_lightning(error):
            raise
        raise InputError(f"the trainer cannot start with these options: {reason(error)}") from error
    if cli.trainer.interrupted or cli.trainer.received_sigterm:
        raise Interrupted(last)


def _raised_by_lightning(error: BaseException) -> bool:
    """Whether the innermost frame of its traceback is the trainer's, not a part's."""
    innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
    return innermost.f_globals.get("__name__", "").startswith("lightning.")


def main() -> int:
    """Run train.py; return the exit status."""
    try:
        return exit_code(lambda: train() and None, interrupted="interrupted")
    except Interrupted as stopped:
        if processes.process_number() == 0:
            print(stopped, file=sys.stderr)
        return stopped.status
