"""The report: its claims from planted figures, what both of its files hold, and that nothing in a name gets out of hand."""

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dncbm.cli import parse
from dncbm.concepts.evidence.images import name_evidence
from dncbm.concepts.evidence.stability import seed_stability
from dncbm.concepts.naming_stage import names_and_evidence
from dncbm.concepts.sae import train_sae
from dncbm.concepts.strengths import load_concept_strengths, save_concept_strengths
from dncbm.explain.plotting.nec_curve import accuracy_and_figure
from dncbm.explain.report.claims import Findings, claims
from dncbm.explain.report.document import (
    NOT_SUPPORTED,
    NOT_TESTED,
    SUPPORTED,
    Card,
    Cards,
    Code,
    Document,
    Figure,
    Heading,
    Link,
    Name,
    Section,
    Small,
    Status,
    Table,
    note,
    said,
)
from dncbm.explain.report.figures import Line, curves, histogram
from dncbm.explain.report.findings import Few, independent_difference, mean_interval
from dncbm.explain.report.html import as_html
from dncbm.explain.report.interventions import read_edits
from dncbm.explain.report.markdown import as_markdown
from dncbm.explain.report.names import read_images_of_names, read_named
from dncbm.explain.report.probe import read_probed
from dncbm.explain.report.stage import CLAIMS, read_claims, write_report
from dncbm.flags import run_stage
from dncbm.probe.intervention_stage import measure_intervention
from dncbm.probe.stage import load_probe, train_linear_probe
from dncbm.runs import declarations as asked
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Compact, Intervention, ProbeDataset, ProbeRun, Report, SAERun, Seeds, Splits
from dncbm.runs.find import find
from dncbm.runs.manifests import file_hash, making, write_json
from dncbm.runs.settings import Settings, load_settings
from dncbm.stages import STAGES
from sparse_autoencoder import TopK, TrainingSettings
from sparse_autoencoder.declare import build, flags

SECTIONS = ["supports", "run", "sae", "names", "one-thing", "stability", "probe", "few", "interventions"]
BIDI = "\u202e"
HOSTILE = [
    "<script>alert(1)</script>", "a|b", '" onerror="alert(2)', "**bold** _it_", "`tick``tock`", "https://evil.example/x.js",
    f"turned{BIDI}around", "שלום", "line\nbreak", "&amp; &lt;", "![x](y.png)", "</style><b>", "$x$ #1 ~~no~~", "\udcff lone",
    "鳥 emoji 🐦", "[link](javascript:alert(3))",
]  # fmt: skip


# --------------------------------------------------------------------------------------------------- reading the files


