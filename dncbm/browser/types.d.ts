// What the chunks of a site hold: the contract between the Python that writes them and the JavaScript that reads them.
// Only `tsc` reads this file. `pack.py` describes how a chunk is stored, docs/METHOD.md section 8 what its numbers mean.
//
// Concepts, classes, runs and data sets are numbered from 0. An image is a data set and its row there. In arrays, -1 stands
// for nothing, and NaN for an unknown number. "F x 5" is a Matrix with F rows of 5.

/** A row-major matrix. */
interface Matrix<A extends Numbers = Numbers> {
  data: A;
  width: number;
  row(index: number): A;
}
type Numbers = Float32Array | Int32Array | Uint32Array | Uint16Array | Uint8Array;

// ------------------------------------------------------------------------------------------------- chunk "site"

interface Site {
  title: string;
  /** What this is, in one sentence. */
  lead: string;
  /** UTC, to the minute: 2026-11-28 21:05. */
  made: string;
  /** The command line that made it. */
  command: string;
  /** Package -> version. */
  versions: Record<string, string>;
  encoder: string;
  sae_dataset: string;
  split: string;
  datasets: Dataset[];
  /** The data set that the probes classify, if its images are here. */
  probed: number | null;
  /** Classes of the probed data set. */
  classes: string[];
  /** Its groups (Waterbirds); empty if it has none. */
  groups: string[];
  runs: Run[];
  /** Path of the report in this folder. */
  report: string | null;
  /** Concepts, classes and images in a chunk. */
  per_chunk: { concepts: number; classes: number; images: number };
  /** Equal parts of the range of strengths from which images are sampled. */
  range_parts: number;
  /** What claims count by: the cosine above which a latent is found again, and the false discovery rate of evidence. */
  criteria: { cosine: number; fdr: number };
  /** Pairs of runs that were compared: chunk match_<a>_<b> exists for each, with a < b. */
  matches: [number, number][];
}

interface Dataset {
  name: string;
  /** Images that are kept. */
  n: number;
  /** Images of the split; more than n if a sample was kept. */
  of: number;
  /** Its images' thumbnails; null if there are none. */
  thumbnails: Thumbnails | null;
  /** Why there are none. */
  no_thumbnails: string;
  /** Licence of the images and whom to credit, as the config says; null if it does not say. */
  license: string | null;
}

/** Sheet s holds images s * per_sheet onwards, row by row in `columns`. */
interface Thumbnails {
  /** Pixels per side of an image. */
  side: number;
  columns: number;
  per_sheet: number;
  /** Sheets in a folder: sheet s is thumbnails/<data set>/<floor(s / per_folder)>/<s>.webp */
  per_folder: number;
}

interface Run {
  /** Name of the SAE's folder. */
  name: string;
  /** Short: what tells it from the other runs, such as "seed 50"; of a single run its encoder. */
  label: string;
  n_latents: number;
  /** Whether there are strengths of each data set. Without them, its numbers are NaN and its images -1. */
  has_strengths: boolean[];
  /** Latents that no kept image activates; null if there are no strengths. */
  n_silent: number | null;
  has_names: boolean;
  /** Verdict -> number of latents. */
  verdicts: Record<string, number>;
  /** Whether there is a probe, and so classes, contributions and predictions. */
  has_probe: boolean;
  /** Title and value, as text. */
  figures: [string, string][];
  /** Title of a table, and its rows of flag and value. */
  settings: [string, [string, string][]][];
  /** Artifact, when it was made (UTC), and its hash. */
  provenance: [string, string, string][];
  /** What the report says that the run supports; null without a report. */
  claims: ClaimText[] | null;
  /** When the report was made. */
  claims_made: string;
  /** What was not run, and the command that runs it. */
  missing: { what: string; command: string }[];
  /** The command lines of some stages for this run, whether they were run or not. */
  commands: { names: string; probe: string; intervene: string };
  /** Rows of weights in a chunk weights_<k>. */
  weight_rows: number;
}

interface ClaimText {
  text: string;
  criterion: string;
  /** "supported", "not supported" or "not tested". */
  status: string;
  rests_on: string;
}

// --------------------------------------------------------------------------------- chunks of a run r: "<r>/<name>"

/** <r>/concepts: all of its F concepts. Columns of which nothing is known are NaN or "". */
interface Concepts {
  /** How each is shown: its name, `dog #17` where several share one, or `latent 123 (melon?)` where it abstains. */
  labels: string[];
  names: string[];
  /** The nearest words, the name first: F lists of at most 5. */
  words: string[][];
  /** "named", "collision", "abstains" or "" if it was not tested. */
  verdicts: string[];
  /** The word that was tested: the nearest one once words and latents are centred. */
  tested: string[];
  /** For a collision, a more specific word; else "". */
  alternatives: string[];
  /** The word that soft-WPMI gives; "" if none. */
  wpmi_words: string[];
  /** Index -> how a list for 13_intervene.py writes the concept, where that is not its label. */
  spellings: Record<string, string>;
  /** Data set whose images the evidence is from; "" if there is none. */
  evidence_dataset: string;
  similarity: Float32Array;
  /** F x 5. */
  similarities: Matrix<Float32Array>;
  q: Float32Array;
  z: Float32Array;
  margin: Float32Array;
  /** Latents with the same name, this one included. */
  shared: Int32Array;
  auc: Float32Array;
  /** q-value of the AUC. */
  auc_q: Float32Array;
  /** 1: soft-WPMI gives the same name. 0: another. NaN: it gives none. */
  wpmi_agrees: Float32Array;
  monoscore: Float32Array;
  /** Mean cosine with the matched latents of other seeds. */
  stability: Float32Array;
  /** Classes that have it among their leading concepts; 0 without a probe. */
  n_classes: Int32Array;
  /** Share of the SAE's training images that it fires on. */
  rate: Float32Array;
  /** F x data sets: share of the kept images that it fires on. */
  activity: Matrix<Float32Array>;
  /** F x data sets: largest strength. */
  most: Matrix<Float32Array>;
  /** F x data sets: mean strength over all kept images. */
  mean: Matrix<Float32Array>;
}

