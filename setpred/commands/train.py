"""Train a set predictor: `setpred train`, also `python train.py`."""

import importlib.util
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
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
from torch import Tensor, nn

from setpred.checkpoint import load as checkpoint
from setpred.checkpoint.load import read_checkpoint
from setpred.commands.common import Parser as OptionParser
from setpred.commands.common import exit_code
from setpred.commands.config import MODE, Parser, chain, differences, guarded, plain, require_room, set_aside, without
from setpred.commands.linking import data_sizes, expanded_data
from setpred.commands.mistyped import in_full
from setpred.data.datamodule import BuiltInScenes, SetDataModule
from setpred.data.hdf5 import stated_digest
from setpred.errors import InputError, listed, located, reason
from setpred.files import make_folder, remove_leftovers, write_atomically
from setpred.model import target_name
from setpred.training import distributed as processes
from setpred.training.callbacks import (
    DataWaiting,
    EpochLines,
    FinalValidation,
    MetricsFile,
    ResidualGrowth,
    SkippedSteps,
    TrainLoss,
)
from setpred.training.checkpointing import AtomicCheckpointIO, BestCheckpoint, Interrupted, LastCheckpoint
from setpred.training.mixed_precision import training_precision
from setpred.training.run_folder import earlier_run_aside, newest_checkpoint, run_lock
from setpred.training.statistics import HASTY_IMAGES, STATISTICS_IMAGES
from setpred.training.task import SetPrediction

HELP = """\
usage: setpred train --data train.h5 --val val.h5 [options]
       setpred train --config FILE.yaml [options]
       setpred train --config FILE.yaml --resume last [options]

Train a set predictor: a default model on your own data, made by `setpred data import`; or the model
and the data of a configuration, such as those in configs/. The third form continues a run. Without
data and configuration, the quickstart trains on built-in scenes.

  --data FILE.h5         training data; they give the schema and all sizes
  --val FILE.h5          validation data, of the same schema
  --config FILE.yaml     configuration; repeatable, later files override earlier ones
  --name NAME            name of the run (default: that of the data or the configuration)
  --runs FOLDER          folder of all runs (default: checkpoints)
  --resume last          continue the run NAME, or the checkpoint of a path; auto: only if there is one
  --init CHECKPOINT      start from the weights of a checkpoint or release that fit (fine-tuning)
  --epochs N             passes over the training data (--trainer.max_epochs)
  --batch_size N         examples of a step (--data.init_args.batch_size)
  --lr X                 largest learning rate (--model.learning_rate)
  --seed N               seed of weights and order (--seed_everything)
  --save_minutes M       save last.ckpt at least every M minutes (default: 10; 0: after every step)
  --allow PACKAGE.CLASS  trust a class of your own that a configuration names; repeatable
  --KEY.KEY VALUE        override a key of the configuration, such as --trainer.devices 2,
                         --model.weight_decay 0.01 or --data.init_args.augment.flip true

More: --print_config prints every key with its value and exits. `setpred parts` lists encoders,
decoders, losses and other parts, `setpred parts NAME` describes one. --help_all describes every key
of the trainer, too (3,000 lines).

The run's folder gets best.ckpt, last.ckpt, config.yaml and metrics.csv; `setpred
evaluate` and `setpred predict` take the checkpoints. docs/own_data.md and docs/training.md say more."""

QUICKSTART = Path(__file__).resolve().parents[1] / "configs" / "quickstart.yaml"
CHECKPOINTS = Path("checkpoints")
# begin of messages that the parser wraps around the error of a part
OF_PARSER = re.compile("Does not validate|Problem with given class_path|Parser key")
# of the trainer's options, which checks others itself
LEAST = {"accumulate_grad_batches": 1, "check_val_every_n_epoch": 1, "gradient_clip_val": 0}
LARGEST_SEED = 2**32 - 1  # NumPy's
STEPS = re.compile(r"--model\.decoder\.(.+\.)?iterations(=|$)")  # options of descent steps
NEWEST = ("last", "auto")  # values of --resume that are no paths
IGNORED_WARNINGS = (
    "LightningCLI's args parameter",
    "does not have many workers",
    "Checkpoint directory.*exists and is not empty",
    "GPU available but not used",
    "callbacks used to create the checkpoint",  # resumed with other callbacks
    "The dirpath has changed",  # resumed from another folder: the best score is reset
    "find_unused_parameters=True was specified",  # every parameter happens to be used
    "LeafSpec",  # of torch, about itself
    "in eval mode at the start of training",  # frozen parts
)


