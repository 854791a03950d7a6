"""The command line of each stage: all that `--help` needs, without importing what the stage computes with.

A module of a higher room adds the rest beside its function: `SAE = commands.SAE.stage(function=train_sae, ...)`.
"""

from dataclasses import dataclass

from dncbm.runs.declarations import (
    Alignment,
    BestRuns,
    Browse,
    Clusters,
    Compact,
    Comparison,
    Download,
    Drawing,
    Evidence,
    Explained,
    Export,
    Extraction,
    Grid,
    Intervention,
    LatentSelection,
    NamedEncoder,
    NamedProbe,
    NamedSAE,
    Naming,
    Partition,
    ProbeDataset,
    ProbeFeatures,
    ProbeRun,
    ProbeSchedule,
    Prompts,
    Published,
    Ranking,
    Report,
    SAEFeatures,
    SAERun,
    Seeds,
    Selection,
    ShownDatasets,
    Splits,
    Tracking,
)
from dncbm.runs.manifests import IMPORTED
from dncbm.runs.stage import Command

DOWNLOAD = Command(
    name="download",
    script="00_download_cc3m.py",
    summary="Download Conceptual Captions from its two TSV files, as webdataset shards.",
    takes=(Download,),
    place="dncbm.features.datasets.download:DOWNLOAD",
)
SAE_FEATURES = Command(
    name="sae_features",
    script="01_save_cc3m_features.py",
    summary="Extract the features of the images that the SAE is trained on.",
    takes=(SAEFeatures, Extraction, Partition),
    several_processes=True,
    place="dncbm.features.stage:SAE_FEATURES",
)
SAE = Command(
    name="sae",
    script="02_train_sae_img.py",
    summary="Train the sparse autoencoder.",
    takes=(SAERun, Tracking),
    trains=(SAERun,),
    several_processes=True,
    place="dncbm.concepts.sae:SAE",
)
VOCABULARY = Command(
    name="vocabulary",
    script="03_save_vocab_embeddings.py",
    summary="Embed the words that may name a latent.",
    takes=(NamedEncoder,),
    place="dncbm.concepts.vocabulary:VOCABULARY",
)
NAMES = Command(
    name="names",
    script="04_assign_names.py",
    summary="Name each latent of the sparse autoencoder after its nearest word, and test the names.",
    takes=(SAERun, Naming, Evidence, Alignment),
    place="dncbm.concepts.naming_stage:NAMES_AND_EVIDENCE",
)
PROBE_FEATURES = Command(
    name="probe_features",
    script="05_save_probe_features.py",
    summary="Extract the labels, the split and the features of the images that the probe classifies.",
    takes=(ProbeFeatures, Splits, Extraction, Partition),
    several_processes=True,
    place="dncbm.features.stage:PROBE_FEATURES",
)
STRENGTHS = Command(
    name="strengths",
    script="06_save_concept_strengths.py",
    summary="Compute the concept strengths of the images that the probe classifies.",
    takes=(SAERun, ProbeDataset, Splits, Partition),
    several_processes=True,
    place="dncbm.concepts.strengths:STRENGTHS",
)
PROBE = Command(
    name="probe",
    script="07_train_linear_probe.py",
    summary="Train and evaluate the sparse linear probe on concept strengths, or with --probe_on_features the baseline.",
    takes=(SAERun, ProbeRun, ProbeSchedule, Tracking),
    trains=(ProbeRun,),
    place="dncbm.probe.stage:PROBE",
)
ZERO_SHOT = Command(
    name="zero_shot",
    script="08_zero_shot.py",
    summary="Evaluate the zero-shot baseline: features classified by the nearest description of a class.",
    takes=(ProbeFeatures, Prompts),
    place="dncbm.probe.zero_shot:ZERO_SHOT",
)
RESULTS_TABLE = Command(
    name="results_table",
    script="09_results_table.py",
    summary="Print the paper's table, with our figures beside the published ones, and write it as Markdown, CSV and LaTeX.",
    takes=(NamedSAE, BestRuns),
    place="dncbm.probe.results_table:RESULTS_TABLE",
)
COMPARE_RUNS = Command(
    name="compare_runs",
    script="compare_runs.py",
    summary="Compare all SAEs: settings, L0, explained variance, names and accuracies as a table, a CSV file and a figure.",
    takes=(Comparison,),
    place="dncbm.explain.plotting.trade_offs:COMPARE_RUNS",
)
NEC = Command(
    name="nec",
    script="10_accuracy_at_nec.py",
    summary="Measure the accuracy with few concepts per class and per decision, on concepts and on controls.",
    takes=(SAERun, ProbeDataset, Compact),
    place="dncbm.explain.plotting.nec_curve:NEC_AND_FIGURE",
)
EXPORT = Command(
    name="export",
    script="11_export_model.py",
    summary="Export the trained bottleneck as a folder that one line loads, or its SAE for SAELens.",
    takes=(SAERun, ProbeRun, Export),
    place="dncbm.bottleneck.export:EXPORT",
)
IMPORT_PUBLISHED = Command(
    name=IMPORTED,
    script="12_import_published.py",
    summary="Import what the paper's authors publish or their code writes: SAEs, names, embeddings, features, probes.",
    takes=(Published, NamedSAE, NamedProbe),
    place="dncbm.bottleneck.published:IMPORT_PUBLISHED",
)
INTERVENE = Command(
    name="intervene",
    script="13_intervene.py",
    summary="Remove, keep or scale concepts, and measure the probe's accuracy before, after, and after a refit.",
    takes=(SAERun, ProbeRun, Intervention),
    place="dncbm.probe.intervention_stage:INTERVENE",
)
SEED_STABILITY = Command(
    name="seed_stability",
    script="14_seed_stability.py",
    summary="Compare SAEs that differ only in their seed: which latents, and which names, do they share?",
    takes=(SAERun, Seeds),
    place="dncbm.explain.plotting.seed_stability:STABILITY_AND_FIGURE",
)
REPORT = Command(
    name="report",
    script="15_report.py",
    summary="Write one page about a run: what it supports, with the figures that this rests on.",
    takes=(SAERun, ProbeRun, Report),
    place="dncbm.explain.report.stage:REPORT",
)
BROWSE = Command(
    name="browse",
    script="16_browse.py",
    summary="Write the browser of a run: a folder of pages that shows its concepts, classes and images, and opens anywhere.",
    takes=(SAERun, ProbeRun, Explained, Browse),
    place="dncbm.browser.stage:BROWSE",
)
REPRODUCE = Command(
    name="reproduce",
    script="reproduce.py",
    summary="Plan and run the paper's experiment, or a sweep: every stage, for encoders, data sets, settings and seeds.",
    takes=(Grid,),
    passes_on=True,
    place="dncbm.reproduce.run:REPRODUCE",
)


