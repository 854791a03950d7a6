"""What a run is: every setting of every stage, declared once as a field of a frozen dataclass.

Flags, `--help`, the defaults of config.py, presets, run names, recipes and manifests are derived from these fields
(`sparse_autoencoder.declare` says how). The defaults are the paper's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dncbm.runs.devices import default_cores
from dncbm.runs.errors import UserError
from sparse_autoencoder import DEFAULT_SEED, VARIANTS, Sparsity, TrainingSettings
from sparse_autoencoder.declare import check, choice, flags, run_name, setting
from sparse_autoencoder.settings import INPUT_TRANSFORMS

SPLITS = ("train", "train_val", "val")
HOOKS = ("out",)
"""Points of the image encoder that features are taken from: `out`, the output of `encode_image`."""
PRECISIONS = ("fp32", "fp16", "bf16")
BACKGROUNDS = ("none", "white", "black")
FOLDER = ""
"""How a setting stands in a run's name if it is a folder of its own."""
NAME = r"(?!\.{1,2}\Z)(?=.*\S)[^/\\\x00-\x1f\x7f\ud800-\udfff]{1,100}"
"""What the name of a data set or a vocabulary must match, which becomes the name of a folder or a file."""
NAMED = "be a name of at most 100 bytes, without slashes and control characters"
MOST_PROCESSES = 1024
MOST_BYTES = 255
"""Longest name of a file that common file systems allow."""


class _Checked:
    """A declaration whose values are checked when it is made."""

    def __post_init__(self) -> None:
        check(self)


# ------------------------------------------------------------------------------------------------------ any stage


@dataclass(frozen=True)
class Execution(_Checked):
    """How any stage runs."""

    device: str = setting(
        "auto", "auto, cpu, cuda, cuda:N or mps", pattern=r"auto|cpu|mps|cuda(:\d{1,3})?",
        called="be auto, cpu, cuda, cuda:N or mps",
    )  # fmt: skip
    overwrite: bool = setting(False, "replace outputs that were made from other inputs or settings")
    verify: bool = setting(False, "compare files by their hashes, not only by their sizes")


@dataclass(frozen=True)
class Tracking(_Checked):
    """Whether metrics are sent to Weights & Biases, and on whose behalf."""

    use_wandb: bool = setting(False, "send metrics to Weights & Biases")
    entity: str | None = setting(None, "the user or team that owns the wandb run", flag="wandb_entity")


# ------------------------------------------------------------------------------------------------- images, features


@dataclass(frozen=True)
class Download:
    """Which images are downloaded, and how. The defaults are the paper's."""

    train_tsv: Path = setting(Path(), "the training TSV, as downloaded", positional=True)
    val_tsv: Path = setting(Path(), "the validation TSV", positional=True)
    output: Path = setting(Path("datasets/cc3m"), "folder of the shards", flag="output_folder")
    image_size: int = setting(256, "pixels per side of the square that images are fitted into", least=1)
    processes: int = setting(16, "processes that download", flag="processes_count", least=1)
    threads: int = setting(64, "connections at a time of each process", flag="thread_count", least=1)
    shard_size: int = setting(10_000, "image addresses per shard", flag="number_sample_per_shard", least=1)
    retry_failed: bool = setting(
        False, "after a download: try again what failed for passing reasons, such as timeouts", configurable=False
    )


@dataclass(frozen=True)
class NamedEncoder(_Checked):
    """A CLIP-like encoder."""

    encoder: str = setting(
        "clip_RN50", "encoder: a name from config.py, openclip:MODEL/PRETRAINED or local-dir:FOLDER", flag="img_enc_name",
        in_name=FOLDER, identifies="never", pattern=r"(?![./]*\Z)(?=.*\S)[^\x00-\x1f\x7f]+",
        called="name an encoder",
    )  # fmt: skip


@dataclass(frozen=True)
class ImageEncoder(NamedEncoder):
    """An encoder and the point of its image tower that features come from."""

    hook: str = setting(
        "out", "point of the encoder that features come from", flag="hook_points", choices=HOOKS, in_name="_hook{}", place=5,
        identifies="never",
    )  # fmt: skip