@dataclass
class Parsed(HTMLParser):
    """What a page holds."""

    text: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    headings: list[int] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    images: list[dict[str, str | None]] = field(default_factory=list)
    tags: Counter = field(default_factory=Counter)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = dict(attrs)
        self.tags[tag] += 1
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        assert not [name for name in about if name.startswith("on")], "no handlers of events"
        self.ids += [about["id"] or ""] if "id" in about else []
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.links += [about[name] or "" for name in ("href", "src") if name in about]
        if tag == "img":
            self.images.append(about)
            self.text.append(about["alt"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if not {"style", "title", "nav"} & set(self.open):
            self.text.append(data)
        if "code" in self.open:
            self.code.append(data)


ALLOWED = "html head meta title style body header main footer nav section h1 h2 h3 p ol ul li a code strong small bdi br span"
ALLOWED += " div table caption thead tbody tr th td figure figcaption img"


def parsed(page: str) -> Parsed:
    """A page, which must be sound: nothing from elsewhere, alt texts, unique ids, headings in order, links with a target."""
    found = Parsed()
    found.feed(page)
    found.close()
    assert not found.open
    assert set(found.tags) <= set(ALLOWED.split())
    assert all(link.startswith(("#", "data:image/")) for link in found.links), found.links
    assert all(image.get("alt") for image in found.images)
    assert len(found.ids) == len(set(found.ids))
    assert {link[1:] for link in found.links if link.startswith("#")} <= set(found.ids)
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(found.headings, found.headings[1:], strict=False))
    assert "url(" not in page.split("<body>")[0]
    return found


def numbers_of_html(page: str) -> Counter:
    return Counter(re.findall(r"\d+(?:\.\d+)?", " ".join(parsed(page).text)))


def numbers_of_markdown(text: str) -> Counter:
    text = re.sub(r"\]\([^)]*\)|<a id=\"[^\"]*\"></a>", " ", text)
    return Counter(re.findall(r"\d+(?:\.\d+)?", re.sub(r"\\(?=[^\w\s])", "", text)))


def check_markdown(text: str) -> None:
    """Every row of a table has as many cells as its header, and no HTML but ours."""
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        cells = [len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()]
        assert len(set(cells)) == 1, table
    outside = re.sub(r"(`+).*?\1", "", re.sub(r"\\.", "", text))
    assert set(re.findall(r"<[^>]*>", outside)) <= {"<br>", "</a>", *re.findall(r'<a id="[\w-]+">', outside)}


# ------------------------------------------------------------------------------------------------------ both renderers


def document(name: str) -> Document:
    figure = Figure("chart", b"<svg/>", f"alt {name}", f"caption {name}")
    card = Card(Name(name), (f"fact {name}", "second"), "strip", b"jpeg", f"alt {name}")
    table = Table(
        f"caption {name}", ("head", name), ((Name(name), Code(name)), (name, (name, Small(name), Status(SUPPORTED))))
    )
    stacked = replace(table, stacks=True, numbers=False)
    blocks = (
        said(name, " ", Code(name), Link(name, "one")), note(name), Heading(name), table, stacked, figure,
        Cards(name, (card, replace(card, jpeg=b""))),
    )  # fmt: skip
    return Document(name, (name, Name(name)), (Section("one", name, blocks), Section("two", name, ())))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_text_in_both_files(name: str) -> None:
    page, text = as_html(document(name), name), as_markdown(document(name), name)
    found = parsed(page)
    shown = re.sub(r"[\ud800-\udfff\u202e]", "\ufffd", name.replace("\n", " "))
    places = sum(one.count(shown) for one in found.text)
    plain = parsed(as_html(document("plain name"), "plain name"))
    assert places == sum(one.count("plain name") for one in plain.text)
    assert found.tags == plain.tags
    assert found.links == plain.links
    for written in (page, text):
        assert BIDI not in written
        written.encode()
    check_markdown(text)
    unescaped = re.sub(r"(`+).*?\1", "", re.sub(r"\\.", "", text))
    assert unescaped.count("](") == re.sub(r"\\.", "", as_markdown(document("plain"), "plain")).count("](")
    assert "https://evil" not in unescaped


def test_markdown_shows_pictures_as_files_and_code_as_it_is() -> None:
    text = as_markdown(document("`a``b|"))
    assert "![alt" in text
    assert "(figures/chart.svg)" in text
    assert "(figures/strip.jpg)" in text
    assert "``` `a``b| ```" in text
    assert dict(document("x").pictures()).keys() == {"chart.svg", "strip.jpg"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.5], [1e-9, 1.0]])
def test_charts_of_few_values(values: list[float]) -> None:
    groups = {"a": np.array(values), "none": np.array([])}
    for log in (False, True):
        svg = histogram(groups, "x", log=log).decode()
        assert svg.count("<svg") == 1
    line = Line(values, values, values, values)
    assert curves({"a": line}, "x", "y", step=True) == curves({"a": line}, "x", "y", step=True)


# ----------------------------------------------------------------------------------------------------------- whole runs

