"""Functions of the pages, called in an open page, and what happens when data comes late."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import settle
from tests.browser.made_up import ABSTAINING, CLASSES, CONFOUND, DEAD, NAMES, F, MadeUp, words_of
from tests.browser.test_pack import read_chunk
from tests.browser.test_pages import HOLD, cards, edits_in, settle_address, wrongly_gull

pytestmark = pytest.mark.slow

RELEASE = """async (name) => {
  release();
  await chunk(name);
  await new Promise((resolve) => setTimeout(resolve, 50));
}"""
"""Releases what is held, and waits until the views have had the time to take it."""
CHANGE = """async ([run, changes]) => {
  const concepts = await ofRun(run, "concepts");
  for (const [name, values] of Object.entries(changes)) (concepts[name].data ?? concepts[name]).set(values);
}"""
"""Changes what is known of a run's concepts."""
ENLARGE = """async ([run, times]) => {
  const repeated = (value) => {
    if (value?.row) return matrix(repeated(value.data), value.width);
    if (Array.isArray(value)) return Array.from({ length: times }, () => value).flat();
    if (!ArrayBuffer.isView(value)) return value;
    const all = new value.constructor(times * value.length);
    for (let k = 0; k < times; k++) all.set(value, k * value.length);
    return all;
  };
  for (const name of ["concepts", "tops_0"]) {
    const whole = Object.entries(await ofRun(run, name));
    chunks.set(`${run}/${name}`, Promise.resolve(Object.fromEntries(whole.map(([key, value]) => [key, repeated(value)]))));
  }
  site.runs[run].n_latents *= times;
}"""
"""Repeats all concepts of a run."""
LISTED = """async ([view, addresses]) => {
  const found = [];
  for (const address of addresses) {
    await VIEWS[view]({ view, parts: [], params: new URLSearchParams(address), run: 0 });
    found.push([address, listed.get(view).items]);
  }
  return Object.fromEntries(found);
}"""
"""What a list shows at each of some addresses."""


def go(page: Page, hash_: str) -> None:
    page.evaluate("hash => { location.hash = hash; }", hash_)
    settle(page)


def numbers(texts: list[str]) -> list[float]:
    return [float(text.replace("−", "-").split("=")[-1]) for text in texts]


# ------------------------------------------------------------------------------------------------------------- late data