class TrainCLI(LightningCLI):
    """LightningCLI with a run folder, `--resume` and `--init`.

    Later values override earlier ones: defaults, `--config` files in order, other options. A resumed run takes
    weights, optimiser state and position from the checkpoint. Its model must be the same; changes of other settings
    are printed.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str | None, default=None, help="name of the run")
        parser.add_argument("--resume", type=str | None, default=None, help="'last', 'auto' or a path of a checkpoint")
        parser.add_argument("--init", type=str | None, default=None, help="a checkpoint of the first weights")
        parser.add_argument(
            "--save_minutes",
            type=NonNegativeFloat,
            default=10.0,
            help="longest time between two writes of last.ckpt within an epoch. For each the encoder sees "
            f"{STATISTICS_IMAGES} images, to estimate batch statistics; with 0, after every step, {HASTY_IMAGES}",
        )
        parser.add_argument("--runs", type=str, default=str(CHECKPOINTS), help="folder of all runs")

    @property
    def folder(self) -> Path:
        return Path(self.config.runs) / self.config.name

    def resume_path(self) -> Path | None:
        """Return the checkpoint to resume from, after checking that it is readable and of the same model."""
        asked, last = self.config.resume, self.folder / "last.ckpt"
        if asked is None or (asked == "auto" and not last.exists()):
            return None
        if asked in NEWEST:
            found, content = newest_checkpoint(self.folder, self.say)
        else:
            found, content = Path(asked), read_checkpoint(asked)
        if "optimizer_states" not in content:
            raise InputError(f"{found} holds weights only and cannot be resumed; resume from the .ckpt it was made of")
        saved = content[checkpoint.KEY]
        models = (without(config, "compile") for config in (saved.get("model"), self.model.model_config))
        if saved.get("model") and (changes := differences(*models)):
            raise InputError(
                f"{found} is of another model than asked for: {'; '.join(changes[:5])}; "
                "resume with the configuration it was trained with"
            )
        before, now = saved.get("settings") or {}, self.model.settings
        if "content" not in before:  # of an earlier version
            now = without(now, "content")
        if changes := differences(before, now):
            self.say("resumed with other settings: " + "; ".join(changes))
        epochs = self.trainer.max_epochs
        if epochs not in (None, -1) and "loops" in content:
            done = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
            if done >= epochs:
                self.say(f"nothing left to train: {found} has {done} epochs of {epochs}")
        return found

    def load_initial_weights(self) -> None:
        """Load the weights of `--init` that fit the model, and those of pretrained trunks that it leaves.

        Prints which weights keep their random start, and which parts keep it for ever because they are frozen.

        Raises:
            InputError: none fit; pretrained weights that cannot be downloaded.
        """
        model, taken = self.model.model, set()
        if self.config.init is not None:
            state, prefix = read_checkpoint(self.config.init)["state_dict"], "model."
            given = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
            taken, sentence = load_fitting(model, given, str(self.config.init))
            self.say(sentence)
        for name, part in model.named_modules():
            if hasattr(part, "load_pretrained") and not any(each.startswith(f"{name}.") for each in taken):
                part.load_pretrained()
                taken |= {f"{name}.{weights}" for weights, _ in part.named_parameters()}
        fixed = {name for name, weights in model.named_parameters() if not weights.requires_grad} - taken
        if parts := [name for name in self.config.model.frozen if any(each.startswith(f"{name}.") for each in fixed)]:
            self.say(
                f"frozen: {listed(sorted(parts))} keep{'s' * (len(parts) == 1)} their random start; pass --init "
                "CHECKPOINT to load trained weights"
            )

    def say(self, sentence: str) -> None:
        """Print a sentence, from the first process only."""
        if self.trainer.is_global_zero:
            print(sentence, flush=True)

    def parse_arguments(self, *arguments: Any) -> None:
        super().parse_arguments(*arguments)
        seed = self.config.seed_everything
        if not 0 <= int(seed or 0) <= LARGEST_SEED:  # the trainer sets it before anything is built
            raise InputError(f"--seed_everything: expected a seed from 0 to {LARGEST_SEED}, got {seed}")

    def before_instantiate_classes(self) -> None:
        if self.config.name is None:
            configs = self.config.config or []
            self.config.name = Path(str(configs[-1])).stem if configs else "run"
        if not (parts := Path(self.config.name).parts) or ".." in parts:  # the folder of all runs, or one outside
            raise InputError(f"--name: expected the name of a run, got {self.config.name!r}; choose another one")

    def instantiate_classes(self) -> None:
        require_room(plain(self.config.model))
        try:
            super().instantiate_classes()
        except Exception as error:  # a part can raise any exception for its arguments
            of_part = next((each for each in chain(error) if not OF_PARSER.match(str(each))), error)
            raise InputError(f"the configuration cannot be built: {str(of_part) or type(of_part).__name__}") from error

    def instantiate_trainer(self, **arguments: Any) -> pl.Trainer:
        options, given = self.config.trainer, self.config_init.trainer
        if str(options.precision) in ("64", "64-true", "16-true", "bf16-true"):
            raise InputError(
                f"expected precision 32-true, 16-mixed or bf16-mixed, got {options.precision}: data and descent are "
                "float32; leave it out"
            )
        if str(options.strategy).endswith(("_spawn", "_fork", "_notebook")):
            raise InputError(
                f"expected strategy auto or ddp, got {options.strategy}, whose processes would each begin "
                "a run; pass --trainer.strategy ddp"
            )
        for name, least in LEAST.items():
            if (value := options[name]) is not None and value < least:
                raise InputError(f"trainer.{name}: expected at least {least}, got {value}")
        self._describe()
        terminal = sys.stdout.isatty()  # where the progress bar is drawn
        callbacks = [
            *(given.callbacks or []),
            *(TrainLoss(), DataWaiting(), SkippedSteps(), ResidualGrowth()),
            MetricsFile(self.folder / "metrics.csv"),
            # two, since one with `save_last` writes last.ckpt only when it also saves a better one
            BestCheckpoint(self.folder, self.model.monitor, self.model.mode),
            LastCheckpoint(self.folder / "last.ckpt", minutes=self.config.save_minutes),
            EpochLines(),
            FinalValidation(),
            *([TQDMProgressBar(leave=False)] if terminal else []),
        ]
        plugins = given.plugins if isinstance(given.plugins, list) else [given.plugins]
        logger = given.logger
        if logger is None:  # metrics.csv is always written
            has_tensorboard = importlib.util.find_spec("tensorboard") is not None
            folder = {"name": self.config.name, "version": "tensorboard"}
            logger = TensorBoardLogger(self.config.runs, **folder) if has_tensorboard else False
        arguments |= {
            "enable_progress_bar": terminal,
            "default_root_dir": str(self.folder),
            "plugins": [*filter(None, plugins), AtomicCheckpointIO(), *processes.slurm_plugins()],
            "logger": logger,
        }
        if options.precision is None:
            arguments["precision"] = training_precision(options.accelerator)
        trainer = super().instantiate_trainer(**arguments, callbacks=[*callbacks])  # which adds to the list
        processes.check_started(trainer)
        if trainer.world_size > 1 and options.strategy in ("auto", "ddp"):
            arguments["strategy"] = processes.STRATEGY
            trainer = super().instantiate_trainer(**arguments, callbacks=[*callbacks])
        return trainer

    def _describe(self) -> None:
        """Give the module what its checkpoints say of model, settings, seed and validation data."""
        model, module, data = plain(self.config.model), self.model, self.datamodule
        module.model_config = {part: model.pop(part) for part in ("encoder", "decoder")}
        module.settings = {"model": model, "data": plain(self.config.data), "seed": self.config.seed_everything}
        module.seed = int(self.config.seed_everything or 0)
        if getattr(data, "seed", 0) is None:
            data.seed = module.seed
        module.describe_data(data)
        if files := data_digests(data):
            module.settings["content"] = files


def data_digests(data: pl.LightningDataModule) -> dict[str, str]:
    """SHA-256 of the content of the prepared files that a `SetDataModule` names; other data follow from settings."""
    if not isinstance(data, SetDataModule):
        return {}
    paths = {"train": data.train_path, "val": data.val_path}
    digests = {name: stated_digest(path) for name, path in paths.items() if path is not None}
    return {name: digest for name, digest in digests.items() if digest is not None}


def load_fitting(model: nn.Module, given: Mapping[str, Tensor], path: str) -> tuple[set[str], str]:
    """Load the weights whose names and shapes fit a model; return their names, and a sentence about the others.

    Raises:
        InputError: no matrix or kernel fits.
    """
    own = model.state_dict()
    taken = {name for name, value in given.items() if name in own and own[name].shape == value.shape}
    if not any(own[name].ndim > 1 for name in taken):
        raise InputError(
            f"--init {path}: expected weights that fit the model, but none has the name and shape of one of its; use a "
            "configuration with the same parts, such as the config.yaml in the checkpoint's folder"
        )
    model.load_state_dict({name: given[name] for name in taken}, strict=False)
    rest = [
        name + (f" ({_shape(given[name])} against {_shape(own[name])})" if name in given else "")
        for name in own
        if name not in taken
    ]
    unused = len(set(given) - set(own))
    sentence = f"--init {path}: took {len(taken)} of the model's {len(own)} tensors"
    sentence += f"; others keep their random start: {listed(rest)}" if rest else ""
    return taken, sentence + (f"; {unused} of the checkpoint have no place in it" if unused else "")


def _shape(value: Tensor) -> str:
    return "x".join(map(str, value.shape)) or "a number"


def check_fit(cli: TrainCLI) -> None:
    """Check that model and data have inputs of the same kind and size and sets of the same size, and predict once.

    Raises:
        InputError: they differ, or the model cannot predict.
    """
    encoder, data, train_data = cli.model.model.encoder, cli.datamodule, getattr(cli.datamodule, "train_data", None)
    examples = data_sizes(cli.config.data) if train_data is None else train_data  # None before scenes are rendered
    sets, has = getattr(data, "inputs", None), getattr(data, "input_dim", None) is not None
    kinds, takes = ("images", "sets"), cli.model.model.takes_sets
    if takes != has:
        raise InputError(
            f"the encoder {type(encoder).__name__} takes {kinds[takes]}, the data {type(data).__name__} has "
            f"{kinds[has]}; give both of one kind"
        )
    cli.model.check_schema(data)
    if target_name(cli.model.metric) == "instances" and not getattr(data, "masks", True):
        raise InputError(
            f"the metric {type(cli.model.metric).__name__} compares with masks, expected them in the validation data; "
            "pass --data.masks true"
        )
    wanted = None  # of images, when these are what the model learns to draw
    if target_name(cli.model.loss) == "elements":
        wanted = getattr(examples, "set_size", None)
    compared = (
        ("encoder takes elements of {} numbers", "elements of {}", "in_dim", getattr(data, "input_dim", None)),
        ("encoder takes images of {0}x{0}", "{0}x{0}", "image_size", getattr(data, "image_size", None)),
        ("decoder predicts sets of {}", "sets of {}", "set_size", wanted),
    )
    for of_model, of_data, name, size in compared:
        part = of_model.split()[0]
        if None not in (own := getattr(getattr(cli.model.model, part), name, None), size) and own != size:
            raise InputError(
                f"the {of_model.format(own)}, the data has {of_data.format(size)}; give both the same "
                f"{name.replace('in_dim', 'set_dim')} (in model.{part}.init_args and data.init_args)"
            )
    size = cli.model.data_description["image_size"]
    if sets is not None:
        zeros = torch.zeros(2, sets.most, sets.dim)
        check_prediction(cli.model, zeros, set_size=wanted)
    elif size is None and not has:
        cli.say(
            "`setpred evaluate` and `setpred predict` will not read the checkpoints of this run: neither "
            f"{type(data).__name__} nor {type(encoder).__name__} has an image_size; give one of them that attribute"
        )
    elif not has:
        black = torch.zeros(2, 3, size, size, dtype=torch.uint8)
        check_prediction(cli.model, black, set_size=wanted)


def check_prediction(module: SetPrediction, inputs: Tensor, *, set_size: int | None = None) -> None:
    """Predict the sets of two inputs, to find a user's part with a wrong interface before training.

    Raises:
        InputError: the model raises an error, does not return elements of the schema, or has no gradient.
    """
    model = module.model
    names = f"{type(model.encoder).__name__} and {type(model.decoder).__name__}"
    if getattr(model.decoder, "compiled", False):  # this batch would be compiled as well
        return
    training = module.training
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            predicted = module.eval()(inputs)
    except InputError:
        raise
    except Exception as error:  # a user's part can raise any exception
        raise InputError(f"the model of {names} cannot predict: {located(error)}; see docs/own_parts.md") from error
    finally:
        module.train(training)
    dim = None if module.schema is None else module.schema.set_dim
    got = list(predicted.shape) if isinstance(predicted, Tensor) else type(predicted).__name__
    fits = isinstance(got, list) and len(got) == 3 and got[0] == 2
    if not (fits and set_size in (None, got[1]) and dim in (None, got[2])):
        raise InputError(
            f"the model of {names}: expected elements [batch, {set_size or 'set_size'}, {dim or 'set_dim'}], got {got} "
            "for a batch of 2; see docs/own_parts.md"
        )
    check_truth(module, predicted, inputs)
    if not predicted.requires_grad and any(weights.requires_grad for weights in model.parameters()):
        raise InputError(
            f"the model of {names}: expected a prediction with a gradient, got one without; remove detach() or "
            "no_grad() from its forward pass"
        )


def check_truth(module: SetPrediction, predicted: Tensor, inputs: Tensor) -> None:
    """Compare a prediction of black images with these, to find a loss or metric of other predictions before training.

    Raises:
        InputError: a loss or metric of images or masks for a model of sets, or for other predictions; a loss of
            elements for a decoder of layers.
    """
    decoder, known = module.model.decoder, {"image": inputs, "instances": inputs[:, 0]}
    if getattr(decoder, "draws_layers", False) and target_name(module.loss) == "elements":
        raise InputError(
            f"the decoder {type(decoder).__name__} predicts layers of images, expected a loss of images, got "
            f"{type(module.loss).__name__}; pass --model.loss setpred.losses.Reconstruction"
        )
    if target_name(module.loss) == "elements":
        try:
            with torch.random.fork_rng(devices=[]):
                module.loss(predicted.detach().float(), torch.zeros_like(predicted, dtype=torch.float))
        except TypeError as error:  # other errors may be about the absence of objects
            raise InputError(
                f"the loss {type(module.loss).__name__}: {located(error)}; give a loss of (predicted, target), see "
                "docs/own_parts.md"
            ) from error
        except Exception:
            pass
    for part in (module.loss, module.metric):
        if (name := target_name(part)) not in known:
            continue
        if module.model.takes_sets:
            raise InputError(f"{type(part).__name__} compares with {name!r}, but the model takes sets; take another")
        try:
            (part if part is module.loss else part.update)(predicted.detach().float(), known[name])
        except Exception as error:  # a user's part can raise any exception
            raise InputError(
                f"{type(part).__name__}: {located(error)}; give model.decoder and the images sizes that fit it"
            ) from error
    if module.metric is not None:
        module.metric.reset()


def quiet() -> None:
    """Silence Lightning's advertising and its advice that does not apply here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of Lightning's own calls
    warnings.filterwarnings("ignore", message=f".*({'|'.join(IGNORED_WARNINGS)})")