RUN = SAERun(
    encoder="enc", dataset="photos", expansion_factor=2,
    sparsity=TopK(3), training=TrainingSettings(epochs=20, batch_size=50, lr=1e-2, resample_freq=0),
)  # fmt: skip
PROBE = ProbeRun("mine", epochs=5)
CLASSES = ["<b>first</b>", "se|cond", "third"]


def make_run(root: Path, make_store: Callable) -> Settings:
    """A small run on which every stage was run but the zero-shot baseline, with hostile words for names."""
    config = {name: name for name in ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir")}
    config |= {"vocabulary": "words", "sae_datasets": {"photos": "photos"}, "probe_datasets": {"mine": "images"}}
    config |= {"encoders": {}, "defaults": {}}
    (root / "config.py").write_text("".join(f"{key} = {value!r}\n" for key, value in config.items()))
    settings = load_settings(root / "config.py")
    artifacts, rng = Artifacts(settings), np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(8, 8)))[0]

    def features(n: int) -> np.ndarray:
        strengths = rng.exponential(size=(n, 8)) * (rng.random((n, 8)) < 0.3) + 0.01
        return (strengths @ directions).astype(np.float32)

    for split, n in (("train", 200), ("train_val", 60), ("val", 80)):
        make_store(artifacts.features("photos", "enc", "out", split), [features(n)])
    keys = {"train": np.arange(100), "train_val": np.arange(100, 120), "val": np.arange(60)}
    x = {split: features(len(of)) for split, of in keys.items()}
    own = {"train": np.zeros(120, dtype=np.int64), "val": np.zeros(60, dtype=np.int64)}
    for split in SPLITS:
        make_store(artifacts.features("mine", "enc", "out", split), [x[split]], [keys[split]])
        own[settings.own_split("mine", split)][keys[split]] = (x[split] @ directions.T)[:, :3].argmax(axis=1)
    split_file = artifacts.probe_split("mine")
    with making(split_file, "probe_split", {}, {}, overwrite=True) as work:
        write_json(split_file, {"class_names": CLASSES})
        for name, labels in own.items():
            np.save(artifacts.labels("mine", name), labels)
        work.done([split_file])
    for split, n in (("train", 120), ("val", 60)):
        for i in range(n):
            path = root / "images" / split / "abc"[i % 3] / f"{i:03d} <i>|.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (2 * i, 255 - 2 * i, 100)).save(path)
    words = [one for one in HOSTILE if "\n" not in one and "\udcff" not in one]
    artifacts.words().parent.mkdir(parents=True)
    artifacts.words().write_text("\n".join(words), encoding="utf-8")
    embeddings = np.concatenate([directions, rng.normal(size=(len(words) - 8, 8))]).astype(np.float32)
    np.save(artifacts.embeddings("enc"), embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
    on, dataset = {"device": "cpu"}, ProbeDataset("mine")
    for seed in (49, 50):
        train_sae(settings, replace(RUN, training=replace(RUN.training, seed=seed)), **on)
    names_and_evidence(settings, RUN, asked.Naming(), asked.Evidence(), asked.Alignment(), **on)
    save_concept_strengths(settings, RUN, dataset, Splits(), **on)
    train_linear_probe(settings, RUN, PROBE, **on)
    train_linear_probe(settings, RUN, replace(PROBE, on_features=True), **on)
    accuracy_and_figure(settings, RUN, dataset, Compact(4), **on)
    seed_stability(settings, RUN, Seeds(), **on)
    measure_intervention(settings, RUN, PROBE, Intervention(concepts=(words[0],)), **on)
    write_report(settings, RUN, PROBE, **on)
    return settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, make_store: Callable) -> Settings:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dncbm.probe.nec.PATH_END", 0.05)  # curves that are soon done
        settings = make_run(tmp_path_factory.mktemp("whole"), make_store)
    torch.set_num_threads(threads)
    return settings


def files(settings: Settings, run: SAERun = RUN, probe: ProbeRun = PROBE) -> tuple[str, str]:
    folder = Artifacts(settings).report(run, probe)
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