# ---------------------------------------------------------------------------------------------------- explanations


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The two command lines of a kind of explanation: its dump and its plot."""

    name: str
    script: str
    """Name of its two scripts, without `_dump.py` and `_plot.py`."""
    dump_summary: str
    plot_summary: str
    takes: tuple[type, ...]
    """The declarations that name an explanation."""
    dump_takes: tuple[type, ...] = ()
    """Declarations that only the dump reads."""
    selects: type[LatentSelection] = Selection
    """What chooses the figures to draw."""
    options: tuple[type, ...] = ()
    """Declarations that only the plot reads."""

    @property
    def commands(self) -> tuple[Command, Command]:
        """Those of the dump and of the plot."""
        dump = Command(
            name=f"{self.name}_dump",
            script=f"visualization/{self.script}_dump.py",
            summary=self.dump_summary,
            takes=(*self.takes, *self.dump_takes, self.selects),
            place=f"dncbm.explain.dumps.{self.name}:DUMP",
        )
        plot = Command(
            name=f"{self.name}_plot",
            script=f"visualization/{self.script}_plot.py",
            summary=self.plot_summary,
            takes=(*self.takes, self.selects, Drawing, *self.options),
            place=f"dncbm.explain.plotting.{self.name}:PLOT",
        )
        return dump, plot


TASK_AGNOSTICITY = Explanation(
    name="task_agnosticity",
    script="vis_task_agnosticity",
    dump_summary="Compute which images of every probe data set activate each latent most.",
    plot_summary="Draw latents with their top images of every probe data set.",
    takes=(SAERun, Explained),
    dump_takes=(ShownDatasets,),
    selects=LatentSelection,
)
META_CLUSTERS = Explanation(
    name="meta_clusters",
    script="vis_meta_clustering",
    dump_summary="Cluster the images of a split by their concept strengths.",
    plot_summary="Draw meta clusters with their images and concepts.",
    takes=(SAERun, ProbeDataset, Explained, Clusters),
)
LOCAL_EXPLANATIONS = Explanation(
    name="local_explanations",
    script="vis_local_explanations",
    dump_summary="Compute which concepts each prediction is made of.",
    plot_summary="Draw images with the concepts that their predictions are made of.",
    takes=(SAERun, ProbeRun, Explained),
)
GLOBAL_EXPLANATIONS = Explanation(
    name="global_explanations",
    script="vis_global_explanations",
    dump_summary="Compute which concepts lead each class.",
    plot_summary="Draw classes with the concepts that lead them.",
    takes=(SAERun, ProbeRun, Explained),
    options=(Ranking,),
)
