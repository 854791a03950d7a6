"""The flags that scripts share, spelled as in the paper's commands, and what they stand for."""

import argparse
import errno
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

from dncbm.artifacts import DEFAULT_SEED, ProbeRun, SAERun
from dncbm.devices import keep_freed_memory
from dncbm.dumps import Selection
from dncbm.encoders import HOOKS, PRECISIONS
from dncbm.errors import UserError
from dncbm.extraction import Extraction
from dncbm.features import default_cores, default_workers
from dncbm.plotting.pages import Drawing
from dncbm.probing import PAPER_SETTINGS, ProbeSchedule
from dncbm.ranks import world_size
from dncbm.runs import find_explanation, find_probe, find_sae
from dncbm.settings import SPLITS, Settings, load_settings
from dncbm.tracking import Tracking
from sparse_autoencoder import (
    BatchTopK,
    CheckpointError,
    JumpReLU,
    Matryoshka,
    NonFiniteError,
    ReLU,
    Sparsity,
    TopK,
    TrainingSettings,
)

Group = Callable[[argparse.ArgumentParser], None]
SAE_TYPES = ("relu", "topk", "batchtopk", "jumprelu", "matryoshka")


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, it is {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, not {value}")
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must not be negative, it is {value}")
    return value


def _decay(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must lie in [0, 1), it is {value}")
    return value


def _suffix(text: str) -> str:
    if not re.fullmatch(r"[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"may hold letters, digits, '_', '.' and '-', not {text!r}")
    return text


# What argparse calls a value it cannot convert: "invalid whole number value: 'abc'".
_positive_int.__name__ = _count.__name__ = "whole number"
_positive_float.__name__ = _amount.__name__ = "number"


# ----------------------------------------------------------------------------------------------------- groups of flags


def common(parser: argparse.ArgumentParser) -> None:
    """Flags of every stage."""
    add = parser.add_argument
    add(
        "--img_enc_name",
        default="clip_RN50",
        help="encoder: a name of config.py, openclip:MODEL/PRETRAINED or local-dir:FOLDER",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--overwrite", action="store_true", help="replace what was made from other inputs or settings")


def images(parser: argparse.ArgumentParser) -> None:
    """Flags of stages that read images."""
    add = parser.add_argument
    add(
        "--batch_size",
        type=_positive_int,
        default=None,
        help="images encoded at a time; by default 256 on a GPU, else 32",
    )
    add("--precision", choices=PRECISIONS, default=None, help="of the encoder; by default fp16 on a GPU, else fp32")
    add("--num_workers", type=_count, default=default_workers(), help="processes that decode images")
    add("--max_bad_fraction", type=_amount, default=0.05, help="share of unreadable images at which the stage fails")


def hook(parser: argparse.ArgumentParser) -> None:
    """Which point of the encoder is read."""
    parser.add_argument(
        "--hook_points", choices=HOOKS, default="out", help="point of the encoder that features come from"
    )


def sae_data(parser: argparse.ArgumentParser) -> None:
    """Which features an SAE is trained on."""
    parser.add_argument("--sae_dataset", default="cc3m", help="a name of sae_datasets in config.py")
    hook(parser)


def sae_run(parser: argparse.ArgumentParser) -> None:
    """What identifies a trained SAE."""
    add = parser.add_argument
    add("--lr", type=_positive_float, default=5e-4, help="learning rate of the SAE")
    add("--sae_type", choices=SAE_TYPES, default="relu", help="how the code is kept sparse")
    add("--l1_coeff", type=_amount, default=3e-5, help="weight of the L1 loss (relu)")
    add("--k", type=_positive_int, default=32, help="active latents of an item (topk, batchtopk, matryoshka)")
    add("--l0_coeff", type=_amount, default=1e-5, help="weight of the L0 loss (jumprelu)")
    add("--expansion_factor", type=_positive_int, default=8, help="latents for each input dimension")
    add("--num_epochs", type=_positive_int, default=200, help="epochs of the SAE")
    add("--resample_freq", type=_positive_int, default=10, help="epochs between resamplings of dead latents")
    add("--train_sae_bs", type=_positive_int, default=4096, help="batch size of the SAE")
    add(
        "--input_transform",
        choices=("none", "centre", "unit_norm"),
        default="none",
        help="what is done to the SAE's inputs",
    )
    add(
        "--save_suffix",
        type=_suffix,
        default="",
        help="appended to the run's name, to keep runs apart that differ in other settings",
    )
    add(
        "--seed",
        type=_count,
        default=DEFAULT_SEED,
        help="seed of the SAE and the probe; part of their names when not 49",
    )


def sae_training(parser: argparse.ArgumentParser) -> None:
    """How an SAE is trained, beyond what identifies it."""
    add = parser.add_argument
    add(
        "--resample_dataset_size",
        type=_positive_int,
        default=819_200,
        help="items whose loss decides what dead latents become",
    )
    add("--adam_beta_1", type=_decay, default=0.9)
    add("--adam_beta_2", type=_decay, default=0.999)
    add("--adam_epsilon", type=_positive_float, default=1e-8)
    add("--adam_weight_decay", type=_amount, default=0.0)
    add("--lr_warmup_steps", type=_count, default=0, help="steps over which the learning rate rises")
    add("--lr_decay_steps", type=_count, default=0, help="steps at the end over which it falls to 0")
    add("--bf16", action="store_true", help="matrix products in bfloat16, for GPUs")


def reporting(parser: argparse.ArgumentParser) -> None:
    """When a training reports and saves."""
    add = parser.add_argument
    add("--val_freq", type=_positive_int, default=1, help="epochs between validations of the SAE")
    add(
        "--ckpt_freq",
        type=_count,
        default=0,
        help="checkpoints: every so many items (SAE) or epochs (probe); 0: the final one",
    )
    add("--use_wandb", action="store_true", help="send metrics to Weights & Biases")
    add("--wandb_entity", default=None, help="who owns the run there")


def probe_data(parser: argparse.ArgumentParser) -> None:
    """Which images are classified."""
    parser.add_argument("--probe_dataset", default="places365", help="a name of probe_datasets in config.py")


def probe_splits(parser: argparse.ArgumentParser) -> None:
    """Which splits of them."""
    parser.add_argument("--probe_split", choices=SPLITS, default=None, help="one split; without it all three")


def probe_run(parser: argparse.ArgumentParser) -> None:
    """What identifies a probe, and how it reports."""
    add = parser.add_argument
    add(
        "--preset",
        choices=("paper",),
        default=None,
        help="the probe's settings of the paper for --probe_dataset, where no flag says otherwise",
    )
    add("--probe_lr", type=_positive_float, default=1e-2, help="learning rate of the probe")
    add("--probe_sparsity_loss_lambda", type=_amount, default=0.1, help="weight of the probe's sparsity loss")
    add("--probe_classification_loss", choices=("CE",), default="CE", help="cross-entropy")
    add("--probe_sparsity_loss", choices=("L1",), default="L1", help="mean absolute weight")
    add(
        "--probe_solver",
        choices=("adam", "prox"),
        default="adam",
        help="adam as in the paper; prox solves the same objective by proximal steps and leaves exact zeros",
    )
    add("--probe_epochs", type=_positive_int, default=200, help="epochs of the probe; prox: at most, for each lambda")
    add("--probe_train_bs", type=_positive_int, default=512, help="batch size of the probe")
    add("--probe_on_features", action="store_true", help="the baseline: probe the features instead of the concepts")
    add("--probe_val_freq", type=_positive_int, default=1, help="epochs between validations of the probe")
    add(
        "--probe_eval_coverage_freq",
        type=_count,
        default=50,
        help="epochs between counts of image-wise coverage; 0: at the end",
    )


def explained(parser: argparse.ArgumentParser) -> None:
    """What is explained: an SAE and a probe, by the flags of their training, and a split."""
    probe_data(parser)
    _explained(parser)


def explained_latents(parser: argparse.ArgumentParser) -> None:
    """The same where the latents alone are explained, by images of several data sets."""
    parser.add_argument(
        "--probe_dataset",
        dest="shown_datasets",
        type=_names,
        default=(),
        help="names of probe_datasets in config.py, separated by commas; by default all that have strengths",
    )
    _explained(parser)


def _explained(parser: argparse.ArgumentParser) -> None:
    for group in (sae_data, sae_run, probe_run):
        group(parser)
    for action in parser._actions:
        if action.dest == "device":
            action.help = "taken as by the other scripts; explanations are computed on the CPU"
    known = len(parser._actions)
    for group in (sae_training, reporting):
        group(parser)
    for action in parser._actions[known:]:
        action.help = argparse.SUPPRESS  # they name no run; a line of training flags can be pasted all the same
    add = parser.add_argument
    add("--probe_split", choices=SPLITS, default="val", help="split whose images are explained")
    add("--method_name", type=_ours, default="ours", help="ours, the method of this library")
    add("--which_ckpt", type=_final, default="final", help="final, the trained probe")


def _ours(text: str) -> str:
    if text != "ours":
        raise argparse.ArgumentTypeError(f"only `ours`, DN-CBM, is here to explain; {text!r} is another method")
    return text


def _final(text: str) -> str:
    if text != "final":
        raise argparse.ArgumentTypeError(f"only the `final` probe is explained, not {text!r}")
    return text


def selection(*what: str) -> Group:
    """What is drawn.

    Args:
        what: of what `--indices` are, and, where they apply, `classes` and `concepts`.
    """

    def flags(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--limit", type=_positive_int, default=None, help="at most so many figures")
        add("--indices", type=_indices, default=(), help=f"numbers of {what[0]}, separated by commas")
        if "classes" in what:
            add("--classes", type=_names, default=(), help="names of classes, separated by commas")
        if "concepts" in what:
            add("--concepts", type=_names, default=(), help="names of latents, separated by commas")

    return flags


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(number) for number in _names(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, not {text!r}") from None


def clusters(parser: argparse.ArgumentParser) -> None:
    """How many meta clusters."""
    parser.add_argument(
        "--n_clusters",
        type=_positive_int,
        default=None,
        help="clusters of K-means; by default the paper's for the data set, else two a class",
    )


def latex(parser: argparse.ArgumentParser) -> None:
    """Who sets the text of figures."""
    parser.add_argument("--use_latex", action="store_true", help="let LaTeX set the text; it has to be installed")


def drawing(parser: argparse.ArgumentParser) -> None:
    """How figures are drawn."""
    latex(parser)
    parser.add_argument("--num_workers", type=_count, default=default_cores(), help="processes that draw")


GROUPS: tuple[Group, ...] = (
    common, images, sae_data, sae_run, sae_training, reporting, probe_data, probe_splits, probe_run, clusters, latex,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------- from flags


def parse(description: str | None, *groups: Group) -> tuple[Settings, argparse.Namespace]:
    """Read the config and the command line.

    Args:
        description: the script's docstring.
        groups: the flags it takes, beside the common ones.

    Raises:
        UserError: the config is wrong, its `defaults` included.
    """
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for group in (common, *groups):
        group(parser)
    if {"-h", "--help"} & set(sys.argv[1:]):
        parser.parse_args()
    if world_size() > 1 and (images not in groups or sae_run in groups):
        raise UserError("only the stages 1 and 5 run in several processes: start this one without torchrun")
    settings = load_settings()
    _apply_defaults(settings, parser)
    args = parser.parse_args()
    if getattr(args, "preset", None) and hasattr(args, "probe_dataset"):
        parser.set_defaults(**_paper_probe(args.probe_dataset))  # flags that are given stay
        args = parser.parse_args()
        chosen = ", ".join(f"--{name} {getattr(args, name)}" for name in _paper_probe(args.probe_dataset))
        print(f"--preset {args.preset} for {args.probe_dataset}: {chosen}")
    return settings, args


def _paper_probe(dataset: str) -> dict[str, float | int]:
    """Flag -> value of the paper's probe of a data set."""
    if dataset not in PAPER_SETTINGS:
        raise UserError(
            f"--preset paper: the paper has no probe of --probe_dataset {dataset}, only of {', '.join(PAPER_SETTINGS)}"
        )
    lr, sparsity_lambda = PAPER_SETTINGS[dataset]
    return {
        "probe_lr": lr, "probe_sparsity_loss_lambda": sparsity_lambda, "probe_epochs": 200, "probe_train_bs": 512
    }  # fmt: skip


def _apply_defaults(settings: Settings, parser: argparse.ArgumentParser) -> None:
    everything = argparse.ArgumentParser(add_help=False)
    for group in GROUPS:
        group(everything)
    known = {action.dest: action for action in everything._actions}
    for name, value in settings.defaults.items():
        if name not in known:
            raise UserError(f"{settings.path}: `defaults` has {name!r}, which is not a flag of the scripts")
        try:
            if isinstance(known[name], argparse._StoreTrueAction):
                if not isinstance(value, bool):
                    raise argparse.ArgumentTypeError(f"must be True or False, not {value!r}")
            elif value is not None or known[name].default is not None:  # None may be said where it is the default
                value = everything._get_value(known[name], str(value))
                everything._check_value(known[name], value)
        except (argparse.ArgumentError, argparse.ArgumentTypeError, ValueError) as error:
            raise UserError(f"{settings.path}: `defaults[{name!r}]`: {error}") from error
        if any(action.dest == name for action in parser._actions):
            parser.set_defaults(**{name: value})


def extraction(args: argparse.Namespace) -> Extraction:
    """From the flags `common` and `images`."""
    return Extraction(
        args.device, args.batch_size, args.num_workers, args.max_bad_fraction, args.overwrite, args.precision
    )


def sae_from(args: argparse.Namespace) -> SAERun:
    """From the flags `sae_data` and `sae_run`, and those of training where the script has them."""
    beyond = {
        "resample_dataset_size", "adam_beta_1", "adam_beta_2", "adam_epsilon", "adam_weight_decay", "lr_warmup_steps",
        "lr_decay_steps", "bf16", "val_freq", "ckpt_freq",
    }  # fmt: skip
    return SAERun(
        dataset=args.sae_dataset,
        encoder=args.img_enc_name,
        hook=args.hook_points,
        sparsity=sparsity_from(args),
        expansion_factor=args.expansion_factor,
        input_transform=args.input_transform,
        suffix=args.save_suffix,
        training=TrainingSettings(
            epochs=args.num_epochs,
            batch_size=args.train_sae_bs,
            lr=args.lr,
            resample_freq=args.resample_freq,
            seed=args.seed,
            **{name: value for name, value in vars(args).items() if name in beyond},
        ),
    )


def sparsity_from(args: argparse.Namespace) -> Sparsity:
    """The variant `--sae_type` names, with its own parameter."""
    variants: dict[str, Callable[[], Sparsity]] = {
        "relu": lambda: ReLU(l1_coeff=args.l1_coeff),
        "topk": lambda: TopK(args.k),
        "batchtopk": lambda: BatchTopK(args.k),
        "jumprelu": lambda: JumpReLU(l0_coeff=args.l0_coeff),
        "matryoshka": lambda: Matryoshka(BatchTopK(args.k)),
    }
    return variants[args.sae_type]()


def probe_from(args: argparse.Namespace) -> ProbeRun:
    """From the flags `probe_data`, `probe_run` and `--seed`."""
    return ProbeRun(
        dataset=args.probe_dataset,
        lr=args.probe_lr,
        batch_size=args.probe_train_bs,
        epochs=args.probe_epochs,
        sparsity_lambda=args.probe_sparsity_loss_lambda,
        on_features=args.probe_on_features,
        seed=args.seed,
        solver=args.probe_solver,
    )


SAE_FLAGS = (
    "lr", "sae_type", "l1_coeff", "k", "l0_coeff", "expansion_factor", "num_epochs", "resample_freq", "train_sae_bs",
    "input_transform", "save_suffix", "seed",
)  # fmt: skip
PROBE_FLAGS = ("preset", "probe_lr", "probe_sparsity_loss_lambda", "probe_solver", "probe_epochs", "probe_train_bs")


def _said(flags: tuple[str, ...]) -> bool:
    """Whether the command line has one of these flags."""
    return any(f"--{flag}" == word.split("=")[0] for flag in flags for word in sys.argv[1:])


def explained_sae(settings: Settings, args: argparse.Namespace) -> SAERun:
    """The SAE that the flags name; without one, the paper's (or that of `defaults` in config.py), or the only one there."""
    run = sae_from(args)
    if _said(SAE_FLAGS):
        return run
    return find_sae(settings, run, _preset_name(settings, SAE_FLAGS, paper=True))


def explained_probe(settings: Settings, args: argparse.Namespace, run: SAERun) -> ProbeRun:
    """The probe that the flags name; without one, that of `wanted_probe`, or the only one there."""
    probe = wanted_probe(settings, args)
    if _said(PROBE_FLAGS):
        return probe
    paper = args.probe_dataset in PAPER_SETTINGS
    return find_probe(settings, run, probe, _preset_name(settings, PROBE_FLAGS, paper=paper))


def wanted_probe(settings: Settings, args: argparse.Namespace) -> ProbeRun:
    """The probe that the flags name; without one, the paper's for a data set it has, or that of `defaults` in config.py."""
    if args.probe_on_features:
        raise UserError("--probe_on_features: features have no names, so only probes on concepts are explained")
    if (
        args.probe_dataset in PAPER_SETTINGS
        and not _said(PROBE_FLAGS)
        and not set(PROBE_FLAGS) & set(settings.defaults)
    ):
        args = argparse.Namespace(**vars(args) | _paper_probe(args.probe_dataset))
    return probe_from(args)


def _preset_name(settings: Settings, flags: tuple[str, ...], *, paper: bool) -> str:
    if set(flags) & set(settings.defaults):
        return "as `defaults` of config.py say"
    return "the paper's settings" if paper else "the flags' defaults"


def computed(settings: Settings, wanted: Path, script: str, *, last: str = "") -> Path:
    """The folder of what was computed: `wanted`, or, where no flag names another, the only one like it.

    Args:
        settings: the config.
        wanted: the folder by the flags and presets.
        script: the script that computes it.
        last: what its last part is named by: `probe`, `n_clusters` or nothing.
    """
    said = {"probe": _said(PROBE_FLAGS), "n_clusters": _said(("n_clusters",))}.get(last, True)
    return find_explanation(settings, wanted, script, any_sae=not _said(SAE_FLAGS), any_last=not said)


def selection_from(args: argparse.Namespace) -> Selection:
    """From the flags `selection`."""
    flags = vars(args)
    return Selection(args.limit, args.indices, flags.get("classes", ()), flags.get("concepts", ()))


def drawing_from(args: argparse.Namespace) -> Drawing:
    """From the flags `drawing`."""
    return Drawing(args.use_latex, args.num_workers, args.overwrite)


def schedule_from(args: argparse.Namespace) -> ProbeSchedule:
    """When a probe reports and saves."""
    return ProbeSchedule(args.probe_val_freq, args.probe_eval_coverage_freq, args.ckpt_freq)


def splits_from(args: argparse.Namespace) -> tuple[str, ...]:
    """The split `--probe_split` names, or all three."""
    return (args.probe_split,) if args.probe_split else SPLITS


def tracking_from(args: argparse.Namespace) -> Tracking:
    """From the flags `reporting`."""
    return Tracking(args.use_wandb, args.wandb_entity)


def run(main: Callable[[], object]) -> None:
    """Run a script: what the user can put right becomes one line and exit code 1."""
    keep_freed_memory()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparse_autoencoder").setLevel(logging.INFO)  # resampling, and which kind of step it chooses
    try:
        main()
    except (UserError, CheckpointError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(
            f"error: no space left on the disk of {error.filename or 'the output'}: what was finished is kept; make room"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on from what is finished")