def test_both_files_hold_every_section_and_the_same_numbers(whole: Settings) -> None:
    page, text = files(whole)
    found = parsed(page)
    assert [one for one in found.ids if one in SECTIONS] == SECTIONS
    check_markdown(text)
    assert numbers_of_html(page) == numbers_of_markdown(text)
    assert sum(numbers_of_html(page).values()) > 300
    folder = Artifacts(whole).report(RUN, PROBE)
    shown = re.findall(r"\]\((figures/[^)]*)\)", text)
    assert {path.relative_to(folder).as_posix() for path in (folder / "figures").iterdir()} == set(shown)
    assert len(found.images) == len(shown)
    assert all((folder / path).stat().st_size > 100 for path in shown)
    commands = [one for one in found.code if one.startswith("python")]
    assert [one.split("/")[1].split(" ")[0] for one in commands] == ["04_assign_names.py", "08_zero_shot.py"]
    assert "--evidence_encoder NAME" in commands[0], "the rest was run"
    assert NOT_TESTED in text
    assert SUPPORTED in text
    words = [one for one in HOSTILE if one in " ".join(found.text)]
    assert "<script>alert(1)</script>" in words
    assert len(words) >= 5


def test_claims_for_programs_are_those_of_the_table(whole: Settings, tmp_path: Path) -> None:
    page, text = files(whole)
    folder = Artifacts(whole).report(RUN, PROBE)
    reported = read_claims(folder)
    assert reported is not None
    assert len(reported.claims) == len(claims(Findings()))
    table = page.partition('id="supports"')[2].partition("</table>")[0].partition("<tbody")[2]
    rows = [parsed_text(f"<tr{row}") for row in table.split("<tr")[1:]]
    for row, claim in zip(rows, reported.claims, strict=True):
        wanted = f"{claim.text} Criterion: {claim.criterion} {claim.status} {claim.rests_on} Details"
        assert re.sub(r" \S (?=(not )?(supported|tested) )", " ", row) == " ".join(wanted.split()), "apart from its sign"
        assert f'<a href="#{claim.section}">' in table
    assert f"{reported.made:%Y-%m-%dT%H:%M} UTC" in page
    assert f"{reported.made:%Y-%m-%dT%H:%M} UTC" in re.sub(r"\\(?=[^\w\s])", "", text)
    assert reported.made.utcoffset() == timedelta(0)
    assert read_claims(tmp_path) is None, "a folder without a report"


def parsed_text(row: str) -> str:
    """The words of a row of a table."""
    found = Parsed()
    found.feed(row.partition("</tr>")[0])
    return " ".join(" ".join(found.text).split())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda found: "{", "claims.json is damaged"),
        (lambda found: [], ""),
        (lambda found: found | {"made": "yesterday"}, "yesterday"),
        (lambda found: found | {"made": "2026-11-28T21:05:00"}, "no zone"),
        (lambda found: {"claims": found["claims"]}, "made"),
        (lambda found: found | {"claims": [found["claims"][0] | {"status": "maybe"}]}, "'maybe' is no status"),
        (lambda found: found | {"claims": [found["claims"][0] | {"rests_on": 3}]}, "no text"),
        (lambda found: found | {"claims": [found["claims"][0] | {"more": ""}]}, "more"),
        (lambda found: found | {"claims": [{"text": "a"}]}, "criterion"),
        (lambda found: found | {"claims": 3}, ""),
    ],
)
def test_damaged_claims_are_refused(
    whole: Settings, tmp_path: Path, refusal: Callable, spoil: Callable[[Any], Any], why: str
) -> None:
    found = json.loads((Artifacts(whole).report(RUN, PROBE) / CLAIMS).read_text(encoding="utf-8"))
    spoilt = spoil(found)
    (tmp_path / CLAIMS).write_text(spoilt if isinstance(spoilt, str) else json.dumps(spoilt), encoding="utf-8")
    with refusal(tmp_path / CLAIMS, "15_report.py", why):
        read_claims(tmp_path)