def default_config(arguments: Sequence[str]) -> str:
    """Return the configuration of a run without `--config`: that next to a resumed checkpoint, else the quickstart."""
    early = OptionParser("train", "", add_help=False)
    early.add_argument("--resume", default="last")
    found = early.parse_known_args(list(arguments))[0].resume
    resumed = Path(found).parent / "config.yaml"
    return str(resumed if found not in NEWEST and resumed.is_file() else QUICKSTART)


def build(arguments: list[str]) -> TrainCLI:
    """Parse the options of `setpred train` and build model, data and trainer; the quickstart without `--config`.

    Raises:
        InputError: a configuration that cannot be built, or that names classes outside the list, see `guarded`.
    """
    early, rest = set_aside(in_full(arguments))
    configs, rest = expanded_data(early.config, rest, QUICKSTART)
    configs = configs or [default_config(rest)]
    # configurations come first, so that all other options override them, wherever they are
    arguments = [*(word for config in configs for word in ("--config", config)), *rest]
    by_epoch = "--model.iterations_by_epoch"
    if any(STEPS.match(word) for word in rest) and not any(word.partition("=")[0] == by_epoch for word in rest):
        arguments.append(f"{by_epoch}=null")  # of a configuration: it would override the steps that the user asks for
    quiet()
    with guarded(arguments, configs, early.allow):
        return TrainCLI(
            SetPrediction,
            subclass_mode_data=True,
            datamodule_class=pl.LightningDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # the inner descent needs gradients in validation too
            trainer_defaults={"inference_mode": False, "enable_model_summary": False, "num_sanity_val_steps": 0},
            run=False,
            args=arguments,
            parser_class=Parser,
            parser_kwargs={
                "prog": "setpred train",
                "usage": "setpred train [--config FILE] [options]; setpred train --help explains them",
                "parser_mode": MODE,
                "allow_abbrev": False,  # a mistyped key is an error, not a prefix of another
            },
        )