@dataclass(frozen=True)
class SAEFeatures(ImageEncoder):
    """The features that an SAE is trained on."""

    dataset: str = setting(
        "cc3m", "a name from sae_datasets in config.py", flag="sae_dataset", in_name=FOLDER, identifies="never", pattern=NAME,
        called=NAMED,
    )  # fmt: skip


@dataclass(frozen=True)
class ProbeDataset(_Checked):
    """A labelled data set."""

    dataset: str = setting(
        "places365", "a name from probe_datasets in config.py", flag="probe_dataset", in_name=FOLDER, pattern=NAME,
        called=NAMED,
    )  # fmt: skip


@dataclass(frozen=True)
class ProbeFeatures(ImageEncoder, ProbeDataset):
    """The features of a labelled data set."""


@dataclass(frozen=True)
class Splits(_Checked):
    """Which splits of a labelled data set a stage works on."""

    split: str | None = setting(None, "one split; by default all three", flag="probe_split", choices=SPLITS)

    @property
    def names(self) -> tuple[str, ...]:
        """The split, or all three."""
        return (self.split,) if self.split else SPLITS


@dataclass(frozen=True)
class Extraction(_Checked):
    """How features are extracted. Only the precision and the background change what they are."""

    batch_size: int | None = setting(
        None, "images encoded at a time; by default 256 on a GPU, else 32", least=1, most=65_536, identifies="never"
    )
    precision: str | None = setting(None, "precision of the encoder; by default fp16 on a GPU, else fp32", choices=PRECISIONS)
    num_workers: int | None = setting(
        None, "workers that decode images; by default one per core if a GPU encodes, else one per two cores", least=0,
        most=MOST_PROCESSES, identifies="never",
    )  # fmt: skip
    max_bad_fraction: float = setting(
        0.05, "fraction of unreadable images above which the stage fails", least=0, most=1, identifies="never"
    )
    background: str = setting(
        "none", "colour put behind transparent images; none: their hidden colours show, as in the paper's code",
        choices=BACKGROUNDS, identifies="changed",
    )  # fmt: skip


