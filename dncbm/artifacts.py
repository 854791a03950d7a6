"""Where every artifact lies. No other module joins a path of the layout.

The layout is the one of the paper's code, so that its published files can be put in place and found.
"""

import glob
import hashlib
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dncbm.settings import LOCAL_DIR, OPEN_CLIP, Settings
from sparse_autoencoder import BatchTopK, JumpReLU, Matryoshka, ReLU, Sparsity, TopK, TrainingSettings

DEFAULT_SEED = 49


def encoder_folder(encoder: str) -> str:
    """An encoder's name as a file name: `clip_ViT-B/16` -> `clip_ViT-B16`, as in the paper's files.

    `openclip:` and `local-dir:` names keep their parts apart; a `local-dir:` also gets a hash of its whole path, since
    two folders may share a last name.
    """
    if encoder.startswith(LOCAL_DIR):
        folder = Path(encoder.removeprefix(LOCAL_DIR)).absolute()
        return f"local-dir_{folder.name}_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"
    if encoder.startswith(OPEN_CLIP):
        return re.sub(r"[^\w.-]+", "_", encoder)
    return encoder.replace("/", "")


@dataclass(frozen=True)
class SAERun:
    """What identifies a trained SAE: what it is trained on, its shape, and how it is trained."""

    dataset: str = "cc3m"
    encoder: str = "clip_RN50"
    hook: str = "out"
    sparsity: Sparsity = field(default_factory=lambda: ReLU(l1_coeff=3e-5))
    expansion_factor: int = 8
    input_transform: str = "none"
    suffix: str = ""
    training: TrainingSettings = field(default_factory=TrainingSettings)

    @property
    def config_name(self) -> str:
        """Folder name of the run, as in the paper's code. What differs from the paper's setting is appended."""
        t = self.training
        name = (
            f"lr{t.lr}_{_sparsity_name(self.sparsity)}_ef{self.expansion_factor}_rf{t.resample_freq}"
            f"_hook{self.hook}_bs{t.batch_size}_epo{t.epochs}"
        )
        if self.input_transform != "none":
            name += f"_input{self.input_transform}"
        return name + _seed_suffix(t.seed) + self.suffix

    def with_config_name(self, name: str) -> "SAERun | None":
        """The run on the same features whose folder has this name; None if it is no name of a run. Settings that a name
        does not show are the defaults."""
        found = _SAE_NAME.fullmatch(name)
        if found is None:
            return None
        training = TrainingSettings(
            lr=float(found["lr"]),
            resample_freq=int(found["resample"]),
            batch_size=int(found["batch"]),
            epochs=int(found["epochs"]),
            seed=int(found["seed"] or DEFAULT_SEED),
        )
        run = replace(
            self,
            sparsity=_sparsity(found["sparsity"]),
            expansion_factor=int(found["expansion"]),
            input_transform=found["transform"] or "none",
            suffix=found["suffix"],
            training=training,
        )
        return run if run.config_name == name else None


@dataclass(frozen=True)
class ProbeRun:
    """What identifies a linear probe, given the SAE run."""

    dataset: str
    lr: float = 1e-2
    batch_size: int = 512
    epochs: int = 200
    sparsity_lambda: float = 0.1
    on_features: bool = False
    seed: int = DEFAULT_SEED
    solver: str = "adam"
    """`adam`, the paper's; or `prox`, which has no learning rate and no batches, and leaves true zeros."""

    @property
    def config_name(self) -> str:
        """Folder name of the probe, as in the paper's code; with another solver, its name in place of Adam's settings."""
        steps = f"lr{self.lr}_bs{self.batch_size}" if self.solver == "adam" else self.solver
        return f"{steps}_epo{self.epochs}_nobias_clCE_spL1_spl{self.sparsity_lambda}{_seed_suffix(self.seed)}"

    def with_config_name(self, name: str) -> "ProbeRun | None":
        """The probe of the same data set and inputs whose folder has this name; None if it is no name of a probe."""
        found = _PROBE_NAME.fullmatch(name)
        if found is None:
            return None
        steps: dict[str, Any] = {"solver": "prox"}
        if not found["solver"]:
            steps = {"solver": "adam", "lr": float(found["lr"]), "batch_size": int(found["batch"])}
        run = replace(
            self,
            epochs=int(found["epochs"]),
            sparsity_lambda=float(found["lambda"]),
            seed=int(found["seed"] or DEFAULT_SEED),
            **steps,
        )
        return run if run.config_name == name else None

    @property
    def inputs(self) -> str:
        """`concepts`, or `features` for the linear-probe baseline."""
        return "features" if self.on_features else "concepts"


