"""Where every artifact lies. No other module joins a path of the layout.

The layout is that of the paper's code, so that its published files are found where they are put.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dncbm.runs.declarations import HOOKS, SPLITS, ProbeFeatures, ProbeRun, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.settings import LOCAL_DIR, OPEN_CLIP, Settings
from sparse_autoencoder.declare import flags


def encoder_folder(encoder: str) -> str:
    """An encoder's name as a file name: `clip_ViT-B/16` -> `clip_ViT-B16`, as in the paper's files.

    `openclip:` and `local-dir:` names keep their parts apart; a `local-dir:` also gets a hash of its whole path, since
    two folders may share a last name.
    """
    if encoder.startswith(LOCAL_DIR):
        folder = Path(encoder.removeprefix(LOCAL_DIR)).absolute()
        return _short(f"local-dir_{folder.name}_{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}")
    if encoder.startswith(OPEN_CLIP):
        return _short(re.sub(r"[^\w.-]+", "_", encoder))
    return encoder.replace("/", "")


def _short(name: str) -> str:
    """A name; if it is too long for a part of a file's name, its two ends and a hash of the whole."""
    written = os.fsencode(name)
    if len(written) <= 120:
        return name
    first, last = (end.decode(errors="ignore") for end in (written[:50], written[-50:]))
    return f"{first}_{hashlib.sha256(written).hexdigest()[:16]}_{last}"


@dataclass(frozen=True)
class ExplanationFolder:
    """The files of an explanation: what is computed (`data`), and what is drawn from it (`vis`)."""

    dump: Path
    """Folder that the figures are drawn from."""
    numbers: Path
    about: Path
    """Texts."""
    chosen: Path
    """What was chosen to be drawn."""
    figures: Path
    """Folder of the pages."""
    contact_sheet: Path
    clustering: Path
    """Folder of the cluster of every image, which names and figures do not change."""
    cluster_labels: Path
    cluster_state: Path
    """State of an unfinished clustering, to resume from."""

    @classmethod
    def at(cls, folder: Path) -> "ExplanationFolder":
        """The files in a folder."""
        data, vis, clustering = folder / "data", folder / "vis", folder / "clustering"
        dump = (data, data / "numbers.npz", data / "about.json", data / "chosen.json")
        return cls(*dump, vis, vis / "index.html", clustering, clustering / "labels.npy", clustering / "state.npz")

    def image(self, dataset: str, index: int) -> Path:
        """Thumbnail of an image of a data set's split."""
        return self.dump / "images" / dataset / f"{index}.jpg"

    def page(self, name: str, suffix: str) -> Path:
        """A page: `pdf` or `png`."""
        return self.figures / f"{name}.{suffix}"


def shard_files(features: Path, shard: int) -> tuple[Path, Path, Path]:
    """The record, keys and features of a shard in a folder of features, in the order they are written."""
    stem = features / f"{shard:05d}"
    return stem.with_suffix(".json"), stem.with_suffix(".keys.npy"), stem.with_suffix(".npy")


def shard_keys(shard: Path) -> Path:
    """The keys beside a shard of features."""
    return shard.with_suffix(".keys.npy")


def strengths_part(strengths: Path, shard: Path) -> Path:
    """The part of a folder of concept strengths that belongs to a shard of features."""
    return strengths / f"{shard.stem}.npz"


# -------------------------------------------------------------------------------------------- the authors' own files

PUBLISHED = {
    "sae": r"sparse_autoencoder_final\.pt",
    "names": r"concept_names\.csv",
    "embeddings": r"embeddings_(?P<of>.+)\.pth",
    "indices": r"(?P<split>train|train_val)_idxs\.pth",
    "labels": r"all_labels_(?P<split>train|train_val|val)\.pth",
    "features": r"(?P<split>train|train_val|val)(\.pth)?",
    "strengths": r"all_concepts\.pth",
    "probe": r"on_(?P<inputs>concepts|features)_final_(?P<name>.+)\.pt",
}
"""Kind of file that the paper's authors publish or that their code writes -> what it is called, a regular expression."""


def published_name(kind: str, split: str = "*") -> str:
    """What a file of the authors is called, for messages."""
    called = {
        "sae": "sparse_autoencoder_final.pt", "names": "concept_names.csv", "embeddings": "embeddings_*.pth",
        "indices": f"{split}_idxs.pth", "labels": f"all_labels_{split}.pth", "features": f"{split}.pth",
        "strengths": "all_concepts.pth", "probe": "on_concepts_final_*.pt",
    }  # fmt: skip
    return called[kind]