def test_probes_are_compared_as_by_hand(whole: Settings, tmp_path: Path) -> None:
    """On the same images; or as if on others, if the inputs of a probe were deleted."""
    features = np.load(next(Artifacts(whole).features("mine", "enc", "out", "val").glob("00000.npy")))
    labels = np.load(Artifacts(whole).labels("mine", "val"))
    z = load_concept_strengths(whole, RUN, "mine", "val").matrix.toarray()
    weights = [load_probe(whole, RUN, probe).numpy() for probe in (PROBE, replace(PROBE, on_features=True))]
    right = [(inputs @ weight).argmax(axis=1) == labels for inputs, weight in zip((z, features), weights, strict=True)]
    probed = read_probed(whole, RUN, PROBE, "cpu")
    assert probed is not None
    each = right[0].astype(float) - right[1]
    assert probed.probed.paired
    assert probed.probed.difference == pytest.approx(mean_interval(each))
    accuracies = right[0].mean(), right[1].mean()
    assert (probed.probed.top1, probed.probed.features) == pytest.approx(accuracies, abs=1e-6)
    for inputs in ("strengths", "features"):
        settings = copied(whole, tmp_path / inputs)
        artifacts = Artifacts(settings)
        missing = artifacts.strengths(RUN, "mine", "val"), artifacts.features("mine", "enc", "out", "val")
        shutil.rmtree(missing[inputs == "features"])
        write_report(settings, RUN, PROBE, device="cpu")
        found = read_probed(settings, RUN, PROBE, "cpu")
        assert found is not None
        assert found.probed.images == 60
        assert not found.probed.paired
        assert found.probed.difference == pytest.approx(independent_difference(*accuracies, 60), abs=1e-5)


def test_edits_are_told_by_their_concepts_and_everything_has_its_provenance(whole: Settings) -> None:
    names = read_named(whole, RUN, None)
    (edit,), _ = read_edits(whole, RUN, PROBE, names.labels)
    assert edit.what == "remove"
    assert edit.concepts == [label for label, name in zip(names.labels, names.names, strict=True) if name == HOSTILE[0]]
    assert edit.images == 60
    shown = parsed(files(whole)[0])
    after = " ".join(shown.text[max(i for i, text in enumerate(shown.text) if text == "Interventions") :])
    assert re.sub(r"\s+", " ", f"remove {' , '.join(edit.concepts[:5])}") in re.sub(r"\s+", " ", after)
    text = " ".join(shown.text)
    for title in (
        "probe on raw features", "compact bottleneck", "SAE of seed 50", "evidence from images of photos", "edit remove",
        "features of photos, val", "stability over seeds",
    ):  # fmt: skip
        assert title in text, title