def _sparsity_name(sparsity: Sparsity) -> str:
    """How sparse and by which means, for a run's name: `l1coeff3e-05` (the paper's), `topk32`, `matryoshka_batchtopk32`."""
    match sparsity:
        case ReLU():
            return f"l1coeff{sparsity.l1_coeff}"
        case TopK():
            return f"topk{sparsity.k}"
        case BatchTopK():
            return f"batchtopk{sparsity.k}"
        case JumpReLU():
            return f"jumprelu{sparsity.l0_coeff}"
        case Matryoshka():
            return f"matryoshka_{_sparsity_name(sparsity.code)}"


def _sparsity(name: str) -> Sparsity:
    """The inverse of `_sparsity_name`."""
    kind, number = re.fullmatch(r"(matryoshka_|l1coeff|topk|batchtopk|jumprelu)(.+)", name).groups()  # type: ignore[union-attr]
    match kind:
        case "l1coeff":
            return ReLU(l1_coeff=float(number))
        case "topk":
            return TopK(int(number))
        case "batchtopk":
            return BatchTopK(int(number))
        case "jumprelu":
            return JumpReLU(l0_coeff=float(number))
    code = _sparsity(number)
    assert isinstance(code, TopK | BatchTopK)
    return Matryoshka(code)


_NUMBER = r"[\d.]+(?:e[+-]?\d+)?"
_SAE_NAME = re.compile(
    rf"lr(?P<lr>{_NUMBER})_(?P<sparsity>(?:l1coeff|jumprelu){_NUMBER}|(?:matryoshka_)?(?:batch)?topk\d+)"
    r"_ef(?P<expansion>\d+)_rf(?P<resample>\d+)_hook[^_]+_bs(?P<batch>\d+)_epo(?P<epochs>\d+)"
    r"(?:_input(?P<transform>centre|unit_norm))?(?:_seed(?P<seed>\d+))?(?P<suffix>[\w.-]*)"
)
_PROBE_NAME = re.compile(
    rf"(?:lr(?P<lr>{_NUMBER})_bs(?P<batch>\d+)|(?P<solver>prox))_epo(?P<epochs>\d+)_nobias_clCE_spL1"
    rf"_spl(?P<lambda>{_NUMBER})(?:_seed(?P<seed>\d+))?"
)


def _seed_suffix(seed: int) -> str:
    return "" if seed == DEFAULT_SEED else f"_seed{seed}"