_ALIGNED_SUFFIX = re.compile(r"_align(?P<strength>\d[\d.]*(e-?\d+)?)$")


def aligned_suffix(strength: float) -> str:
    """What a copy that is fine-tuned towards its names adds to the suffix of its SAE, where a `+` (1e+06) is not allowed."""
    return f"_align{strength:g}".replace("+", "")


def strength_in(suffix: str) -> str | None:
    """The strength that a suffix ends with, as `aligned_suffix` writes it; None if it ends otherwise."""
    found = _ALIGNED_SUFFIX.search(suffix)
    return found and found["strength"]


_SAE_NAME = re.compile(
    r"lr(?P<lr>[^_]+)_l1coeff(?P<l1_coeff>[^_]+)_ef(?P<expansion_factor>[^_]+)_rf(?P<resample_freq>[^_]+)"
    r"_hook(?P<hook_points>[^_]+)_bs(?P<train_sae_bs>[^_]+)_epo(?P<num_epochs>\d+)(?P<save_suffix>[\w.-]*)"
)
_PROBE_NAME = re.compile(
    r"lr(?P<probe_lr>[^_]+)_bs(?P<probe_train_bs>[^_]+)_epo(?P<probe_epochs>[^_]+)_nobias"
    r"(_clCE_spL1_spl(?P<probe_sparsity_loss_lambda>[^_]+))?"
)


def flags_of_published_sae(name: str) -> dict[str, Any]:
    """Flag -> value that the folder name of an SAE run of the authors stands for; what follows the epochs is the suffix.

    Raises UserError for any other name.
    """
    return _flags_of(_SAE_NAME, name, SAERun)


def flags_of_published_probe(name: str) -> dict[str, Any]:
    """Flag -> value that the folder name of a probe of the authors stands for. Without a sparsity loss, lambda is 0.

    Raises UserError for any other name.
    """
    return {"probe_sparsity_loss_lambda": 0.0} | _flags_of(_PROBE_NAME, name, ProbeRun)


def _flags_of(pattern: re.Pattern[str], name: str, run: type) -> dict[str, Any]:
    found, known = pattern.fullmatch(name), flags(run)
    if found is None:
        raise UserError(f"{name!r} is no name of a run of the authors: copy it from the names of their folders")
    try:
        return {flag: known[flag].parse(text) for flag, text in found.groupdict().items() if text is not None}
    except ValueError as error:
        raise UserError(f"the name {name!r} has a value that is not allowed: {error}") from error


def published_file(path: Path, settings: Settings) -> tuple[str, dict[str, Any]] | None:
    """The kind of one of the authors' files, and flag -> value that its name and its folders tell, the nearest folder first.

    A folder counts if it is the name of an encoder or of a data set of the config, of a split, or of a run in the authors'
    way. `sae` and `probe` are the names of runs, that of an SAE with what follows `sae_checkpoints` in its folder.

    Returns None if no file of the authors is called so.
    """
    named = {kind: match for kind, pattern in PUBLISHED.items() if (match := re.fullmatch(pattern, path.name))}
    if not named:
        return None
    ((kind, match), *_) = named.items()
    parts = match.groupdict()
    told: dict[str, Any] = {}
    if parts.get("split"):
        told["probe_split"] = parts["split"]
    if kind == "embeddings" and (encoder := _encoder_of(parts["of"].removesuffix(f"_{settings.vocabulary}"), settings)):
        told["img_enc_name"] = encoder
    for folder in reversed(path.absolute().parent.parts):
        told = _told_by(folder, settings) | told
    suffix = told.pop("save_suffix", "")
    if kind == "sae" and "sae" in told:
        told["sae"] += suffix
    if kind == "probe":
        told = {"probe": parts["name"]} | told | {"probe_on_features": parts["inputs"] == "features"}
    return kind, told


def _told_by(folder: str, settings: Settings) -> dict[str, Any]:
    """Flag -> value that a folder's name tells."""
    if (encoder := _encoder_of(folder, settings)) is not None:
        return {"img_enc_name": encoder}
    if folder in settings.sae_datasets:
        return {"sae_dataset": folder}
    if folder in settings.probe_datasets:
        return {"probe_dataset": folder}
    if folder in SPLITS:
        return {"probe_split": folder}
    if folder.startswith("sae_checkpoints"):
        return {"save_suffix": folder.removeprefix("sae_checkpoints")}
    if _SAE_NAME.fullmatch(folder):
        return {"sae": folder}
    return {"probe": folder} if _PROBE_NAME.fullmatch(folder) else {}