def test_a_view_that_is_ready_late_does_not_replace_a_newer_one(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    page.evaluate(HOLD, "concept_0")
    page.evaluate("location.hash = '#/concept/3'")
    page.wait_for_function("() => document.querySelector('main[aria-busy]')")
    go(page, "#/classes")
    page.evaluate(RELEASE, "0/concept_0")
    expect(page.get_by_role("heading", level=1)).to_have_text("Classes")
    assert page.title() == "Classes · Concepts of made-up things"


def test_a_data_set_that_comes_late_does_not_replace_the_one_chosen_since(open_page, made_up) -> None:
    page = open_page(made_up().folder, "#/concepts")
    page.evaluate(HOLD, "tops_1")
    for dataset in ("1", "0"):
        page.get_by_label("Images of").select_option(dataset)
    page.evaluate(RELEASE, "0/tops_1")
    settle_address(page)
    assert page.evaluate("location.hash") == "#/concepts?data=0"
    sheets = page.locator(".cards .picture").evaluate_all("all => all.map((one) => one.style.backgroundImage)")
    assert sheets
    assert not [sheet for sheet in sheets if "thumbnails/0/" not in sheet]


KEPT = [
    ({"a": 20e6, "b": 20e6, "c": 20e6}, [], "abc"),
    ({"a": 20e6, "b": 20e6, "c": 20e6, "d": 1}, [], "bcd"),
    ({"a": 20e6, "b": 20e6, "c": 20e6, "d": 1}, ["a"], "cda"),
    ({"a": 20e6, "b": 20e6, "c": 20e6, "d": 50e6}, ["b", "a"], "ba"),
    ({"a": None, "b": 50e6, "c": 50e6}, [], "ac"),
    ({"a": 70e6}, [], ""),
]
"""Chunks and their bytes (None while it loads), those used since, and what is kept."""


def test_chunks_used_least_recently_are_dropped_first(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    drop = """([sizes, used]) => {
      chunks.clear();
      chunkBytes.clear();
      for (const [name, bytes] of Object.entries(sizes)) {
        chunks.set(name, Promise.resolve(name));
        if (bytes !== null) chunkBytes.set(name, bytes);
      }
      used.forEach(chunk);
      dropOldChunks();
      return [...chunks.keys()].join("");
    }"""
    assert [page.evaluate(drop, [sizes, used]) for sizes, used, _ in KEPT] == [kept for *_, kept in KEPT]


# ----------------------------------------------------------------------------------------------------------------- edits


def test_without_groups_the_mean_and_the_worst_of_the_classes_that_have_images_are_told(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    classes = ["none", "a", "b", "c"]
    rng = np.random.default_rng(0)
    label, before, after = (rng.integers(1, 4, 50) for _ in range(3))
    before[label == 1], after[label == 3] = 0, 0
    call = """([classes, label, group, before, after]) => {
      Object.assign(site, { classes, groups: [] });
      return accuracies({ label, group }, before, after);
    }"""
    overall, mean, worst = page.evaluate(call, [classes, label.tolist(), [], before.tolist(), after.tolist()])
    right = [[(found == label)[label == number].mean() for number in (1, 2, 3)] for found in (before, after)]
    assert [row["name"] for row in (overall, mean, worst)] == ["Overall", "Mean over classes", "Worst class"]
    for row, of_classes in ((mean, np.mean), (worst, np.min)):
        np.testing.assert_allclose([row["before"], row["after"]], [of_classes(one) for one in right])
    np.testing.assert_allclose([overall["before"], overall["after"]], [(before == label).mean(), (after == label).mean()])
    assert worst["of"] == ["a", "c"]
    assert [row["n"] for row in (overall, mean)] == [50, 50]


def test_probabilities_of_large_logits_are_finite(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    for logits in ([1000, 0], [-1000, -1000], [0.5, -0.25, 2]):
        odds = np.exp(np.array(logits) - max(logits))
        found = page.evaluate("logits => [...softmax(Float64Array.from(logits))]", logits)
        np.testing.assert_allclose(found, odds / odds.sum())


WATCH = "() => { const whole = accuracyWith; accuracyWith = (...all) => (window.outcome = whole(...all)); }"
OUTCOME = "() => window.outcome.then(() => 'measured', (error) => error.name)"


def test_an_edit_stops_the_measurement_and_removes_what_was_measured(open_page, made_up) -> None:
    page = open_page(made_up().folder, f"#/edits?edit={CONFOUND}:0")
    page.evaluate(WATCH)
    page.evaluate(HOLD, "strengths_0_1")
    measure = page.get_by_role("button", name="Accuracy of the split")
    measure.click()
    expect(page.get_by_role("progressbar")).to_be_visible()
    page.evaluate(f"changeEdits(new Map([[{CONFOUND}, 0.5]]))")
    expect(page.locator(".edit-list")).to_contain_text("× 0.50")
    page.evaluate("release()")
    assert page.evaluate(OUTCOME) == "AbortError"
    measure.click()
    assert page.evaluate(OUTCOME) == "measured"
    table = page.get_by_role("table", name=re.compile("^Accuracy on"))
    expect(table).to_be_visible()
    page.evaluate(f"changeEdits(new Map([[{CONFOUND}, 0.25]]))")
    expect(table).to_have_count(0)


def test_the_focus_stays_with_the_edits_when_one_is_removed(open_page, made_up) -> None:
    page = open_page(made_up().folder, f"#/edits?edit=0:0.5,{CONFOUND}:0")
    page.get_by_role("button", name="Remove this edit of water").click()
    expect(page.locator(".edit-list li")).to_have_count(1)
    expect(page.get_by_role("heading", name="Edits", exact=True)).to_be_focused()
    settle_address(page)
    assert edits_in(page) == {0: 0.5}


def test_the_list_has_one_line_of_comment_whatever_the_title(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    text = page.evaluate("""async () => {
      site.title = "two\\nlines\\r\\nand\\u2028more";
      return conceptList(currentRoute(), new Map([[0, 0], [1, 0]]), await ofRun(0, "concepts")).text;
    }""")
    comment, *lines = text.splitlines()
    assert comment.startswith("# ")
    assert "two lines and more" in comment
    assert lines == NAMES[:2]


# -------------------------------------------------------------------------------------------------------------- concepts


def known_concepts(page: Page, made: MadeUp) -> dict[str, Any]:
    """What the site knows of the concepts of its first run, once some of it is changed so that filters have to tell."""
    rng = np.random.default_rng(0)
    changes = {name: rng.random(F).astype(np.float32) for name in ("auc_q", "similarity", "monoscore", "stability", "q")}
    for place, values in enumerate(changes.values()):
        values[rng.permutation(F)[: 4 + place]] = np.nan
    changes["auc_q"][::3] /= 20
    changes["monoscore"][::5] = 0.9  # as float32 it is less than 0.9
    shares = np.array([0, 0.0005, 0.0099, 0.01, 0.0101, 0.05, 0.0999, 0.1, 0.1001, 0.5, 1], dtype=np.float32)
    changes["activity"] = np.stack([rng.permutation(np.resize(shares, F)) for _ in range(3)], axis=1)
    page.evaluate(CHANGE, [0, {name: values.ravel().tolist() for name, values in changes.items()}])
    return {**read_chunk(made.folder / "data" / "0" / "concepts.js")[1], **changes}


def active_on(*shares: float) -> Callable[[dict[str, Any]], Any]:
    return lambda of: np.isin(of["activity"][:, 0], np.array(shares, dtype=np.float32))


FILTERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "evidence=yes": lambda of: of["auc_q"] <= 0.05,
    "evidence=no": lambda of: of["auc_q"] > 0.05,
    "evidence=unknown": lambda of: np.isnan(of["auc_q"]),
    "min-similarity=0.5": lambda of: of["similarity"] >= 0.5,
    "min-monoscore=0.9": lambda of: of["monoscore"] >= np.float32(0.9),
    "min-stability=-1": lambda of: ~np.isnan(of["stability"]),
    "min-stability=high": lambda of: np.full(F, True),
    "uses=0": lambda of: of["n_classes"] == 0,
    "uses=1-2": lambda of: np.isin(of["n_classes"], (1, 2)),
    "uses=3-": lambda of: of["n_classes"] >= 3,
    "uses=many": lambda of: np.full(F, True),
    "named=own": lambda of: of["shared"] == 1,
    "named=shared": lambda of: of["shared"] > 1,
    "active=some": lambda of: of["activity"][:, 0] > 0,
    "active=none": lambda of: of["activity"][:, 0] == 0,
    "active=rare": active_on(0.0005, 0.0099, 0.01),
    "active=often": active_on(0.0101, 0.05, 0.0999, 0.1),
    "active=mostly": active_on(0.1001, 0.5, 1),
    "active=none&data=1": lambda of: of["activity"][:, 1] == 0,
    "verdict=abstains": lambda of: np.isin(np.arange(F), ABSTAINING),
    "evidence=no&uses=1-2": lambda of: (of["auc_q"] > 0.05) & np.isin(of["n_classes"], (1, 2)),
    "q=20": lambda of: [index == 20 or "2020" in words_of(index) for index in range(F)],
}


def test_filters_keep_the_concepts_that_they_say(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder)
    of = known_concepts(page, made)
    found = page.evaluate(LISTED, ["concepts", [f"{address}&sort=index" for address in FILTERS]])
    wanted = {f"{address}&sort=index": np.flatnonzero(keeps(of)).tolist() for address, keeps in FILTERS.items()}
    assert found == wanted
    assert min(map(len, wanted.values())) > 0


ASCENDING = {"similarity": False, "q": True, "monoscore": False, "stability": False, "activity": False}


def test_unknown_values_come_last_in_both_directions(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder)
    of = known_concepts(page, made)
    wanted = {}
    for name, rises in ASCENDING.items():
        values = of[name] if of[name].ndim == 1 else of[name][:, 0]
        for order, sign in (("", 1 if rises else -1), ("reversed", -1 if rises else 1)):
            wanted[f"sort={name}&order={order}"] = np.argsort(sign * values, kind="stable").tolist()
    orders = ("sort=name", "sort=name&order=reversed")
    found = page.evaluate(LISTED, ["concepts", [*wanted, *orders]])
    by_name, reversed_ = (found.pop(order) for order in orders)
    assert found == wanted
    assert by_name[-2:] == reversed_[-2:] == list(ABSTAINING)
    held = [NAMES.index(name) for name in ("beak", "claw", "fur", "wheel")]
    assert [index for index in by_name if index in held] == held
    assert [index for index in reversed_ if index in held] == held[::-1]


def test_the_number_of_results_is_announced(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder, "#/concepts")
    for query in ("dog", "dog #", "beak sand"):
        page.get_by_role("searchbox").fill(query)
        n = sum(any(query in text for text in (made.shown[index], *words_of(index))) for index in range(F))
        expect(page.locator("#status")).to_have_text(f"{n} concepts")
        expect(cards(page)).to_have_count(n)


def count(page: Page) -> Locator:
    return page.locator(".count")


def test_many_concepts_are_shown_page_by_page(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder)
    page.evaluate(ENLARGE, [0, 4])
    shown, turn = made.shown * 4, page.get_by_role("navigation", name="Pages")
    go(page, "#/concepts?sort=index&page=2")
    expect(count(page)).to_have_text("160 concepts, 61 to 120 shown")
    assert cards(page).all_text_contents() == shown[60:120]
    expect(turn).to_contain_text("Page 2 of 3")
    links = {link.inner_text(): link.get_attribute("href") for link in turn.get_by_role("link").all()}
    base = "#/concepts?sort=index"
    assert links == {"First": base, "Previous": base, "Next": f"{base}&page=3", "Last": f"{base}&page=3"}
    for address, said, first in (("page=99", "121 to 160", 120), ("page=0", "1 to 60", 0), ("page=x", "1 to 60", 0)):
        go(page, f"{base}&{address}")
        expect(count(page)).to_have_text(f"160 concepts, {said} shown")
        assert cards(page).first.text_content() == shown[first]
    assert sorted(link.inner_text() for link in turn.get_by_role("link").all()) == ["Last", "Next"]
    go(page, f"{base}&view=table&page=2")
    expect(count(page)).to_have_text("160 concepts, 101 to 160 shown")
    expect(page.get_by_role("row")).to_have_count(61)
    go(page, f"{base}&page=2")
    page.get_by_role("searchbox").fill("a")
    holds = [any("a" in text.lower() for text in (made.shown[index], *words_of(index))) for index in range(F)]
    assert 60 < 4 * sum(holds) < 160
    expect(count(page)).to_have_text(f"{4 * sum(holds)} of 160 concepts, 1 to 60 shown")
    settle_address(page)
    assert page.evaluate("location.hash") == f"{base}&q=a"


@pytest.mark.parametrize("concept", [0, CONFOUND])
def test_images_over_the_whole_range_have_strengths_of_their_part(open_page, made_up, concept: int) -> None:
    made = made_up()
    z = made.strengths[0][0][:, concept].astype(np.float64)
    page = open_page(made.folder, f"#/concept/{concept}")
    parts = page.locator("section", has=page.get_by_role("heading", name="Images of pets")).locator(".part")
    expect(parts).to_have_count(6)
    for place, part in enumerate(parts.all()):
        low, high = z.max() * (5 - place) / 6, z.max() * (6 - place) / 6
        said, n = part.locator("p").inner_text().split("\n")
        np.testing.assert_allclose([float(text) for text in said.split("–")], [low, high], rtol=5e-3)
        inside = set(np.flatnonzero((z > low) & (z <= high * (1 + 1e-6))).tolist())
        assert n == f"{len(inside)} image{'s' * (len(inside) != 1)}"
        links = [link.get_attribute("href") or "" for link in part.get_by_role("link").all()]
        images = [int(link.split("/")[-1]) for link in links]
        assert len(images) == min(len(inside), 3)
        assert set(images) <= inside
        np.testing.assert_allclose(numbers(part.locator("li .below").all_inner_texts()), z[images], rtol=5e-3)


# ----------------------------------------------------------------------------------------------------- classes and images

CLASS_ORDERS = {
    "": [0, 1, 2, 3, 4], "name": [4, 3, 2, 1, 0], "size": [2, 0, 3, 4, 1], "worst": [2, 0, 4, 3, 1], "best": [3, 4, 0, 2, 1],
    "logit": [4, 0, 3, 2, 1],
}  # fmt: skip
"""Of the classes below, by hand; the second one has no images."""
MADE_UP_CLASSES = """() => {
  site.classes = ["e", "d", "c", "b", "a"];
  const [size, right, mean_logit] = [[20, 0, 30, 10, 8], [10, 0, 6, 10, 7], [2, NaN, -1, 0.5, 3]];
  chunks.set("0/classes", Promise.resolve({ size, right, mean_logit }));
}"""


def test_classes_are_ordered_and_those_without_images_come_last(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    page.evaluate(MADE_UP_CLASSES)
    found = page.evaluate(LISTED, ["classes", [f"sort={order}" for order in CLASS_ORDERS]])
    assert found == {f"sort={order}": classes for order, classes in CLASS_ORDERS.items()}


def test_the_images_of_a_class_that_are_chosen_are_announced(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder, "#/class/0")
    wrong = (made.labels == 0) & ~made.right({})
    for choice, n in (("wrong", wrong.sum()), ("all", (made.labels == 0).sum())):
        page.get_by_role("combobox", name="Show").select_option(choice)
        expect(page.locator("#status")).to_have_text(f"{n} images")


def test_classes_that_one_is_taken_for_are_told_with_their_share(open_page, made_up) -> None:
    made = made_up()
    predicted = made.logits({}).argmax(axis=1)
    page = open_page(made.folder)
    told = 0
    for number in range(len(CLASSES)):
        go(page, f"#/class/{number}")
        of_class = made.labels == number
        wanted = [
            f"{CLASSES[other]}: {n} image{'s' * (n != 1)}, {100 * n / of_class.sum():.1f} %"
            for other, n in Counter(predicted[of_class & (predicted != number)].tolist()).items()
        ]
        section = page.locator("section", has=page.get_by_role("heading", name="Taken for"))
        texts = section.get_by_role("heading", level=3).all_text_contents()
        assert sorted(text.replace("\u00a0", " ") for text in texts) == sorted(wanted)
        told += len(wanted)
    assert told > 1


@pytest.mark.parametrize("factors", [{}, {CONFOUND: 0.5}], ids=["plain", "edited"])
def test_contributions_to_predicted_minus_true_add_up(open_page, made_up, factors: dict[int, float]) -> None:
    made = made_up()
    image = wrongly_gull(made)
    edit = ",".join(f"{concept}:{factor}" for concept, factor in factors.items())
    page = open_page(made.folder, f"#/image/0/{image}?edit={edit}")
    page.get_by_label("Logit of").select_option("difference")
    more = page.get_by_role("button", name="Show all")
    if more.is_visible():
        more.click()
    logits, truth = made.logits(factors)[image], made.labels[image]
    lines = numbers(page.locator(".contributions .sum").all_inner_texts())
    assert len(lines) == (made.strengths[0][0][image] > 0).sum()
    np.testing.assert_allclose(sum(lines), logits[1] - logits[truth], atol=5e-4 * len(lines))
    total = page.locator(".contributions-sum")
    expect(total).to_contain_text(f"the logit of gull minus that of {CLASSES[truth]}")
    np.testing.assert_allclose(numbers([total.locator("strong").inner_text()]), logits[1] - logits[truth], atol=6e-4)


# ------------------------------------------------------------------------------------------------------ runs and addresses

COMPARE = """async ([runs, choices]) => {
  const compared = await comparison(currentRoute(), runs);
  return choices.map((choice) => chosenPairs(compared, choice).map(({ left, right }) => [left, right]));
}"""


@pytest.mark.parametrize("swapped", [False, True], ids=["in order", "swapped"])
def test_pairs_are_chosen_and_sorted(open_page, made_up, swapped: bool) -> None:
    made = made_up()
    page = open_page(made.folder)
    rates = [np.random.default_rng(run).permutation(F).astype(np.float32) / F + 0.01 for run in range(2)]
    for run, rate in enumerate(rates):
        rate[DEAD] = 0
        page.evaluate(CHANGE, [run, {"rate": rate.tolist()}])
    cosine = np.linspace(0.2, 1, F).astype(np.float32)
    alone = [(-1, other, np.nan) for other in sorted(set(range(F)) - set(made.partner.tolist()) - {DEAD})]
    pairs = [(one, int(made.partner[one]), cosine[one]) for one in range(F) if one != DEAD]
    pairs = [(one, other, near if other >= 0 else np.nan) for one, other, near in pairs] + alone
    if swapped:
        pairs, rates = [(other, one, near) for one, other, near in pairs], rates[::-1]
    wanted, choices = [], []
    for at in (0.0, 0.5, 0.9):
        for show in ("matched", "a", "b"):
            side = int(show == "b")
            kept = [pair for pair in pairs if (pair[2] >= at if show == "matched" else not pair[2] >= at and pair[side] >= 0)]
            sign = -1 if show == "matched" else 1
            by_cosine = sorted(kept, key=lambda pair: -9 if np.isnan(pair[2]) else sign * pair[2])
            by_activity = sorted(kept, key=lambda pair: -rates[side][pair[side]])
            wanted += [[list(pair[:2]) for pair in found] for found in (by_cosine, by_activity)]
            choices += [{"at": at, "show": show, "q": "", "sort": sort} for sort in ("cosine", "activity")]
    assert page.evaluate(COMPARE, [[1, 0] if swapped else [0, 1], choices]) == wanted


def test_swapped_runs_show_the_other_one_first(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder, f"#/runs?a=1&b=0&at=0&edit={CONFOUND}:0")
    pairs = page.locator(".pairs > li")
    expect(page.get_by_role("main")).to_contain_text("live concepts of seed 50")
    found = [[link.get_attribute("href") for link in pair.get_by_role("link").all()] for pair in pairs.all()]
    matched = np.flatnonzero(made.partner >= 0)[::-1].tolist()
    assert found == [[f"#/concept/{made.partner[one]}?run=1", f"#/concept/{one}?edit={CONFOUND}:0"] for one in matched]
    page.get_by_role("button", name="Only in seed 49").click()
    expect(pairs).to_have_count(1)
    expect(pairs.get_by_role("link")).to_have_attribute("href", f"#/concept/{DEAD + 1}?edit={CONFOUND}:0")
    expect(page.locator("#status")).to_have_text(re.compile("^1 concept without a match"))
    settle_address(page)
    assert page.evaluate("location.hash") == f"#/runs?edit={CONFOUND}:0&a=1&b=0&at=0&show=b"


def test_many_pairs_are_shown_page_by_page(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder)
    partner = np.concatenate([np.where(made.partner < 0, -1, made.partner + F * time) for time in range(4)])
    for run in range(2):
        page.evaluate(ENLARGE, [run, 4])
    match = {"partner": partner.tolist(), "cosine": np.linspace(0.2, 1, 4 * F).tolist()}
    page.evaluate("match => { chunks.set('match_0_1', Promise.resolve(match)); }", match)
    go(page, "#/runs?at=0&page=2")
    order = np.flatnonzero(partner >= 0)[::-1]
    pairs, turn = page.locator(".pairs > li"), page.get_by_role("navigation", name="Pages")
    expect(count(page)).to_have_text("152 pairs, page 2 of 4")
    firsts = pairs.evaluate_all("all => all.map((one) => one.querySelector('a').getAttribute('href'))")
    assert firsts == [f"#/concept/{one}" for one in order[50:100]]
    links = [link.get_attribute("href") for link in turn.get_by_role("link").all()]
    assert links == ["#/runs?a=0&b=1&at=0", "#/runs?a=0&b=1&at=0&page=3"]
    page.get_by_role("searchbox").fill("a")
    names = [text.lower() for text in made.shown]
    n = sum("a" in names[one % F] or "a" in names[partner[one] % F] for one in order)
    assert 50 < n < len(order)
    expect(count(page)).to_have_text(f"{n} pairs, page 1 of {-(-n // 50)}")
    expect(turn.get_by_role("link")).to_have_text(["Next →"])
    settle_address(page)
    assert page.evaluate("location.hash") == "#/runs?a=0&b=1&q=a&at=0"


ROUTES = [
    ("", "start", [], {}, 0),
    ("#/", "start", [], {}, 0),
    ("#/concepts?q=a%26b+c&run=1", "concepts", [], {"q": "a&b c", "run": "1"}, 1),
    ("#/image/0/12?edit=3:0,4:0.5", "image", ["0", "12"], {"edit": "3:0,4:0.5"}, 0),
    ("#/class/1?run=2", "class", ["1"], {"run": "2"}, 0),
    ("#/class/1?run=-1", "class", ["1"], {"run": "-1"}, 0),
    ("#/class/1?run=length", "class", ["1"], {"run": "length"}, 0),
]
LINKS = [
    ("{ run: 0 }, 'concept/3'", "#/concept/3"),
    ("{ run: 1 }, 'concept/3', { edit: '3:0,4:0.5' }", "#/concept/3?edit=3:0,4:0.5&run=1"),
    ("{ run: 1 }, 'concepts', { q: '', sort: null, page: undefined, at: 0 }", "#/concepts?at=0&run=1"),
    ("{ run: 0 }, 'concepts', { run: 1, q: 'a&b#c' }", "#/concepts?q=a%26b%23c"),
    ("{ run: 1 }, 'runs', new URLSearchParams('q=&run=0&a=1&b=0')", "#/runs?a=1&b=0&run=1"),
]
WHOLE = [
    ("0", 1), ("12", 13), ("007", 8), ("12", 12), ("-1", 5), ("1.0", 5), ("1e1", 50), (" 3", 5), ("3x", 5), ("", 5), (None, 5),
    ("٣", 5), ("1234567890", 1e12),
]  # fmt: skip


def test_addresses_are_read_and_written(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    read = """hash => {
      history.replaceState(null, "", hash || location.pathname);
      const { view, parts, params, run } = currentRoute();
      return [view, parts, Object.fromEntries(params), run];
    }"""
    assert [[hash_, *page.evaluate(read, hash_)] for hash_, *_ in ROUTES] == [list(route) for route in ROUTES]
    assert [(given, page.evaluate(f"linkTo({given})")) for given, _ in LINKS] == LINKS
    call = "all => all.map(([text, n]) => numberIn(text ?? undefined, n))"
    assert page.evaluate(call, WHOLE) == [0, 12, 7] + [None] * 10