/** <r>/tops_<d>: images of data set d for the cards. */
interface Tops {
  /** F x 6: the images that activate each concept most, the strongest first. */
  images: Matrix<Int32Array>;
}

/** <r>/concept_<k>: concepts k * per_chunk.concepts onwards, n of them. */
interface ConceptDetails {
  /** One per data set. */
  datasets: ConceptImages[];
  /** n x 10: concepts whose decoder columns are nearest, and the cosines. */
  alike: Matrix<Int32Array>;
  alike_cosine: Matrix<Float32Array>;
  /** n x 10: concepts most often active together, and in which share of the images where one of the two is. */
  together: Matrix<Int32Array>;
  together_share: Matrix<Float32Array>;
  /** n x 10: the classes of its largest positive weights, and of its largest negative ones; width 0 without a probe. */
  for_classes: Matrix<Int32Array>;
  for_weights: Matrix<Float32Array>;
  against_classes: Matrix<Int32Array>;
  against_weights: Matrix<Float32Array>;
}

interface ConceptImages {
  /** n x 12: the images that activate each concept most, the strongest first. */
  top: Matrix<Int32Array>;
  top_strengths: Matrix<Float32Array>;
  /** n x 18: from each of 6 equal parts of the range (0, most], the highest first, 3 images drawn at random. */
  sampled: Matrix<Int32Array>;
  sampled_strengths: Matrix<Float32Array>;
  /** n x 24: images whose strength lies in each of 24 equal parts of (0, most], the lowest first. */
  histogram: Matrix<Int32Array>;
}

/** <r>/classes: C classes of the probed data set. */
interface Classes {
  /** Kept images, and how many of them are predicted right. */
  size: Int32Array;
  right: Int32Array;
  /** Mean logit of the class over its images; NaN without images. */
  mean_logit: Float32Array;
}

/** <r>/class_<k>: classes k * per_chunk.classes onwards, n of them. */
interface ClassDetails {
  /** n x 20: concepts of largest mean contribution to the class over its images, the largest first. */
  concepts: Matrix<Int32Array>;
  contributions: Matrix<Float32Array>;
  weights: Matrix<Float32Array>;
  /** n x 8: those of most negative mean contribution, the lowest first. */
  against: Matrix<Int32Array>;
  against_contributions: Matrix<Float32Array>;
  against_weights: Matrix<Float32Array>;
  /** n: sum and number of the other mean contributions. */
  remaining: Float32Array;
  n_remaining: Int32Array;
  /** n x 24: images of the class, drawn at random. */
  images: Matrix<Int32Array>;
  /** n x 6: classes that its images are most often taken for, and how many images. */
  confused: Matrix<Int32Array>;
  confused_count: Matrix<Int32Array>;
  /** n x (6 * 6): for each of these, the concepts that speak most for it against the class: the mean over the images that are
   * taken for it of strength * (weight for it - weight for the class). */
  confused_concepts: Matrix<Int32Array>;
  confused_values: Matrix<Float32Array>;
  /** n x (6 * 6): images that are taken for it. */
  confused_images: Matrix<Int32Array>;
}

/** <r>/weights_<k>: concepts k * weight_rows onwards. */
interface Weights {
  /** n x C. */
  weight: Matrix<Float32Array>;
}

/** <r>/predictions: of the kept images of the probed data set. */
interface Predictions {
  predicted: Int32Array;
}

/** <r>/strengths_<d>_<k>: images k * per_chunk.images onwards, as CSR. */
interface Strengths {
  indptr: Uint32Array;
  /** Concepts in ascending order. */
  indices: Uint16Array | Uint32Array;
  values: Float32Array;
}

// --------------------------------------------------------------------------------------- chunks that runs share

/** images_<d>: the kept images of data set d. */
interface Images {
  /** File names, without folders. */
  names: string[];
  /** Names of the data set's classes. */
  classes: string[];
  /** Index of each in the data set's own split. */
  key: Int32Array;
  /** True class. */
  label: Int32Array;
  /** Group; empty if there are none. */
  group: Int32Array;
}

/** match_<a>_<b>: one-to-one matches of the live concepts of two runs. */
interface Match {
  /** Concept of run b for each of run a; -1: none. */
  partner: Int32Array;
  /** Cosine of the centred decoder columns; NaN: no partner. */
  cosine: Float32Array;
}

// ------------------------------------------------------------------------------------------------------- the page

/** What the hash of the address says: `#/concept/12?run=1`. */
interface Route {
  view: string;
  /** What follows the view: ["12"]. */
  parts: string[];
  params: URLSearchParams;
  run: number;
}

/** A view: what `main` shows for a route. It rejects if it needs something that is missing. */
type View = (route: Route) => Promise<HTMLElement>;

/** Concept -> factor of its strength; 0 removes it. Concepts with a factor of 1 are left out. */
type Edits = Map<number, number>;

interface Uint8ArrayConstructor {
  fromBase64?: (text: string) => Uint8Array<ArrayBuffer>;
}