def test_a_report_goes_where_it_is_asked_to(whole: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    write_report(whole, RUN, PROBE, Report(tmp_path), device="cpu")
    assert (tmp_path / "mine.txt").read_text() == "mine"
    said = capsys.readouterr().out
    assert str(tmp_path / "report.html") in said
    assert sum(line.startswith((SUPPORTED, NOT_SUPPORTED, NOT_TESTED)) for line in said.splitlines()) == len(
        claims(Findings())
    )
    page, _ = files(whole)
    again = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert again.partition("<footer>")[0] == page.partition("<footer>")[0], "the same, but for the time"


def test_a_file_that_is_no_report_is_not_replaced(whole: Settings, tmp_path: Path, refusal: Callable) -> None:
    (tmp_path / "report.html").write_text("<p>mine</p>")
    (tmp_path / "a file").write_text("mine")
    for folder, why in ((tmp_path, "report.html is not a report"), (tmp_path / "a file" / "below", "is a file")):
        with refusal(why, "--report_folder"):
            write_report(whole, RUN, PROBE, Report(folder), device="cpu")
    assert (tmp_path / "report.html").read_text() == "<p>mine</p>"
    assert [one.name for one in tmp_path.iterdir()] != [], "nothing was lost"
    write_report(whole, RUN, PROBE, Report(tmp_path / "new"), device="cpu")
    write_report(whole, RUN, PROBE, Report(tmp_path / "new"), device="cpu")
    with pytest.raises(ValueError, match="must be a path, not ''"):
        flags(Report)["report_folder"].parse("")


def copied(settings: Settings, root: Path) -> Settings:
    shutil.copytree(settings.path.parent, root, dirs_exist_ok=True)
    return load_settings(root / "config.py")


def test_damaged_inputs_are_refused(whole: Settings, tmp_path: Path, refusal: Callable) -> None:
    settings = copied(whole, tmp_path)
    names, stability = Artifacts(settings).concept_names(RUN), Artifacts(settings).seed_stability(RUN)
    sound = names.read_bytes()
    names.write_bytes(sound.replace(b"a|b", b"a|c"))
    with refusal(names):
        write_report(settings, RUN, PROBE, device="cpu")
    names.write_bytes(sound)
    stability.with_name(stability.name + ".manifest.json").write_text("{")
    with refusal(stability):
        write_report(settings, RUN, PROBE, device="cpu")


def test_results_that_are_out_of_date_are_left_out_with_a_command(whole: Settings, tmp_path: Path) -> None:
    settings = copied(whole, tmp_path)
    artifacts = Artifacts(settings)
    (edit,) = artifacts.interventions(RUN, PROBE)
    paths = {
        "stability": artifacts.seed_stability(RUN), "one-thing": artifacts.name_evidence(RUN, "photos"), "interventions": edit,
        "few": artifacts.nec_table(RUN, "mine"), "compact": artifacts.compact_table(RUN, "mine"),
    }  # fmt: skip
    for path in paths.values():
        path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    write_report(settings, RUN, PROBE, device="cpu")
    page, text = files(settings)
    found = parsed(page)
    assert numbers_of_html(page) == numbers_of_markdown(text)
    shown = " ".join(found.text)
    assert f"changed since: {edit.stem}" in shown
    for section in ("stability", "one-thing", "few"):
        assert f"out of date and left out: {paths[section].name} has changed" in shown
    commands = {one.split("/")[1].split(" ")[0] for one in found.code if one.startswith("python")}
    assert commands >= {"04_assign_names.py", "10_accuracy_at_nec.py", "14_seed_stability.py", "13_intervene.py"}


def test_names_that_all_count_have_no_false_discovery_rate(whole: Settings, tmp_path: Path) -> None:
    settings = copied(whole, tmp_path)
    naming = asked.Naming(names="all")
    names_and_evidence(settings, RUN, naming, asked.Evidence(), asked.Alignment(), device="cpu", overwrite=True)
    write_report(settings, RUN, PROBE, device="cpu")
    text = " ".join(parsed(files(settings)[0]).text)
    assert "Verdicts (--names all: no name abstains)" in text
    assert "Verdicts at" not in text
    found = claims(Findings(names=read_named(settings, RUN, None), few=Few({}, own={"named": 0.5, "concepts": 0.5})))
    assert (found[8].status, found[8].rests_on) == (NOT_TESTED, "No name abstains.")


def test_names_that_are_no_words_have_no_similarity(whole: Settings, tmp_path: Path) -> None:
    settings = copied(whole, tmp_path)
    names = Artifacts(settings).concept_names(RUN)
    names.with_name(names.name + ".manifest.json").unlink()
    names.write_text("\n".join(f"{i},my concept {i}" for i in range(16)))
    write_report(settings, RUN, PROBE, device="cpu")
    assert "my concept 3" in files(settings)[1]
    assert np.isnan(read_named(settings, RUN, None).similarity).all()


def test_every_data_set_with_evidence_is_shown_and_the_one_that_tests_most_is_judged(whole: Settings, tmp_path: Path) -> None:
    settings = copied(whole, tmp_path)
    name_evidence(settings, RUN, asked.Evidence("mine"), device="cpu")
    found = read_images_of_names(settings, RUN)
    assert {one.dataset for one in found} == {"photos", "mine"}
    assert found[0].n_tested >= found[1].n_tested
    write_report(settings, RUN, PROBE, device="cpu")
    text = files(settings)[1]
    assert "| photos | mine |" in text or "| mine | photos |" in text
    assert f"Claims are judged by {found[0].dataset}" in text
    stale = Artifacts(settings).name_evidence(RUN, found[0].dataset)
    stale.write_text(stale.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert [one.dataset for one in read_images_of_names(settings, RUN)] == [found[1].dataset]


def test_an_aligned_sae_says_so_and_its_names_are_not_judged(whole: Settings, tmp_path: Path) -> None:
    settings = copied(whole, tmp_path)
    names_and_evidence(settings, RUN, asked.Naming(), asked.Evidence(), asked.Alignment(0.01), device="cpu", overwrite=True)
    write_report(settings, replace(RUN, suffix="_align0.01"), PROBE, device="cpu")
    text = files(settings, replace(RUN, suffix="_align0.01"))[1]
    assert "fine-tuned towards its names" in text
    assert "--align_names 0.01" in text
    assert RUN.config_name in text
    assert text.count("The SAE was fine-tuned towards these names.") == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"shared": 0.9}, "random edits share 90"),
        ({"concepts": 0}, "it changes nothing"),
        ({}, "all random edits do the same"),
    ],
)
def test_edits_that_random_ones_are_nothing_to_compare_to(
    whole: Settings, tmp_path: Path, change: dict[str, float], why: str
) -> None:
    settings = copied(whole, tmp_path)
    (path,) = Artifacts(settings).interventions(RUN, PROBE)
    if not change:
        lines = [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]
        place = lines[0].index("deviation")
        lines[1:] = [[*line[:place], "", *line[place + 1 :]] if line[0] == "random" else line for line in lines[1:]]
        path.write_text("\n".join(map(",".join, lines)), encoding="utf-8")
    manifest = path.with_name(path.name + ".manifest.json")
    made = json.loads(manifest.read_text())
    made["details"]["rows"]["random"] |= {"shared": 0.1} | change
    made["outputs"][path.name] = {"bytes": path.stat().st_size, "sha256": file_hash(path)}
    manifest.write_text(json.dumps(made))
    (edit,), _ = read_edits(settings, RUN, PROBE, [f"{i}" for i in range(16)])
    assert edit.incomparable.startswith(why)
    write_report(settings, RUN, PROBE, device="cpu")
    assert f"not comparable: {why}" in " ".join(parsed(files(settings)[0]).text)