class Artifacts:
    """The path of every artifact under the roots of a config."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    # Features, labels and splits

    def features(self, dataset: str, encoder: str, hook: str, split: str) -> Path:
        """Folder of a FeatureStore."""
        return self._dataset(dataset) / encoder_folder(encoder) / hook / split

    def probe_split(self, dataset: str) -> Path:
        """Class names and sizes of a probe dataset; its manifest covers the labels and the split too."""
        return self._dataset(dataset) / "split.json"

    def labels(self, dataset: str, dataset_split: str) -> Path:
        """int64 labels of a whole split of the dataset itself (`train` or `val`)."""
        return self._dataset(dataset) / f"all_labels_{dataset_split}.npy"

    def groups(self, dataset: str, dataset_split: str) -> Path:
        """int64 group of every image of a split of the dataset itself, for data sets that have groups (Waterbirds)."""
        return self._dataset(dataset) / f"all_groups_{dataset_split}.npy"

    def split_indices(self, dataset: str, split: str) -> Path:
        """Indices into the dataset's own train split that make our `train` or `train_val`."""
        return self._dataset(dataset) / f"{split}_idxs.npy"

    def _dataset(self, dataset: str) -> Path:
        return self.settings.data_dir / "activations_img" / dataset

    # Vocabulary

    def words(self) -> Path:
        return self.settings.vocab_dir / f"{self.settings.vocabulary}.txt"

    def embeddings(self, encoder: str) -> Path:
        return self.settings.vocab_dir / f"embeddings_{encoder_folder(encoder)}_{self.settings.vocabulary}.npy"

    def published_embeddings(self, encoder: str) -> Path:
        """Where the embeddings that the paper's authors publish are looked for."""
        return self.embeddings(encoder).with_name(self.embeddings(encoder).stem + ".pth")

    def embeddings_in_use(self, encoder: str) -> Path:
        """The published embeddings where they were put, else ours."""
        published = self.published_embeddings(encoder)
        return published if published.is_file() else self.embeddings(encoder)

    # SAE

    def sae(self, run: SAERun) -> Path:
        return self._sae_checkpoints(run) / "sparse_autoencoder_final.safetensors"

    def published_sae(self, run: SAERun) -> Path:
        """Where a checkpoint that the paper's authors publish is looked for."""
        return self.sae(run).with_suffix(".pt")

    def sae_in_use(self, run: SAERun) -> Path:
        """The SAE trained here where there is one, else a published one."""
        published = self.published_sae(run)
        return published if published.is_file() and not self.sae(run).is_file() else self.sae(run)

    def sae_runs(self, run: SAERun) -> list[SAERun]:
        """All SAEs that are trained, or were put there, on the features of `run`."""
        names = sorted(path.name for path in (self.settings.sae_dir / "SAEImg" / self._run(run)).parent.glob("*"))
        runs = [found for name in names if (found := run.with_config_name(name))]
        return [found for found in runs if self.sae_in_use(found).is_file()]

    def sae_intermediate(self, run: SAERun, items_seen: int) -> Path:
        return self._sae_checkpoints(run) / f"sparse_autoencoder_{items_seen}.safetensors"

    def sae_state(self, run: SAERun) -> Path:
        """State of an unfinished training, to go on from."""
        return self._sae_checkpoints(run) / "training_state.safetensors"

    def sae_log(self, run: SAERun) -> Path:
        return self._sae_checkpoints(run) / "training_log.csv"

    def sae_figure(self, run: SAERun) -> Path:
        """Training curves and the histogram of feature densities."""
        return self._sae_checkpoints(run) / "training.png"

    def concept_names(self, run: SAERun) -> Path:
        return self._sae_checkpoints(run) / "concept_names.csv"

    def _sae_checkpoints(self, run: SAERun) -> Path:
        return self.settings.sae_dir / "SAEImg" / self._run(run) / "sae_checkpoints"

    # Concept strengths and probes

    def strengths(self, run: SAERun, probe_dataset: str, split: str) -> Path:
        """Folder of CSR parts."""
        return self._probed(run, probe_dataset) / split / "all_concepts"

    def probe(self, run: SAERun, probe: ProbeRun) -> Path:
        return self._probe_folder(run, probe) / f"on_{probe.inputs}_final_{probe.config_name}.safetensors"

    def probe_runs(self, run: SAERun, probe: ProbeRun) -> list[ProbeRun]:
        """All probes that are trained on the inputs and the data set of `probe`."""
        names = sorted(path.name for path in self._probed(run, probe.dataset).glob("*"))
        probes = [found for name in names if (found := probe.with_config_name(name))]
        return [found for found in probes if self.probe(run, found).is_file()]

    def probe_intermediate(self, run: SAERun, probe: ProbeRun, epoch: int) -> Path:
        return self._probe_folder(run, probe) / f"on_{probe.inputs}_epoch{epoch}_{probe.config_name}.safetensors"

    def probe_state(self, run: SAERun, probe: ProbeRun) -> Path:
        """State of an unfinished training, to go on from."""
        return self._probe_folder(run, probe) / f"on_{probe.inputs}_state.safetensors"

    def probe_log(self, run: SAERun, probe: ProbeRun) -> Path:
        return self._probe_folder(run, probe) / f"on_{probe.inputs}_log.csv"

    def probe_accuracies(self, run: SAERun, probe: ProbeRun) -> Path:
        """Accuracy of every class, and of every group where there are groups."""
        return self._probe_folder(run, probe) / f"on_{probe.inputs}_accuracies_{probe.config_name}.csv"

    def nec(self, run: SAERun, probe_dataset: str) -> Path:
        """Folder of the accuracies at a number of effective concepts."""
        return self._probed(run, probe_dataset) / "nec"

    def nec_table(self, run: SAERun, probe_dataset: str) -> Path:
        return self.nec(run, probe_dataset) / "nec.csv"

    def nec_figure(self, run: SAERun, probe_dataset: str) -> Path:
        return self.nec(run, probe_dataset) / "nec.png"

    def nec_state(self, run: SAERun, probe_dataset: str, inputs: str) -> Path:
        """Where the path on `concepts`, `features` or `random` directions is, to go on from."""
        return self.nec(run, probe_dataset) / f"state_{inputs}.safetensors"

    def zero_shot(self, dataset: str, encoder: str, hook: str) -> Path:
        """The zero-shot classifier."""
        return (
            self.settings.probe_dir / "zero_shot" / dataset / encoder_folder(encoder) / hook / "zero_shot.safetensors"
        )

    def zero_shot_accuracies(self, dataset: str, encoder: str, hook: str) -> Path:
        return self.zero_shot(dataset, encoder, hook).with_name("accuracies.csv")

    def probe_results(self) -> Path:
        return self.settings.probe_dir / "probe_results.csv"

    def _probe_folder(self, run: SAERun, probe: ProbeRun) -> Path:
        return self._probed(run, probe.dataset) / probe.config_name / f"on_{probe.inputs}_ckpts"

    def _probed(self, run: SAERun, probe_dataset: str) -> Path:
        return self.settings.probe_dir / self._run(run) / probe_dataset

    @staticmethod
    def _run(run: SAERun) -> Path:
        return Path(run.dataset, encoder_folder(run.encoder), run.hook, run.config_name)

    # Explanations: a folder each, in which `data` is computed and `vis` drawn from it

    def task_agnosticity(self, run: SAERun, split: str) -> Path:
        return self._explanation("task_agnosticity", run, split)

    def meta_clusters(self, run: SAERun, dataset: str, split: str, n_clusters: int) -> Path:
        return self._explanation("meta_clusters", run, dataset, split, f"k{n_clusters}")

    def local_explanations(self, run: SAERun, probe: ProbeRun, split: str) -> Path:
        return self._explanation("local_explanations", run, probe.dataset, split, probe.config_name)

    def global_explanations(self, run: SAERun, probe: ProbeRun, split: str) -> Path:
        return self._explanation("global_explanations", run, probe.dataset, split, probe.config_name)

    def explanations_like(self, folder: Path, *, any_sae: bool, any_last: bool) -> list[Path]:
        """Finished explanations of the kind, encoder, data and split of `folder`.

        Args:
            folder: an explanation's folder.
            any_sae: of every SAE on the same features; else of the folder's own.
            any_last: with every probe, or number of clusters; else with the folder's own.
        """
        kind, encoder, dataset, hook, *names = folder.relative_to(self.settings.analysis_dir).parts
        sae, *rest = map(glob.escape, names)
        if any_last and len(rest) > 1:
            rest[-1] = "*"
        saes = self.settings.analysis_dir / kind / encoder / dataset / hook
        pattern = Path("*" if any_sae else sae, *rest)
        return sorted(found for found in saes.glob(str(pattern)) if (self.dump(found) / "manifest.json").is_file())

    def dump(self, folder: Path) -> Path:
        """What an explanation's figures are drawn from."""
        return folder / "data"

    def clustering(self, folder: Path) -> Path:
        """The cluster of every image, which names and figures do not change."""
        return folder / "clustering"

    def figures(self, folder: Path) -> Path:
        """An explanation's figures."""
        return folder / "vis"

    def _explanation(self, kind: str, run: SAERun, *parts: str) -> Path:
        sae = Path(encoder_folder(run.encoder), run.dataset, run.hook, run.config_name)
        return self.settings.analysis_dir.joinpath(kind, sae, *parts)

    # Figures and summaries

    def results_table(self, suffix: str) -> Path:
        """The paper's table in a format: md, csv or tex."""
        return self.settings.analysis_dir / f"results.{suffix}"

    def summary(self) -> Path:
        return self.settings.analysis_dir / "summary.json"

    def concept_sheet(self) -> Path:
        """The best-named latents and their images."""
        return self.settings.analysis_dir / "concept_sheet.png"