@dataclass(frozen=True)
class Partition(_Checked):
    """Which share of the shards this process does, as one of several that need not know of each other."""

    part: str | None = setting(
        None, "i/n: only shards i, i + n, i + 2n, ...; the last of the n workers finishes; slurm: i/n as a job array's "
        "variables say; merge: only finish what the workers made", flag="partition",
        pattern=r"[1-9]\d{0,5}/[1-9]\d{0,5}|slurm|merge", called="be i/n with i from 1 to n, slurm or merge",
        identifies="never", configurable=False,
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        number, _, of = (self.part or "").partition("/")
        if of and int(number) > int(of):
            raise UserError(f"--partition {self.part}: there are only the parts 1/{of} to {of}/{of}")


# ------------------------------------------------------------------------------------------------------------- SAE


@dataclass(frozen=True)
class SAERun(SAEFeatures):
    """What identifies a trained SAE: its features, its shape, and how it is trained (METHOD section 2)."""

    sparsity: Sparsity = choice(VARIANTS, "relu", "how the code is kept sparse", flag="sae_type", in_name="_{}", place=2)
    expansion_factor: int = setting(8, "latents per input dimension", least=1, most=4096, in_name="_ef{}", place=3)
    input_transform: str = setting(
        "none", "transform of the SAE's inputs", choices=INPUT_TRANSFORMS, in_name="_input{}", place=8, name_default=False
    )
    suffix: str = setting(
        "", "appended to the run's name, to keep apart runs that differ in settings the name does not show",
        flag="save_suffix", pattern=r"[\w.-]*", in_name="{}", place=10, identifies="never",
    )  # fmt: skip
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (size := len(self.config_name.encode())) > MOST_BYTES:
            raise UserError(
                f"--save_suffix: the run's folder would have a name of {size} bytes, and file systems allow {MOST_BYTES}: "
                "shorten it"
            )

    @property
    def config_name(self) -> str:
        """Folder name of the run, as in the paper's code, with whatever differs from the paper's settings appended."""
        return run_name(self)


@dataclass(frozen=True)
class NamedSAE(_Checked):
    """Which trained SAE is meant, where its flags leave it open."""

    name: str | None = setting(
        None, "the SAE with this folder name, instead of its flags", flag="sae", pattern=NAME.replace("100", "255"),
        called="be the name of a folder", configurable=False,
    )  # fmt: skip


_SEED = flags(TrainingSettings)["seed"].setting


# ----------------------------------------------------------------------------------------- names and their evidence


@dataclass(frozen=True)
class Naming(_Checked):
    """Which names are shown as words."""

    names: str = setting(
        "tested", "tested: a latent whose name fails its test is shown as `latent 123 (melon?)`; all: by its name, as in the "
        "paper", choices=("tested", "all"), identifies="changed",
    )  # fmt: skip
    name_fdr: float = setting(0.05, "false discovery rate of the test of names", above=0, most=1, identifies="changed")


@dataclass(frozen=True)
class Evidence(_Checked):
    """The images that names and latents are judged by."""

    dataset: str | None = setting(
        None, "data set, of the SAE or the probe, whose val features judge names; by default the SAE's own",
        flag="evidence_dataset", pattern=NAME, called=NAMED,
    )  # fmt: skip
    encoder: str | None = setting(
        None, "another encoder, whose features of these images judge whether a latent is one thing; by default the SAE's own",
        flag="evidence_encoder",
    )  # fmt: skip


@dataclass(frozen=True)
class Alignment(_Checked):
    """Whether an SAE is fine-tuned towards the names of its latents."""

    strength: float | None = setting(
        None, "first fine-tune a copy of the SAE towards its names, with this weight of the names' loss", flag="align_names",
        above=0, configurable=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Seeds(_Checked):
    """Which SAEs are compared, that differ only in their seed."""

    seeds: tuple[int, ...] = setting(
        (), "seeds of the SAEs, separated by commas; by default all that are trained", least=_SEED.least, most=_SEED.most,
        configurable=False,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------- probe


PAPER_PROBES = {
    "imagenet": (1e-3, 1.0),
    "cifar10": (1e-3, 1.0),
    "cifar100": (1e-2, 1.0),
    "places365": (1e-2, 0.1),
    "waterbirds100": (0.1, 10.0),
}
"""Data set -> the paper's learning rate and lambda of the probe (METHOD section 4)."""
_BATCH = flags(TrainingSettings)["train_sae_bs"].setting
ADAM = ("solver", "adam")
"""Settings that only Adam reads."""


@dataclass(frozen=True)
class ProbeRun(ProbeDataset):
    """What identifies a linear probe, given its inputs (METHOD section 4)."""

    lr: float = setting(
        1e-2, "learning rate of the probe (adam)", flag="probe_lr", above=0, in_name="_lr{}", place=1, when=ADAM,
        presets={dataset: lr for dataset, (lr, _) in PAPER_PROBES.items()},
    )  # fmt: skip
    batch_size: int = setting(
        512, "batch size of the probe (adam)", flag="probe_train_bs", least=1, most=_BATCH.most, in_name="_bs{}", place=2,
        when=ADAM,
        presets=dict.fromkeys(PAPER_PROBES, 512),
    )  # fmt: skip
    epochs: int = setting(
        200, "epochs of the probe; with prox, the most passes for each lambda", flag="probe_epochs", least=1,
        in_name="_epo{}", place=4, presets=dict.fromkeys(PAPER_PROBES, 200),
    )  # fmt: skip
    sparsity_lambda: float = setting(
        0.1, "weight of the probe's sparsity loss", flag="probe_sparsity_loss_lambda", least=0, in_name="_spl{}", place=7,
        presets={dataset: sparsity_lambda for dataset, (_, sparsity_lambda) in PAPER_PROBES.items()},
    )  # fmt: skip
    on_features: bool = setting(False, "the baseline: probe raw features, not concepts", flag="probe_on_features")
    seed: int = setting(
        DEFAULT_SEED, _SEED.help, least=_SEED.least, most=_SEED.most, in_name="_seed{}", place=8, name_default=False,
        when=ADAM,
    )  # fmt: skip
    solver: str = setting(
        "adam", "adam as in the paper; prox solves the same objective by proximal steps and leaves exact zeros",
        flag="probe_solver", choices=("adam", "prox"), in_name="_{}", place=3, name_default=False, identifies="changed",
    )  # fmt: skip
    classification_loss: str = setting(
        "CE", "cross-entropy", flag="probe_classification_loss", choices=("CE",), in_name="_nobias_cl{}", place=5,
        identifies="changed",
    )  # fmt: skip
    sparsity_loss: str = setting(
        "L1", "mean absolute weight", flag="probe_sparsity_loss", choices=("L1",), in_name="_sp{}", place=6,
        identifies="changed",
    )  # fmt: skip

    @property
    def config_name(self) -> str:
        """Folder name of the probe, as in the paper's code; another solver's name replaces Adam's settings."""
        return run_name(self)

    @property
    def inputs(self) -> str:
        """`concepts`, or `features` for the linear-probe baseline."""
        return "features" if self.on_features else "concepts"


def paper_preset(dataset: str) -> dict[str, Any]:
    """Flag -> value of the paper's probe on a data set (METHOD section 4); empty if the paper has none."""
    declared = flags(ProbeRun).items()
    return {name: flag.setting.presets[dataset] for name, flag in declared if dataset in flag.setting.presets}


@dataclass(frozen=True)
class Preset(_Checked):
    """Settings that are picked together."""

    preset: str | None = setting(
        None, "the paper's settings of the probe for --probe_dataset, except where a flag says otherwise",
        choices=("paper",),
    )  # fmt: skip

    def values(self, dataset: str) -> Mapping[str, Any]:
        """Flag -> value. Raises UserError if the paper has no probe of this data set."""
        if self.preset is None:
            return {}
        if dataset not in PAPER_PROBES:
            known = ", ".join(PAPER_PROBES)
            raise UserError(f"--preset paper: the paper has no probe on --probe_dataset {dataset}, only on {known}")
        return paper_preset(dataset)


@dataclass(frozen=True)
class NamedProbe(_Checked):
    """Which trained probe is meant, where its flags leave it open."""

    name: str | None = setting(
        None, "the probe with this folder name, instead of its flags", flag="probe", pattern=NAME.replace("100", "255"),
        called="be the name of a folder", configurable=False,
    )  # fmt: skip


@dataclass(frozen=True)
class ProbeSchedule(_Checked):
    """When the training of a probe reports and saves; none of it changes the probe."""

    val_freq: int = setting(1, "epochs between validations of the probe", flag="probe_val_freq", least=1)
    coverage_freq: int = setting(
        50, "epochs between measurements of image-wise coverage; 0: only at the end", flag="probe_eval_coverage_freq", least=0
    )
    ckpt_freq: int = setting(
        0,
        "epochs between checkpoints of the probe; 0: only the final one",
        flag="probe_ckpt_freq",
        alias="ckpt_freq",
        least=0,
        units=("epochs",),
    )


@dataclass(frozen=True)
class Compact(_Checked):
    """How many concepts a compact bottleneck may use."""

    max_concepts: int | None = setting(
        None, "also choose this many concepts that the probe needs most, and measure accuracy with 1, 2, 4, ... of them",
        least=1, configurable=False,
    )  # fmt: skip


@dataclass(frozen=True)
class Prompts(_Checked):
    """How classes are described to a text encoder."""

    templates: tuple[str, ...] = setting(
        (), "descriptions with {} for the class; by default open_clip's 80 for imagenet, else 'a photo of a {}.'",
        separate=True,
    )  # fmt: skip


@dataclass(frozen=True)
class BestRuns(_Checked):
    """Which of our runs the results table shows, if a method has several on a data set; never by their accuracy on val."""

    best_by: str = setting(
        "train_val", "the one with the best top-1 on train_val, the last, or (none) all of them",
        choices=("train_val", "last", "none"),
    )  # fmt: skip


@dataclass(frozen=True)
class Comparison(_Checked):
    """Which SAEs are compared, and how; what is left empty restricts nothing."""

    sort_by: str = setting(
        "l0", "column that rows are sorted by: of accuracies and the like the best first, of settings and L0 the smallest"
    )
    where: tuple[str, ...] = setting(
        (), "conditions that rows have to meet, such as 'l0<50' 'sae_type=topk', with = != < <= > >=", separate=True,
        configurable=False,
    )  # fmt: skip
    best_by: str | None = setting(
        None, "name the best SAE by a column, such as train_val_top1, and print its flags", configurable=False
    )
    encoders: tuple[str, ...] = setting(
        (), "only SAEs of these encoders, separated by commas", flag="img_enc_name", configurable=False
    )
    sae_datasets: tuple[str, ...] = setting(
        (), "only SAEs of these data sets, separated by commas", flag="sae_dataset", configurable=False
    )
    probe_datasets: tuple[str, ...] = setting(
        (), "only accuracies on these data sets, separated by commas", flag="probe_dataset", configurable=False
    )


# ---------------------------------------------------------------------------------------------------- explanations


@dataclass(frozen=True)
class Explained(_Checked):
    """What is explained, beside the runs."""

    split: str = setting("val", "split whose images are explained", flag="probe_split", choices=SPLITS, in_name=FOLDER)
    method_name: str = setting("ours", "ours, the method of this library", choices=("ours",), identifies="never")
    which_ckpt: str = setting("final", "final, the trained probe", choices=("final",), identifies="never")


@dataclass(frozen=True)
class ShownDatasets(_Checked):
    """The data sets whose images show what a latent responds to."""

    datasets: tuple[str, ...] = setting(
        (), "names from probe_datasets in config.py, separated by commas; by default all that have strengths",
        flag="probe_dataset", configurable=False, pattern=NAME, called=NAMED,
    )  # fmt: skip


@dataclass(frozen=True)
class Clusters(_Checked):
    """How many meta clusters there are."""

    n_clusters: int | None = setting(
        None,
        "clusters of K-means; by default the paper's for the data set, else two per class",
        least=1,
        most=100_000,
        in_name=FOLDER,
    )


@dataclass(frozen=True)
class LatentSelection(_Checked):
    """Which latents are drawn; what is left empty restricts nothing."""

    limit: int | None = setting(None, "draw at most this many figures", least=1)
    indices: tuple[int, ...] = setting((), "numbers of the latents, clusters, images or classes to draw, separated by commas")
    concepts: tuple[str, ...] = setting((), "names of latents, separated by commas")

    def __bool__(self) -> bool:
        return self != type(self)()


@dataclass(frozen=True)
class Selection(LatentSelection):
    """Which images, classes or clusters are drawn."""

    classes: tuple[str, ...] = setting((), "names of classes, separated by commas")


@dataclass(frozen=True)
class Drawing(_Checked):
    """How figures are drawn."""

    use_latex: bool = setting(False, "let LaTeX typeset the text; it must be installed")
    workers: int = setting(
        None, "processes that draw", flag="num_workers", factory=default_cores, least=0, most=MOST_PROCESSES
    )


@dataclass(frozen=True)
class Ranking(_Checked):
    """By what the concepts of a class are ranked."""

    rank_by: str = setting(
        "contribution", "mean contribution; or mean-centred strength, the authors' ranking, which ignores the probe's weights",
        choices=("contribution", "strength"),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- reproduction

PARTS = ("linear_probe", "zero_shot", "nec", "interventions", "explanations")
"""What a plan may leave out; the stages up to the probe on concepts are always in it."""


@dataclass(frozen=True)
class Grid(_Checked):
    """What is reproduced, and how. Flags of the stages are passed on to them."""

    encoders: tuple[str, ...] = setting((), "encoders, separated by commas; by default all of config.py", flag="img_enc_name")
    datasets: tuple[str, ...] = setting(
        (), "probe data sets, separated by commas; by default all of config.py", flag="probe_dataset", pattern=NAME,
        called=NAMED,
    )  # fmt: skip
    seeds: tuple[int, ...] = setting(
        (DEFAULT_SEED,), "seeds of the SAE and the probe, separated by commas", flag="seed", least=_SEED.least, most=_SEED.most
    )
    sweep: tuple[str, ...] = setting(
        (), "a flag of the SAE or the probe and its values, FLAG=VALUE,VALUE; several are combined", separate=True,
        configurable=False,
    )  # fmt: skip
    only: tuple[str, ...] = setting(
        PARTS, "of the optional parts, make only these, separated by commas", flag="with", choices=PARTS, configurable=False
    )
    without: tuple[str, ...] = setting((), "parts to leave out, separated by commas", choices=PARTS, configurable=False)
    dry_run: bool = setting(
        False, "only print the plan: each step, whether it is done, its estimated time and disk space, its command",
        flag="dry-run", alias="dry_run", configurable=False,
    )  # fmt: skip
    slurm: bool = setting(
        False, "only write a SLURM job for each step that is not done, and submit.sh, which submits them", configurable=False
    )
    keep_going: bool = setting(False, "after a failure, do what does not depend on it; list all failures at the end")

    def makes(self, part: str) -> bool:
        """Whether one of PARTS is made."""
        return part in self.only and part not in self.without


# --------------------------------------------------------------------------------------------------- interventions


@dataclass(frozen=True)
class Intervention(_Checked):
    """Which concepts are edited. A list holds one name, label or index per line."""

    keep: Path | None = setting(None, "list of the concepts to keep; all others are removed", configurable=False)
    remove: Path | None = setting(None, "list of the concepts to remove", configurable=False)
    scale: Path | None = setting(
        None, "list of concepts with the factors of their strengths: `name,factor` per line", configurable=False
    )
    concepts: tuple[str, ...] = setting((), "concepts to remove, separated by commas", configurable=False)
    reweight: bool = setting(
        False, "also refit with images weighted so that their class is independent of the edited concepts"
    )
    suggest: str | None = setting(
        None, "a text: only print the concepts nearest to it, and write a list of them", configurable=False
    )
    suggest_n: int = setting(50, "number of concepts to suggest", least=1)


# -------------------------------------------------------------------------------------------------- published files


@dataclass(frozen=True)
class Published(_Checked):
    """Published files, and what they belong to where the names of their folders do not tell."""

    folder: Path = setting(Path(), "folder of the files, at any depth", positional=True)
    encoder: str | None = setting(
        None, "encoder of the files; by default the one that their folders name", flag="img_enc_name", configurable=False
    )
    sae_dataset: str | None = setting(
        None, "data set of the SAE; by default the one that their folders name", configurable=False
    )
    probe_dataset: str | None = setting(
        None, "data set of the probe; by default the one that their folders name", configurable=False
    )


# ---------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Report(_Checked):
    """Where the report of a run is written."""

    output: Path | None = setting(
        None, "folder to write; by default one in analysis_dir", flag="report_folder", configurable=False
    )


# --------------------------------------------------------------------------------------------------------- browser


@dataclass(frozen=True)
class Browse(_Checked):
    """Where the browser of a run is written, and which other runs it shows."""

    output: Path | None = setting(
        None, "folder to write; by default one in analysis_dir", flag="browser_folder", configurable=False
    )
    beside: tuple[str, ...] = setting(
        (), "other SAEs to show beside this one, each by the flags in which it differs, such as 'seed=50' or "
        "'sae_type=topk,k=32', or as sae=NAME", separate=True, configurable=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Export(_Checked):
    """Where a trained bottleneck is exported to, and in which format."""

    output: Path | None = setting(None, "folder to write; by default one in analysis_dir", configurable=False)
    to: str = setting(
        "bundle", "bundle, which ConceptBottleneckModel.from_pretrained loads; or saelens, the SAE alone for SAELens",
        choices=("bundle", "saelens"), configurable=False,
    )  # fmt: skip
    license: str | None = setting(
        None, "licence of the weights, an identifier of the hub such as cc-by-4.0, for the model card"
    )


# ------------------------------------------------------------------------------------------------ the authors' flags


@dataclass(frozen=True)
class Unused(_Checked):
    """Flags of the paper's code that every script accepts and none reads."""

    modality: str = setting("img", "img, what is encoded", choices=("img",))
    vocab_type: str | None = setting(None, "`vocabulary` in config.py names the words")
    probe_nclasses: int | None = setting(None, "the data set itself says how many classes it has", least=1)
    probe_save_dir: str | None = setting(None, "`probe_dir` in config.py says where probes are saved")