def test_names_edited_by_hand_are_reported(whole: Settings, tmp_path: Path) -> None:
    """They have no manifest, which alone knows the rate that they were tested at."""
    settings = copied(whole, tmp_path)
    names = Artifacts(settings).concept_names(RUN)
    names.with_name(names.name + ".manifest.json").unlink()
    names.write_bytes(names.read_bytes().replace(b"a|b", b"edited"))
    write_report(settings, RUN, PROBE, device="cpu")
    assert "edited" in files(settings)[1]


def test_pictures_are_not_needed(whole: Settings, tmp_path: Path) -> None:
    """The images were moved away; and one of them cannot be read."""
    settings = copied(whole, tmp_path)
    for path in (tmp_path / "images" / "train").glob("a/*"):
        path.write_bytes(b"no image")
    write_report(settings, RUN, PROBE, device="cpu")
    some = parsed(files(settings)[0])
    shutil.move(tmp_path / "images", tmp_path / "elsewhere")
    write_report(settings, RUN, PROBE, device="cpu")
    page, _ = files(settings)
    none = parsed(page)
    is_strip = [image for image in none.images if "jpeg" in (image["src"] or "")]
    assert not is_strip
    assert "There are no images" in " ".join(none.text)
    assert len(some.images) > len(none.images)