def train(arguments: list[str] | None = None) -> Path:
    """Run `setpred train` with these arguments, `sys.argv` by default.

    Returns:
        The run's folder, with best.ckpt, last.ckpt, config.yaml and metrics.csv.

    Raises:
        InputError: wrong configuration, data or checkpoint; a loss that is not finite; a file that cannot be written.
    """
    cli = build(sys.argv[1:] if arguments is None else arguments)
    with ExitStack() as held:
        if cli.trainer.is_global_zero:
            held.enter_context(run_lock(cli.folder))
        resume = cli.resume_path()
        if resume is None:
            cli.load_initial_weights()
        if cli.trainer.is_global_zero:
            prepare_data(cli)  # what can fail comes first, so that an earlier run stays in place
            if resume is None or resume.resolve().parent != cli.folder.resolve():
                held.enter_context(earlier_run_aside(cli.folder))
            make_folder(cli.folder)
            remove_leftovers(cli.folder)
            repeatable = cli.config.clone()
            repeatable.resume = None
            write_atomically(cli.folder / "config.yaml", cli.parser.dump(repeatable, skip_none=False))
        fit(cli, resume)
    if not (cli.folder / "best.ckpt").exists():
        cli.say(
            f"no validation ran, so there is no best.ckpt: use {cli.folder / 'last.ckpt'}, or train for longer, or "
            "with --trainer.check_val_every_n_epoch 1"
        )
    cli.say(f"checkpoints, configuration and metrics are in {cli.folder}")
    return cli.folder