def _encoder_of(text: str, settings: Settings) -> str | None:
    """The encoder of the config that a text names, however it is written: `clip_ViT-B16`, `ViT-B_16`, `clip_ViT-B16_out`."""

    def plain(name: str) -> str:
        return re.sub(r"[\W_]", "", name.lower().removeprefix("clip"))

    endings = ("", *HOOKS)
    names = (name for name in settings.encoders if plain(name))
    return next((name for name in names if plain(text) in [plain(name) + ending for ending in endings]), None)


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

    def labels(self, dataset: str, own_split: str) -> Path:
        """int64 labels of one of the data set's own splits."""
        return self._dataset(dataset) / f"all_labels_{own_split}.npy"

    def groups(self, dataset: str, own_split: str) -> Path:
        """int64 group of every image of one of the data set's own splits, if it has groups (Waterbirds)."""
        return self._dataset(dataset) / f"all_groups_{own_split}.npy"

    def split_indices(self, dataset: str, split: str) -> Path:
        """Indices of our `train` or `train_val` in the data set's own split that it is taken from."""
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

    def saes(self) -> Iterable[Path]:
        """Every SAE that was trained here or imported, on whatever features."""
        checkpoints = (self.settings.sae_dir / "SAEImg").glob("*/*/*/*/sae_checkpoints/sparse_autoencoder_final.*")
        return (path for path in checkpoints if path.suffix in (".safetensors", ".pt"))

    def sae_files(self, run: SAERun) -> Iterable[Path]:
        """Everything that training an SAE leaves, names included."""
        return self._sae_checkpoints(run).glob("*")

    def sae_siblings(self, run: SAERun) -> list[str]:
        """Names of the other runs on the same features."""
        runs = self.settings.sae_dir / "SAEImg" / self._run(run).parent
        return sorted(path.parent.name for path in runs.glob("*/sae_checkpoints") if path.parent.name != run.config_name)

    def sae_intermediate(self, run: SAERun, items_seen: int) -> Path:
        return self._sae_checkpoints(run) / f"sparse_autoencoder_{items_seen}.safetensors"

    def sae_state(self, run: SAERun) -> Path:
        """State of an unfinished training, to resume from."""
        return self._sae_checkpoints(run) / "training_state.safetensors"

    def sae_log(self, run: SAERun) -> Path:
        return self._sae_checkpoints(run) / "training_log.csv"

    def sae_figure(self, run: SAERun) -> Path:
        """Training curves and the histogram of feature densities."""
        return self._sae_checkpoints(run) / "training.png"

    def concept_names(self, run: SAERun) -> Path:
        return self._sae_checkpoints(run) / "concept_names.csv"

    def published_names(self, run: SAERun) -> Path:
        """Where the names that the authors' code writes are looked for."""
        return self._sae_checkpoints(run).parent / "concept_names.csv"

    def concept_names_in_use(self, run: SAERun) -> Path:
        """The names given here where there are any, else published ones."""
        published = self.published_names(run)
        return published if published.is_file() and not self.concept_names(run).is_file() else self.concept_names(run)

    def firing_rates(self, run: SAERun) -> Path:
        """float64 share of the train images that each latent fires on, F. Imported and older SAEs have none."""
        return self._sae_checkpoints(run) / "firing_rates.npy"

    def name_evidence(self, run: SAERun, dataset: str) -> Path:
        """What the images of a data set's val say about each latent and its name."""
        return self._sae_checkpoints(run) / f"name_evidence_{dataset}.csv"

    def evidence_datasets(self, run: SAERun) -> list[str]:
        """The data sets whose images have said something about an SAE's names."""
        found = self._sae_checkpoints(run).glob("name_evidence_*.csv")
        return sorted(path.stem.removeprefix("name_evidence_") for path in found)

    def _sae_checkpoints(self, run: SAERun) -> Path:
        return self.settings.sae_dir / "SAEImg" / self._run(run) / "sae_checkpoints"

    # Concept strengths and probes

    def strengths(self, run: SAERun, probe_dataset: str, split: str) -> Path:
        """Folder of CSR parts."""
        return self._probed(run, probe_dataset) / split / "all_concepts"

    def probe(self, run: SAERun, probe: ProbeRun) -> Path:
        return self._probe_folder(run, probe) / f"on_{probe.inputs}_final_{probe.config_name}.safetensors"

    def probes(self) -> Iterable[Path]:
        """Every probe on concepts that was trained here or imported."""
        return self.settings.probe_dir.glob("*/*/*/*/*/*/on_concepts_ckpts/on_concepts_final_*.safetensors")

    def probe_files(self, run: SAERun, probe: ProbeRun) -> Iterable[Path]:
        """Everything that training a probe leaves."""
        return self._probe_folder(run, probe).glob(f"on_{probe.inputs}_*")

    def probe_intermediate(self, run: SAERun, probe: ProbeRun, epoch: int) -> Path:
        return self._probe_folder(run, probe) / f"on_{probe.inputs}_epoch{epoch}_{probe.config_name}.safetensors"

    def probe_state(self, run: SAERun, probe: ProbeRun) -> Path:
        """State of an unfinished training, to resume from."""
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

    def nec_leakage(self, run: SAERun, probe_dataset: str) -> Path:
        """The concepts beside their controls."""
        return self.nec(run, probe_dataset) / "leakage.csv"

    def nec_state(self, run: SAERun, probe_dataset: str, inputs: str) -> Path:
        """State of the unfinished path on a kind of inputs."""
        return self.nec(run, probe_dataset) / f"state_{inputs}.safetensors"

    def compact(self, run: SAERun, probe_dataset: str) -> Path:
        """Folder of the accuracies with few concepts."""
        return self._probed(run, probe_dataset) / "compact"

    def compact_table(self, run: SAERun, probe_dataset: str) -> Path:
        return self.compact(run, probe_dataset) / "compact.csv"

    def compact_concepts(self, run: SAERun, probe_dataset: str, size: int | None = None) -> Path:
        """The concepts that were chosen, as a list that `intervene --keep` reads; with a size, beside an edited one."""
        return self.compact(run, probe_dataset) / ("concepts.txt" if size is None else f"concepts_{size}.txt")

    def compact_figure(self, run: SAERun, probe_dataset: str) -> Path:
        return self.compact(run, probe_dataset) / "compact.png"

    def compact_state(self, run: SAERun, probe_dataset: str) -> Path:
        """State of the unfinished path."""
        return self.compact(run, probe_dataset) / "state.safetensors"

    def zero_shot(self, features: ProbeFeatures) -> Path:
        """The zero-shot classifier."""
        return self._on_features("zero_shot", features) / "zero_shot.safetensors"

    def zero_shot_accuracies(self, features: ProbeFeatures) -> Path:
        return self._on_features("zero_shot", features) / "accuracies.csv"

    def intervention(self, run: SAERun, probe: ProbeRun, edit: str) -> Path:
        """Accuracies before and after an edit of a probe's concepts, which has a name."""
        return self._probe_folder(run, probe) / "interventions" / f"{edit}.csv"

    def interventions(self, run: SAERun, probe: ProbeRun) -> Iterable[Path]:
        """The accuracies of every edit of a probe's concepts."""
        return self.intervention(run, probe, "").parent.glob("*.csv")

    def probe_results(self) -> Path:
        return self.settings.probe_dir / "probe_results.csv"

    def _probe_folder(self, run: SAERun, probe: ProbeRun) -> Path:
        probed = self._probed(run, probe.dataset)
        if probe.on_features:  # does not depend on the SAE
            probed = self._on_features("on_features", ProbeFeatures(probe.dataset, run.encoder, run.hook))
        return probed / probe.config_name / f"on_{probe.inputs}_ckpts"

    def _on_features(self, kind: str, features: ProbeFeatures) -> Path:
        return self.settings.probe_dir / kind / features.dataset / encoder_folder(features.encoder) / features.hook

    def _probed(self, run: SAERun, probe_dataset: str) -> Path:
        return self.settings.probe_dir / self._run(run) / probe_dataset

    @staticmethod
    def _run(run: SAERun) -> Path:
        return Path(run.dataset, encoder_folder(run.encoder), run.hook, run.config_name)

    # Explanations

    def task_agnosticity(self, run: SAERun, split: str) -> ExplanationFolder:
        return self.explanation("task_agnosticity", run, split)

    def meta_clusters(self, run: SAERun, dataset: str, split: str, n_clusters: int) -> ExplanationFolder:
        return self.explanation("meta_clusters", run, dataset, split, f"k{n_clusters}")

    def local_explanations(self, run: SAERun, probe: ProbeRun, split: str) -> ExplanationFolder:
        return self.explanation("local_explanations", run, probe.dataset, split, probe.config_name)

    def global_explanations(self, run: SAERun, probe: ProbeRun, split: str) -> ExplanationFolder:
        return self.explanation("global_explanations", run, probe.dataset, split, probe.config_name)

    def dumps(self, kind: str) -> Iterable[Path]:
        """Every dump of a kind of explanation."""
        return (manifest.parent for manifest in (self.settings.analysis_dir / kind).glob("*/*/*/*/**/data/manifest.json"))

    def explanation(self, kind: str, run: SAERun, *parts: str) -> ExplanationFolder:
        """The folder of an explanation; the parts tell apart those of one kind and SAE."""
        return ExplanationFolder.at(self._analysed(kind, run).joinpath(*parts))

    def _analysed(self, kind: str, run: SAERun) -> Path:
        """Where what is made from an SAE's concepts lies, by kind."""
        return self.settings.analysis_dir / kind / encoder_folder(run.encoder) / run.dataset / run.hook / run.config_name

    def suggested_concepts(self, run: SAERun, text: str) -> Path:
        """The list of the concepts nearest to a text."""
        name = _short(re.sub(r"[^\w.-]+", "_", text).strip("_.") or "text")
        return self._analysed("suggested_concepts", run) / f"{name}.txt"

    def seed_stability(self, run: SAERun) -> Path:
        """How stable each latent of an SAE is over seeds."""
        return self._analysed("seed_stability", run) / "seed_stability.csv"

    def seed_stability_figure(self, run: SAERun) -> Path:
        return self.seed_stability(run).with_suffix(".png")

    def report(self, run: SAERun, probe: ProbeRun) -> Path:
        """Folder of the report of a run."""
        return self._analysed("report", run) / probe.dataset / probe.config_name

    def browser(self, run: SAERun, probe: ProbeRun, split: str) -> Path:
        """Folder of the browser of a run."""
        return self._analysed("browser", run) / probe.dataset / probe.config_name / split

    def browsers(self, run: SAERun) -> Iterable[Path]:
        """The first page of every browser of an SAE."""
        return sorted(self._analysed("browser", run).glob("*/*/*/index.html"))

    # Exports

    def export(self, run: SAERun, probe: ProbeRun | None, kind: str) -> Path:
        """Folder of an export: `bundle`, or `saelens`, which has no probe."""
        parts = (probe.dataset, probe.config_name) if probe else ()
        return self._analysed(kind, run).joinpath(*parts)

    def exports(self, kind: str) -> Iterable[Path]:
        """Every export of a kind to its default place."""
        return (manifest.parent for manifest in (self.settings.analysis_dir / kind).glob("*/*/*/**/manifest.json"))

    # Figures and summaries

    def results_table(self, suffix: str) -> Path:
        """The paper's table in a format: md, csv or tex."""
        return self.settings.analysis_dir / f"results.{suffix}"

    def reproduction_record(self) -> Path:
        """What the steps of plans were said to take, and what they took."""
        return self.settings.analysis_dir / "reproduce" / "steps.json"

    def reproduction_table(self, suffix: str) -> Path:
        """The tables that a plan ends with, in a format: md, csv or tex."""
        return self.settings.analysis_dir / "reproduce" / f"tables.{suffix}"

    def reproduction_jobs(self) -> Path:
        """Folder of a plan's jobs for SLURM."""
        return self.settings.analysis_dir / "reproduce" / "slurm"

    def comparison(self, suffix: str) -> Path:
        """All SAEs beside one another: csv, or png, a figure."""
        return self.settings.analysis_dir / f"compare_runs.{suffix}"

    def summary(self) -> Path:
        return self.settings.analysis_dir / "summary.json"

    def concept_sheet(self) -> Path:
        """The best-named latents and their images."""
        return self.settings.analysis_dir / "concept_sheet.png"

    def name_truth(self, suffix: str) -> Path:
        """Names beside the words of the images themselves: csv, or png, a figure."""
        return self.settings.analysis_dir / f"name_truth.{suffix}"

    def judge_sheets(self) -> Path:
        """Folder of the sheets of images from which a person judges names."""
        return self.settings.analysis_dir / "judge_sheets"