# ------------------------------------------------------------------------------------------- what was not run


def test_what_was_not_run_is_said_with_a_command_that_finds_the_run(world: Any, script: Callable) -> None:
    """A run of the paper's settings of which nothing is there but the SAE, untested names, strengths of val and a probe."""
    script("report")
    page, text = files(world.settings, world.run, world.probe)
    found = parsed(page)
    assert [one for one in found.ids if one in SECTIONS] == SECTIONS
    assert numbers_of_html(page) == numbers_of_markdown(text)
    commands = [shlex.split(one) for one in found.code if one.startswith("python")]
    scripts = [words[1].removeprefix("scripts/") for words in commands]
    assert set(scripts) == {
        "01_save_cc3m_features.py", "04_assign_names.py", "06_save_concept_strengths.py", "07_train_linear_probe.py",
        "08_zero_shot.py", "10_accuracy_at_nec.py", "13_intervene.py", "14_seed_stability.py",
    }  # fmt: skip
    by_script = {stage.script: stage for stage in STAGES.values()}
    for words, name in zip(commands, scripts, strict=True):
        flags = ["1" if word == "N" else word for word in words[2:]]
        _, values, given = parse(by_script[name], flags)
        if "--sae" in flags:
            assert build(SAERun, find(world.settings, STAGES["sae"], values, given)) == world.run
        if "--probe" in flags:
            assert build(ProbeRun, find(world.settings, STAGES["probe"], values, given)) == world.probe
    assert sum("--sae" in words for words in commands) >= 5
    assert sum("--probe" in words for words in commands) == 1
    assert SUPPORTED not in [line.strip("* ") for line in re.findall(r"\*\*[a-z ]+\*\*", text)]


def test_a_report_needs_no_probe(world: Any, script: Callable, refusal: Callable) -> None:
    """Flags that ask for one in particular still do."""
    probe = world.artifacts.probe(world.run, world.probe)
    shutil.rmtree(probe.parent)
    script("report")
    found = parsed(files(world.settings, world.run, world.probe)[0])
    assert "No probe was trained on these concepts." in " ".join(found.text)
    script("report", f"--seed {world.run.training.seed}")
    script("report", "--probe_dataset cifar10")
    with refusal("there is no probe", "07_train_linear_probe.py"):
        run_stage(world.settings, STAGES["report"], {"probe_lr": 3.0}, device="cpu", overwrite=False)
    with refusal("there is no probe mine"):
        run_stage(world.settings, STAGES["report"], {"probe": "mine"}, device="cpu", overwrite=False)
    with refusal("there is no SAE"):
        run_stage(world.settings, STAGES["report"], {"expansion_factor": 77}, device="cpu", overwrite=False)


def test_published_names_have_no_similarity_and_need_no_vocabulary(world: Any, script: Callable) -> None:
    artifacts = world.artifacts
    lines = (f"{i},{name}" for i, name in enumerate(world.names))
    artifacts.published_names(world.run).write_text("\n".join(lines))
    artifacts.concept_names(world.run).unlink()
    world.save_strengths(world.z, world.keys - world.keys.min(), split="train")
    script("report")
    text = " ".join(parsed(files(world.settings, world.run, world.probe)[0]).text)
    assert "others at random" in text
    assert "nan" not in text.split()


def test_a_report_is_of_concepts(world: Any, refusal: Callable) -> None:
    with refusal("--probe_on_features"):
        write_report(world.settings, world.run, replace(world.probe, on_features=True), device="cpu")
    shutil.rmtree(world.settings.sae_dir)
    with refusal("the SAE", "02_train_sae_img.py"):
        write_report(world.settings, world.run, world.probe, device="cpu")