def prepare_data(cli: TrainCLI) -> None:
    """Render or read the data; raise `InputError` if they do not fit the model, before they are rendered."""
    rendered = isinstance(cli.datamodule, BuiltInScenes)
    if rendered:
        check_fit(cli)
    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    if not rendered:
        check_fit(cli)


def fit(cli: TrainCLI, resume: Path | None) -> None:
    """Train; raise `Interrupted` where a signal stops the training."""
    last = cli.folder / "last.ckpt"
    try:
        with processes.common_end(cli.trainer):
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=resume, weights_only=True)
    except SystemExit as stopped:  # Lightning's end on a second Ctrl-C, and on signals before the first step
        raise Interrupted(last) from stopped
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        innermost = [frame for frame, _ in traceback.walk_tb(error.__traceback__)][-1]
        place = innermost.f_globals.get("__name__", "")  # callbacks look for what they monitor after an epoch
        of_trainer = place.startswith("lightning.") and (not cli.trainer.global_step or ".callbacks." in place)
        if isinstance(error, InputError) or not of_trainer:
            raise
        raise InputError(f"the trainer cannot work with these options: {reason(error)}") from error
    if cli.trainer.interrupted or cli.trainer.received_sigterm:
        raise Interrupted(last)


def main() -> int:
    """Run `setpred train`; return the exit status."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(HELP)
        return 0
    sys.argv = ["--help" if word in ("--help_all", "--help-all") else word for word in sys.argv]
    try:
        return exit_code(lambda: train() and None, interrupted="interrupted")
    except Interrupted as stopped:
        if processes.process_number() == 0:
            print(stopped, file=sys.stderr)
        return stopped.status
