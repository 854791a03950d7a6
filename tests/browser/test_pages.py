"""The pages in Chromium, as a person uses them: what they show, compute and link to, on made-up sites and a real run's."""

import base64
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from dncbm import ConceptBottleneckModel, load_concept_strengths, read_names
from dncbm.cli import main
from dncbm.concepts.lists import read_concepts, read_factors
from dncbm.concepts.naming import ConceptName, concept_labels
from dncbm.probe.stage import load_probe_data
from tests.bottleneck.conftest import SmallRun
from tests.browser.conftest import settle
from tests.browser.made_up import (
    ABSTAINING,
    CLASSES,
    CONFOUND,
    DEAD,
    FIRST_HOSTILE,
    GROUPS,
    MONOSEMANTIC,
    NAMES,
    F,
    MadeUp,
    N,
    colours,
    words_of,
)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Real:
    """The site of a real run, and what the library says of it."""

    folder: Path
    model: ConceptBottleneckModel
    strengths: scipy.sparse.csr_matrix
    labels: np.ndarray
    names: list[ConceptName]


EDITED = "#/image/0/3?edit=0%3A0.5%2C12%3A0"
VIEWS = {
    "start": ("", "Concepts of made-up things"),
    "cards": ("#/concepts", "Concepts"),
    "sorted cards": ("#/concepts?sort=most", "Concepts"),
    "table": ("#/concepts?view=table", "Concepts"),
    "concept": (f"#/concept/{CONFOUND}", "water"),
    "dead latent": (f"#/concept/{DEAD}", "silence"),
    "hostile concept": (f"#/concept/{FIRST_HOSTILE}", NAMES[FIRST_HOSTILE]),
    "long concept": (f"#/concept/{NAMES.index('long' * 125)}", "long" * 125),
    "classes": ("#/classes", "Classes"),
    "class": ("#/class/0", CLASSES[0]),
    "hostile class": ("#/class/2", CLASSES[2]),
    "image": ("#/image/0/3", "0_003.png"),
    "edited image": (EDITED, "0_003.png"),
    "hostile image without a probe": ("#/image/1/1", '"><img src=x onerror=alert(4)>.png'),
    "image without a picture": ("#/image/2/1", '"><img src=x onerror=alert(4)>.png'),
    "edits": ("#/edits?edit=0%3A0.5%2C12%3A0", "What is edited"),
    "edited class": ("#/class/0?edit=0:0", CLASSES[0]),
    "runs": ("#/runs", "Two runs side by side"),
    "other run": ("#/concepts?run=1", "Concepts"),
    "no such page": ("#/nowhere", "There is no such page"),
}
AXE = {"resultTypes": ["violations"], "preload": False}
TOO_WIDE = """() => [...document.querySelectorAll('main p, main li, main dd, main h1, main h2, main h3')]
  .filter((one) => one.scrollWidth > one.clientWidth + 1 && getComputedStyle(one).display !== 'inline')
  .map((one) => one.outerHTML.slice(0, 200))"""
"""Texts that are wider than their box."""
FOREIGN = "img, iframe, object, embed, form[action], main script, main b, main i, [onerror], [style*='url(\"http']"


def overflow(page: Page, width: int) -> int:
    """By how many pixels a page is wider than a window of this width has room for."""
    page.set_viewport_size({"width": width, "height": 800})
    root = "document.documentElement"
    return int(page.evaluate(f"{root}.scrollWidth - {root}.getBoundingClientRect().width"))


def settle_address(page: Page) -> None:
    """Wait until the address says all that is shown: it follows at most some three times a second."""
    page.wait_for_function("() => location.hash === currentEntry().hash")


def cards(page: Page) -> Locator:
    return page.get_by_role("list", name="Concepts", exact=True).get_by_role("link")


def expect_cards(page: Page, labels: list[str], *, ordered: bool = True) -> None:
    """The cards, once there are as many as expected."""
    expect(cards(page)).to_have_count(len(labels))
    found = cards(page).all_text_contents()
    assert (found if ordered else sorted(found)) == (labels if ordered else sorted(labels))


def logits(page: Page) -> np.ndarray:
    """As the page computes them, without rounding."""
    details = page.locator("details", has_text=re.compile("logits", re.IGNORECASE))
    details.evaluate("one => one.open = true")
    expect(details.locator("tr[data-logit]").first).to_be_visible()
    return np.array([float(row.get_attribute("data-logit") or "nan") for row in details.locator("tr[data-logit]").all()])


# ---------------------------------------------------------------------------------------------------------- every view


@pytest.mark.parametrize("over_http", [False, True], ids=["file", "http"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_opens_and_stays_the_same_after_a_reload(open_page, made_up, view: str, over_http: bool) -> None:
    address, heading = VIEWS[view]
    page = open_page(made_up().folder, address, over_http=over_http)
    expect(page.get_by_role("heading", level=1)).to_have_count(1)
    assert page.locator("h1").text_content() == heading
    assert page.title() == f"{heading} · Concepts of made-up things" or view == "start"
    assert page.locator(FOREIGN).count() == 0
    before = page.locator("main").inner_text()
    page.reload()
    settle(page)
    assert page.locator("main").inner_text() == before


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_is_accessible_and_fits(open_page, made_up, node_modules: Path, view: str, scheme: str) -> None:
    page = open_page(made_up().folder, VIEWS[view][0], color_scheme=scheme)
    page.evaluate("for (const one of document.querySelectorAll('main details')) one.open = true")
    page.evaluate((node_modules / "axe-core" / "axe.min.js").read_text())
    found = page.evaluate("options => axe.run(document, options)", AXE)["violations"]
    assert [(one["id"], [node["html"] for node in one["nodes"]][:3]) for one in found] == []
    for width in (360, 1280, 3840):
        assert (width, overflow(page, width), page.evaluate(TOO_WIDE)) == (width, 0, [])


def test_dark_mode_and_reduced_motion_are_obeyed(open_page, made_up) -> None:
    styles = {}
    for scheme, motion in (("light", "no-preference"), ("dark", "reduce")):
        page = open_page(made_up().folder, VIEWS["image"][0], color_scheme=scheme, reduced_motion=motion)
        read = "one => [getComputedStyle(one).backgroundColor, getComputedStyle(one).transitionDuration]"
        styles[scheme] = [page.locator(where).first.evaluate(read) for where in ("body", ".bar-of")]
    (paper, _), (bar, moves) = styles["light"]
    (dark_paper, _), (dark_bar, stays) = styles["dark"]
    brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (dark_paper, paper)]
    assert brightness[0] < 200 < 600 < brightness[1]
    assert bar != dark_bar
    assert moves != "0s"
    assert set(stays.split(", ")) == {"0s"}


EMPTY = {
    "no probe": ({"n_runs": 1, "n_classes": 0}, {
        "": "This run", "#/classes": "scripts/probe.py", "#/class/0": "scripts/probe.py",
        "#/concept/0": "scripts/probe.py", "#/image/0/3": "Concepts that are active on this image",
    }),
    "no names": ({"n_runs": 1, "has_names": False}, {
        "": "They have no names", "#/concepts": "latent 12", "#/concept/12": "scripts/names.py", EDITED: "latent 12",
    }),
    "no images": ({"n_runs": 1, "has_thumbnails": False}, {
        "": "The folder of the images is missing.", "#/concepts": "The folder of the images is missing.",
        "#/concept/12": "The folder of the images is missing.", "#/image/0/3": "#3", "#/class/0": "#3",
    }),
    "no strengths": ({"n_runs": 1, "n_classes": 0, "has_strengths": False}, {
        "": "This run", "#/concepts": "no concept strengths",
        "#/concept/12": "This run has no strengths of this data set.", "#/image/0/3": "no concept strengths of pets",
    }),
    "one class": ({"n_runs": 1, "n_classes": 1}, {
        "#/classes": "1 class", "#/class/0": "There is no other class.", EDITED: "100.0 %",
    }),
    "one run": ({"n_runs": 1}, {"": "This run", "#/runs": "--beside FLAG=VALUE"}),
    "everything": ({}, {
        f"#/concept/{DEAD}": "This latent is dead", "#/concept/12?run=1": "This run has no strengths of this data set.",
        "#/concept/99": "There is no such concept", "#/class/9": "There is no such class",
        "#/image/0/60": "There is no such image", "#/image/7/0": "There is no such image",
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", EMPTY)
def test_what_is_missing_is_said(open_page, made_up, kind: str) -> None:
    what, views = EMPTY[kind]
    page = open_page(made_up(**what).folder)
    for address, text in views.items():
        page.goto(page.url.split("#")[0] + (address or "#/start"))
        settle(page)
        expect(page.get_by_role("main")).to_contain_text(text)
        assert page.get_by_role("main").get_by_text(re.compile(r"\b(NaN|undefined|null|Infinity)\b")).count() == 0
    shown = page.get_by_role("navigation", name="Views").all_inner_texts()[0].split()
    n_runs, n_classes = what.get("n_runs", 2), what.get("n_classes", 3)
    assert shown == ["Start", "Concepts", *["Classes"] * (n_classes > 0), *["Runs"] * (n_runs > 1)]


# ------------------------------------------------------------------------------------------------------------ concepts


@pytest.mark.parametrize("query", ["dog", "WAT", "<img", "עולם", "#12", "zzz", "long" * 100, "a, comma", "🇩🇪"])
def test_search_finds_names_and_candidates_as_one_types(open_page, made_up, query: str) -> None:
    made = made_up()
    page = open_page(made.folder, "#/concepts?sort=index")
    page.keyboard.press("/")
    search = page.get_by_role("searchbox")
    expect(search).to_be_focused()
    search.press_sequentially(query) if len(query) < 10 else search.fill(query)
    holds = [any(query.lower() in text.lower() for text in (made.shown[index], *words_of(index))) for index in range(F)]
    wanted = [12] if query == "#12" else [index for index in range(F) if holds[index]]
    expect_cards(page, [made.shown[index] for index in wanted])
    expect(page.get_by_text("No concept matches")).to_have_count(int(not wanted))
    settle_address(page)
    page.reload()
    settle(page)
    expect_cards(page, [made.shown[index] for index in wanted])


def test_concepts_are_sorted_and_filtered(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder, "#/concepts")
    for title, first in {"MonoScore": MONOSEMANTIC, "z": MONOSEMANTIC + 1, "Index": 0}.items():
        page.get_by_label("Sort by").select_option(title)
        expect(cards(page).first).to_have_text(made.shown[first])
    page.get_by_role("button", name="Ascending").click()
    expect(cards(page).first).to_have_text(made.shown[-1], use_inner_text=True)
    page.get_by_role("button", name="Descending").click()
    active = made.strengths[0][0] > 0
    page.get_by_label("Sort by").select_option("Activity")
    expect_cards(page, [made.shown[index] for index in np.argsort(-active.mean(axis=0), kind="stable")])
    page.get_by_label("Images of").select_option("drawings")
    activity = (made.strengths[0][1] > 0).mean(axis=0)
    expect(cards(page).first).to_have_text(made.shown[np.argmax(activity)], use_inner_text=True)
    page.get_by_text("Filters").click()
    page.get_by_label("abstains").check()
    expect_cards(page, [made.shown[index] for index in ABSTAINING], ordered=False)
    page.get_by_label("abstains").uncheck()
    page.get_by_role("combobox", name="Activity", exact=True).select_option("on no image")
    expect_cards(page, [made.shown[DEAD]])
    page.get_by_role("button", name="Clear").click()
    expect(cards(page)).to_have_count(F)


def test_the_table_sorts_by_its_headings(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder, "#/concepts")
    page.get_by_role("button", name="Table").click()
    heading = page.get_by_role("columnheader", name="z", exact=True)
    for first, direction in ((MONOSEMANTIC + 1, "descending"), (F - 1, "ascending")):
        heading.get_by_role("button").click()
        expect(page.get_by_role("rowheader").first).to_have_text(made.shown[first])
        expect(heading).to_have_attribute("aria-sort", direction)
    settle_address(page)
    page.reload()
    settle(page)
    expect(page.get_by_role("rowheader").first).to_have_text(made.shown[F - 1])
    expect(page.get_by_role("row")).to_have_count(F + 1)


def test_a_concept_shows_its_images_and_its_votes(open_page, made_up) -> None:
    made = made_up()
    z, weight = made.strengths[0][0][:, CONFOUND], made.weights[0][CONFOUND]
    page = open_page(made.folder, f"#/concept/{CONFOUND}")
    top = np.argsort(-z, kind="stable")[:12]
    shown = page.get_by_role("list", name="Strongest images of pets")
    texts = [float(text) for text in shown.get_by_role("listitem").all_inner_texts()]
    np.testing.assert_allclose(texts, z[top], rtol=5e-3)
    links = [one.get_attribute("href") for one in shown.get_by_role("link").all()]
    assert links == [f"#/image/0/{image}" for image in top]
    for place in range(4):
        drawn = Image.open(io.BytesIO(shown.get_by_role("img").nth(place).screenshot())).convert("RGB")
        colour = np.array(drawn.getpixel((drawn.width // 2, drawn.height // 2)), dtype=int)
        assert np.abs(colour - colours(0)[top[place]]).max() < 30, place
    votes = page.get_by_role("table", name="Votes for").get_by_role("row")
    expect(votes).to_have_text([re.compile(f"{CLASSES[c]}.*{weight[c]:.3f}") for c in np.argsort(-weight) if weight[c] > 0])
    expect(page.get_by_role("main")).to_contain_text(f"Active on {100 * (z > 0).mean():.1f} % of the 60 images")
    shown.get_by_role("link").first.click()
    settle(page)
    expect(page.get_by_role("heading", level=1)).to_have_text(f"0_{top[0]:03d}.png")
    expect(page.get_by_role("region", name="Prediction")).to_contain_text(CLASSES[made.labels[top[0]]])


def test_a_class_shows_its_concepts_and_confusions(open_page, made_up) -> None:
    made = made_up()
    z, weight = made.strengths[0][0], made.weights[0]
    of_class = made.labels == 0
    mean = z[of_class].mean(axis=0) * weight[:, 0]
    predicted = made.logits({}).argmax(axis=1)
    page = open_page(made.folder, "#/classes")
    expect(page.get_by_role("row").nth(1)).to_contain_text(f"{100 * made.right({})[of_class].mean():.1f} %")
    page.get_by_role("link", name="cat").click()
    settle(page)
    rows = page.get_by_role("table", name=re.compile("for it")).get_by_role("row")
    values = [float(row.get_by_role("cell").first.inner_text()) for row in rows.all()]
    np.testing.assert_allclose(values, np.sort(mean[mean > 0])[::-1][:20], atol=6e-4)
    expect(rows.first.get_by_role("rowheader")).to_have_text(made.shown[mean.argmax()])
    taken = (of_class & (predicted == 1)).sum()
    expect(page.get_by_role("heading", name=f"gull: {taken} image")).to_be_visible()
    behind = page.get_by_role("table", name="Concepts behind it").first.get_by_role("rowheader")
    expect(behind.first).to_have_text("water")


def test_two_runs_are_compared(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder, "#/runs")
    matched = (made.partner >= 0) & (np.linspace(0.2, 1, F).astype(np.float32) >= 0.9)
    expect(page.get_by_role("main")).to_contain_text(re.compile(rf"{matched.sum()} of (the )?{F - 1} live concepts"))
    pairs = page.locator(".pairs > li")
    expect(pairs).to_have_count(int(matched.sum()))
    expect(pairs.first.get_by_role("link").first).to_have_text(made.shown[F - 1])
    expect(pairs.first.get_by_role("link").last).to_have_text(made.shown[made.partner[F - 1]], use_inner_text=True)
    page.get_by_role("slider").fill("0")
    expect(pairs).to_have_count(F - 2)
    page.get_by_role("button", name="Only in seed 49").click()
    expect(pairs).to_have_count(1)
    expect(pairs).to_contain_text([made.shown[DEAD + 1]])
    pairs.get_by_role("link").click()
    settle(page)
    expect(page.get_by_role("heading", level=1)).to_have_text(made.shown[DEAD + 1])


@pytest.mark.parametrize("chosen", ["all", "right", "wrong", "taken-1", "group-1"])
def test_a_class_shows_all_of_its_images_or_some_by_what_is_predicted(open_page, made_up, chosen: str) -> None:
    made = made_up()
    predicted, choice = made.logits({}).argmax(axis=1), chosen.split("-")[0]
    kept = {
        "all": made.labels == 0, "right": predicted == 0, "wrong": predicted != 0, "taken": predicted == 1,
        "group": made.groups == 1,
    }[choice] & (made.labels == 0)  # fmt: skip
    wanted = np.flatnonzero(kept).tolist()
    page = open_page(made.folder, "#/class/0")
    page.get_by_role("combobox", name="Show").select_option(chosen)
    assert page.locator(".class-view option[value^=group-]").count() == len(set(made.groups[made.labels == 0]))
    images = page.get_by_role("list", name="Images of the class").get_by_role("link")
    expect(images).to_have_count(len(wanted))
    for _ in range(2):
        assert [int(re.findall(r"\d+", link.get_attribute("href") or "")[1]) for link in images.all()] == wanted
        page.reload()
        settle(page)
    assert page.url.endswith(f"#/class/0?images={chosen}")


def test_images_of_a_large_class_are_shown_bit_by_bit(open_page, made_up) -> None:
    page = open_page(made_up(n_classes=1).folder, "#/class/0?images=all")
    images = page.get_by_role("list", name="Images of the class").get_by_role("link")
    expect(images).to_have_count(48)
    page.get_by_role("button", name=f"Show the other {N - 48}").click()
    expect(images).to_have_count(N)
    expect(images.nth(48)).to_be_focused()
    expect(page.get_by_role("button", name="Show")).to_have_count(0)


# --------------------------------------------------------------------------------------------- addresses and the keyboard


def test_next_and_previous_follow_the_list(open_page, made_up) -> None:
    page = open_page(made_up().folder, "#/concepts?sort=index&order=reversed&verdict=collision,abstains")
    heading = page.get_by_role("heading", level=1)
    listed = cards(page).all_text_contents()
    assert len(listed) == 4
    cards(page).first.click()
    for place, label in enumerate(listed):
        expect(heading).to_have_text(label)
        expect(page.get_by_role("link", name=f"Concepts ({place + 1} of 4)")).to_be_visible()
        page.keyboard.press("ArrowRight")
    expect(heading).to_have_text(listed[-1])  # the list ends
    page.keyboard.press("ArrowLeft")
    expect(heading).to_have_text(listed[-2])
    page.keyboard.press("Escape")  # to the list, where it was
    settle(page)
    assert cards(page).all_text_contents() == listed
    expect(cards(page).nth(2)).to_be_focused()
    page.evaluate(f"location.hash = '#/concept/{CONFOUND}'")  # not in the list: by number
    expect(heading).to_have_text(NAMES[CONFOUND])
    page.get_by_role("link", name="Next").click()
    expect(heading).to_have_text(NAMES[CONFOUND + 1])
    page.keyboard.press("Escape")
    expect(cards(page)).to_have_count(F)


def test_next_and_previous_of_a_class_follow_its_list(open_page, made_up) -> None:
    page = open_page(made_up().folder, "#/classes?sort=name")
    listed = page.locator("tbody a").all_text_contents()
    assert listed == sorted(CLASSES, key=str.lower)
    page.locator("tbody a").first.click()
    for place, name in enumerate(listed):
        expect(page.get_by_role("heading", level=1)).to_have_text(name)
        expect(page.get_by_role("link", name=f"Classes ({place + 1} of 3)")).to_be_visible()
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    settle(page)
    assert "sort=name" in page.url
    expect(page.locator("tbody a").last).to_be_focused()


def test_next_and_previous_of_an_image_follow_those_of_its_class(open_page, made_up) -> None:
    made = made_up()
    wrong = np.flatnonzero((made.labels == 0) & ~made.right({})).tolist()
    page = open_page(made.folder, "#/class/0?images=wrong")
    page.get_by_role("list", name="Images of the class").get_by_role("link").first.click()
    for place, image in enumerate(wrong):
        page.wait_for_url(f"**/index.html#/image/0/{image}")
        expect(page.get_by_role("link", name=f"Class {CLASSES[0]} ({place + 1} of {len(wrong)})")).to_be_visible()
        if place + 1 < len(wrong):
            page.get_by_role("link", name="Next image").click()
            settle(page)
    expect(page.get_by_role("link", name="Next image")).to_have_count(0)
    page.keyboard.press("Escape")
    settle(page)
    expect(page.get_by_role("combobox", name="Show")).to_have_value("wrong")
    expect(page.get_by_role("list", name="Images of the class").get_by_role("link").last).to_be_focused()
    page.goto(f"{made.folder.as_uri()}/index.html#/image/0/{wrong[0]}?run=1")  # another run, which lists none
    settle(page)
    expect(page.get_by_role("link", name=f"↑ Class {CLASSES[0]}", exact=True)).to_be_visible()


@pytest.mark.parametrize(("view", "late", "typed"), [("concepts", "concept_", "searchbox"), ("runs", "classes", "slider")])
def test_typing_while_the_next_view_loads_leaves_its_address(open_page, made_up, view: str, late: str, typed: str) -> None:
    page = open_page(made_up().folder, f"#/{view}")
    page.evaluate(HOLD, late)
    hash_ = "#/concept/3" if view == "concepts" else "#/classes"
    page.evaluate(f"location.hash = '{hash_}'")
    page.get_by_role(typed).first.fill("0.5")
    page.evaluate("release()")
    settle(page)
    assert page.url.endswith(hash_)


def test_a_link_that_may_not_be_copied_is_selected(open_page, made_up) -> None:
    page = open_page(made_up().folder, EDITED)
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('forbidden in a frame')); }")
    page.get_by_role("button", name="Copy the link").click()
    field = page.get_by_label("Link to what is shown")
    expect(field).to_have_value(page.url)
    expect(field).to_be_focused()
    page.get_by_role("button", name="Keyboard shortcuts").click()
    page.get_by_role("dialog").get_by_role("button", name="Copy the link").click()
    expect(page.get_by_role("dialog").get_by_label("Link to what is shown")).to_have_value(page.url)


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (f"#/concept/{DEAD}", "This latent is dead: no training image activates it."),
        (f"#/concept/{NAMES.index('sail')}", "Tested word"),
        ("#/image/0/3?edit={silent}:0", "None of the edited concepts is active on this image."),
        ("#/concepts?sort=monoscore", "MonoScore 0."),
        ("#/concepts?verdict=bogus", f"{F} concepts"),
        ("#/runs?at=", "at a cosine of at least 0.90"),
    ],
)
def test_pages_say_what_holds(open_page, made_up, view: str, said: str) -> None:
    made = made_up()
    silent = int((made.strengths[0][0][3] == 0).argmax())
    page = open_page(made.folder, view.format(silent=silent))
    expect(page.get_by_role("main")).to_contain_text(said)


def test_a_print_keeps_what_was_chosen_and_leaves_out_what_cannot_be_pressed(open_page, made_up) -> None:
    page = open_page(made_up().folder, "#/class/0?images=wrong")
    page.emulate_media(media="print")
    expect(page.get_by_role("combobox", name="Show")).to_be_visible()
    expect(page.locator(".pager")).to_be_hidden()
    page.goto(page.url.partition("#")[0] + EDITED)
    settle(page)
    expect(page.get_by_role("slider")).to_have_count(0)
    expect(page.locator(".buttons button:visible")).to_have_count(0)


def test_back_and_forward_pass_through_the_views(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    steps: list[tuple[str, Callable[[], Locator]]] = [
        ("Concepts", lambda: page.get_by_role("navigation", name="Views").get_by_role("link", name="Concepts")),
        ("water", lambda: cards(page).get_by_text("water", exact=True)),
        ("snow", lambda: page.get_by_role("link", name="Next")),
        ("Classes", lambda: page.get_by_role("navigation", name="Views").get_by_role("link", name="Classes")),
        ("gull", lambda: page.get_by_role("main").get_by_role("link", name="gull")),
    ]
    heading, visited = page.get_by_role("heading", level=1), ["Concepts of made-up things"]
    for title, link in steps:
        link().click()
        expect(heading).to_have_text(title)
        visited.append(title)
    for title in reversed(visited[:-1]):
        page.go_back()
        expect(heading).to_have_text(title)
    for title in visited[1:]:
        page.go_forward()
        expect(heading).to_have_text(title)


def test_the_search_is_there_again_after_going_back(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder, "#/concepts")
    page.get_by_role("searchbox").fill("dog #")
    expect_cards(page, [made.shown[3], made.shown[4]])
    cards(page).last.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(made.shown[4])
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("dog #")
    expect_cards(page, [made.shown[3], made.shown[4]])


def test_a_page_is_scrolled_as_it_was_after_going_back(open_page, made_up) -> None:
    page = open_page(made_up().folder, "#/concepts?view=table")
    page.evaluate("scrollTo(0, 500)")
    page.wait_for_function("() => history.state?.y === 500")
    page.get_by_role("link", name="beak", exact=True).click()
    settle(page)
    assert page.evaluate("scrollY") == 0
    page.go_back()
    page.wait_for_function("() => scrollY === 500")


def test_everything_can_be_reached_with_the_keyboard(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder, f"#/concept/{CONFOUND}")
    heading, keys = page.get_by_role("heading", level=1), page.keyboard
    keys.press("ArrowRight")
    expect(heading).to_have_text("snow")
    keys.press("ArrowLeft")
    expect(heading).to_have_text("water")
    keys.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    keys.press("Escape")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_hidden()
    keys.press("Escape")
    expect(heading).to_have_text("Concepts")
    keys.press("/")
    search = page.get_by_role("searchbox")
    expect(search).to_be_focused()
    keys.type("dog #")
    expect_cards(page, [made.shown[3], made.shown[4]])
    keys.press("Escape")
    expect(search).not_to_be_focused()
    keys.press("/")
    keys.press("Enter")
    expect(cards(page).first).to_be_focused()
    keys.press("ArrowRight")
    expect(cards(page).last).to_be_focused()
    keys.press("Enter")
    expect(heading).to_have_text(made.shown[4])
    expect(heading).to_be_focused()
    keys.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()


def test_the_first_tab_leads_past_the_bar(open_page, made_up) -> None:
    page = open_page(made_up().folder, "#/concepts")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    assert page.url.endswith("#/concepts")
    page.keyboard.press("Tab")
    outline = page.evaluate(
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    assert outline == "solid3px"


LAST_NEIGHBOUR = ".neighbours li:last-child a"


@pytest.mark.parametrize(
    ("view", "focused", "key", "leaves"),
    [
        ("#/concept/3", "h1", "ArrowRight", True),
        ("#/concept/3", "h1", "Shift+ArrowRight", False),
        ("#/concept/3", LAST_NEIGHBOUR, "ArrowRight", False),
        ("#/image/0/3", ".all-classes summary", "ArrowRight", False),
        ("#/image/0/3", ".all-classes .scroll", "ArrowRight", False),
    ],
)
def test_arrows_leave_a_page_only_where_they_do_nothing_else(
    open_page, made_up, view: str, focused: str, key: str, leaves: bool
) -> None:
    page = open_page(made_up().folder, view)
    page.evaluate("for (const one of document.querySelectorAll('main details')) one.open = true")
    page.locator(focused).last.focus()
    page.keyboard.press(key)
    assert page.evaluate("location.hash") == ("#/concept/4" if leaves else view)
    if leaves:
        settle(page)
        page.evaluate("getSelection().selectAllChildren(document.querySelector('h1'))")
        page.keyboard.press("ArrowLeft")
        assert page.evaluate("location.hash") == "#/concept/4"


REFUSE = """() => {
    const replaceState = history.replaceState.bind(history);
    window.calls = 0;
    history.replaceState = (...all) => {
        window.calls += 1;
        if (window.refuses) throw new DOMException("more than 100 times in 30 seconds", "SecurityError");
        replaceState(...all);
    };
}"""


def test_the_address_follows_where_the_browser_refuses_many_changes(open_page, made_up) -> None:
    page = open_page(made_up().folder, f"#/runs?edit={CONFOUND}:0")
    page.evaluate(REFUSE)
    slider, output = page.get_by_role("slider"), page.locator("output")
    slider.focus()
    for _ in range(40):
        page.keyboard.press("ArrowLeft")
    expect(output).to_have_text("0.50")
    settle_address(page)
    assert page.evaluate("location.hash") == "#/runs?edit=12:0&a=0&b=1&at=0.5"
    assert page.evaluate("calls") < 20
    page.evaluate("window.refuses = true")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => currentEntry().hash.endsWith('at=0.51')")
    expect(output).to_have_text("0.51")
    own = page.locator(".pairs > li").first.get_by_role("link").first
    assert (own.get_attribute("href") or "").endswith("?edit=12:0")
    page.evaluate("window.refuses = false")
    settle_address(page)
    assert page.evaluate("location.hash").endswith("at=0.51")
    page.get_by_role("navigation", name="Views").get_by_role("link", name="Start").click()
    settle(page)
    assert page.evaluate("location.hash") == "#/start?edit=12:0"


BREAK_DATA = """part => {
  window.whole = scriptText;
  scriptText = async (name) => (name.includes(part) ? 'AAAA' : whole(name));
}"""
"""Makes the chunks whose names contain a text unreadable."""


def test_what_cannot_be_read_is_named_and_read_again(open_page, made_up) -> None:
    page = open_page(made_up().folder, logs="Cannot read data/0/concept_0.js")
    page.evaluate(BREAK_DATA, "concept_")
    page.evaluate("location.hash = '#/concept/3'")
    expect(page.get_by_role("main")).to_contain_text("Cannot read data/0/concept_0.js")
    expect(page.get_by_role("main").get_by_role("link", name="Start")).to_be_visible()
    page.evaluate("() => { scriptText = window.whole; }")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(NAMES[3] + " #3")


def test_a_data_set_that_cannot_be_read_leaves_the_list_as_it_was(open_page, made_up) -> None:
    page = open_page(made_up().folder, "#/concepts")
    page.evaluate(BREAK_DATA, "tops_1")
    page.get_by_label("Images of").select_option("drawings")
    expect(page.get_by_text("Cannot read data/0/tops_1.js")).to_be_visible()
    expect(page.get_by_label("Images of")).to_have_value("0")
    expect(cards(page)).to_have_count(F)
    assert page.evaluate("location.hash") == "#/concepts"


def test_base64_is_read_without_the_new_method_too(open_page, made_up) -> None:
    page = open_page(made_up().folder)
    read = "text => { Uint8Array.fromBase64 = undefined; return [...bytesOf(text)]; }"
    assert page.evaluate(read, base64.b64encode(bytes(range(256))).decode()) == list(range(256))


# ------------------------------------------------------------------------------------------------------ interventions


def edits_in(page: Page) -> dict[int, float]:
    """What the address says is edited."""
    found = re.search(r"edit=([^&]*)", page.url.replace("%3A", ":").replace("%2C", ","))
    return {int(concept): float(factor) for concept, factor in re.findall(r"(\d+):([\d.]+)", found[1] if found else "")}


def wrongly_gull(made: MadeUp) -> int:
    """An image that is taken for a gull because of the water."""
    wrong = ~made.right({}) & made.right({CONFOUND: 0}) & (made.logits({}).argmax(axis=1) == 1)
    return int(wrong.argmax())


def test_an_image_follows_its_edits(open_page, made_up) -> None:
    made = made_up()
    image = wrongly_gull(made)
    page = open_page(made.folder, f"#/image/0/{image}")
    said = page.get_by_role("region", name="Prediction").locator(".predicted")
    expect(said).to_contain_text("gull")
    np.testing.assert_allclose(logits(page), made.logits({})[image], atol=1e-5)
    page.get_by_role("button", name="Remove water", exact=True).click()
    page.wait_for_url(re.compile("edit="))
    factors = {CONFOUND: 0.0}
    assert edits_in(page) == factors
    expect(said).to_contain_text(f"With edits: {CLASSES[made.labels[image]]}")
    np.testing.assert_allclose(logits(page), made.logits(factors)[image], atol=1e-5)
    slider = page.get_by_role("slider", name=f"Factor of {made.shown[made.labels[image]]}")
    slider.focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    factors[int(made.labels[image])] = 1.15
    page.wait_for_function("() => location.hash.includes('1.15')")
    assert edits_in(page) == factors
    np.testing.assert_allclose(logits(page), made.logits(factors)[image], atol=1e-5)
    odds = np.exp(made.logits(factors)[image])
    expect(said).to_contain_text(f"{100 * odds.max() / odds.sum():.1f} %")
    page.get_by_role("link", name="Next image").click()
    settle(page)
    assert edits_in(page) == factors
    np.testing.assert_allclose(logits(page), made.logits(factors)[image + 1], atol=1e-5)
    page.reload()
    settle(page)
    np.testing.assert_allclose(logits(page), made.logits(factors)[image + 1], atol=1e-5)
    page.get_by_role("button", name="Restore all").click()
    expect(page.get_by_text("No concept is edited.")).to_be_visible()
    assert edits_in(page) == {}
    np.testing.assert_allclose(logits(page), made.logits({})[image + 1], atol=1e-5)


def accuracy_table(page: Page) -> dict[str, list[str]]:
    """Part -> images, accuracy before and after."""
    table = page.get_by_role("table", name=re.compile("^Accuracy on"))
    expect(table).to_be_visible()
    cells = [row.locator("th, td").all() for row in table.get_by_role("row").all()]
    lines = [[cell.inner_text().strip().replace("\u00a0", " ") for cell in row] for row in cells]
    return {name: values[:3] for name, *values in lines[1:]}


@pytest.mark.parametrize("run", [0, 1])
def test_removing_a_concept_can_measure_the_accuracy_again(open_page, made_up, run: int) -> None:
    made = made_up()
    with_water = int((made.strengths[run][0][:, CONFOUND] > 0).argmax())
    page = open_page(made.folder, f"#/image/0/{with_water}" + f"?run={run}" * run)
    page.get_by_role("button", name="Remove and measure accuracy: water").click()
    before, after = made.right({}, run), made.right({CONFOUND: 0}, run)
    parts = {"Overall": np.ones(N, dtype=bool)} | {group: made.groups == number for number, group in enumerate(GROUPS)}
    wanted = {
        name: [str(part.sum()), f"{100 * before[part].mean():.1f} %", f"{100 * after[part].mean():.1f} %"]
        for name, part in parts.items()
    }
    assert accuracy_table(page) == wanted
    changed = (made.logits({}, run).argmax(axis=1) != made.logits({CONFOUND: 0}, run).argmax(axis=1)).sum()
    expect(page.get_by_text(f"{changed} predictions differ")).to_be_visible()
    assert before.mean() < after.mean()


HOLD = """pattern => {
  const [append, held] = [Element.prototype.append, []];
  Element.prototype.append = function (...all) {
    if (all[0]?.src?.includes(pattern)) held.push(() => append.apply(this, all));
    else append.apply(this, all);
  };
  window.release = () => { Element.prototype.append = append; held.forEach((one) => one()); };
}"""
"""Holds the chunks whose paths contain a text back until `release()`."""


def test_edits_restored_while_the_weights_load_do_not_come_back(open_page, made_up) -> None:
    made = made_up()
    page = open_page(made.folder)
    page.evaluate(HOLD, "weights_")
    page.evaluate(f"location.hash = '{EDITED}'")
    page.get_by_role("button", name="Restore all").click()
    page.evaluate("release()")
    np.testing.assert_allclose(logits(page), made.logits({})[3], atol=1e-5)
    expect(page.locator(".contributions .edited")).to_have_count(0)
    assert edits_in(page) == {}


def test_the_next_view_takes_the_last_edit_and_none_made_while_it_loads(open_page, made_up) -> None:
    page = open_page(made_up().folder, "#/image/0/3")
    row = page.locator(".contributions li").first
    concept = int(row.get_attribute("data-concept") or "")
    move = "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }"
    for factor in ("0.9", "0.6", "0.2"):
        row.get_by_role("slider").evaluate(move, factor)
    page.evaluate("document.querySelector('a[rel=next]').click()")
    settle(page)
    assert page.url.split("#")[1].startswith("/image/0/4")
    assert edits_in(page) == {concept: 0.2}
    page.evaluate(HOLD, "data/1/")
    page.get_by_label("Run").select_option("1")
    page.wait_for_function("location.hash.includes('run=1')")
    page.get_by_role("slider").first.evaluate(move, "0.2")
    page.get_by_role("button", name=re.compile("^Remove and measure")).first.click()
    page.evaluate("release()")
    settle(page)
    expect(page.get_by_text("No concept is edited.")).to_be_visible()
    assert edits_in(page) == {}


def test_what_edits_do_is_announced_on_their_own_page_only(open_page, made_up) -> None:
    made = made_up()
    image = wrongly_gull(made)
    page = open_page(made.folder, f"#/image/0/{image}")
    status = page.locator("#status")
    page.get_by_role("button", name="Remove water", exact=True).click()
    expect(status).to_have_text(f"Predicted now: {CLASSES[made.labels[image]]}.")
    page.get_by_role("button", name="Restore water").click()
    expect(status).to_have_text("Predicted now: gull.")
    for leaves in (False, True):
        page.evaluate(HOLD, "strengths_0_1")
        page.get_by_role("button", name="Remove and measure accuracy: water").click()
        page.get_by_role("button", name="Cancel").focus()
        if leaves:
            page.evaluate("location.hash = '#/classes'")
            settle(page)
        page.evaluate("release()")
        if not leaves:
            expect(page.get_by_role("region", name="Accuracy with these edits")).to_be_focused()
            expect(status).to_have_text(re.compile("^Accuracy: "))
            page.evaluate("chunks.delete('0/strengths_0_1')")
    page.wait_for_timeout(300)
    assert not (status.text_content() or "").startswith("Accuracy")


EXPORTED = [{CONFOUND: 0.0, 3: 0.0, 10: 0.0}, dict.fromkeys(range(F), 0.0), {i: 0.5 for i in range(F)} | {3: 2.0, DEAD: 0.0}]


@pytest.mark.parametrize("factors", EXPORTED, ids=["some removed", "all removed", "all scaled"])
def test_the_exported_list_is_what_the_stage_reads(open_page, made_up, tmp_path: Path, factors: dict[int, float]) -> None:
    made = made_up()
    edit = ",".join(f"{concept}:{factor:g}" for concept, factor in factors.items())
    page = open_page(made.folder, f"#/image/0/0?edit={edit}")
    assert exported(page, made.names, tmp_path) == factors


def exported(page: Page, names: Any, folder: Path) -> dict[int, float]:
    """The factors of the list that the page offers for download, as 13_intervene.py reads them."""
    page.get_by_text("Export as a list").click()
    with page.expect_download() as download:
        page.get_by_role("button", name=re.compile("^Download ")).click()
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    if path.name == "removed_concepts.txt":
        return dict.fromkeys(read_concepts(path, names), 0.0)
    return read_factors(path, names)


# ------------------------------------------------------------------------------------------------------- a real run's site


@pytest.fixture(scope="module")
def real(small_run: SmallRun, sites: Path) -> Real:
    """The site that the stage writes of a small run, and the model of that run."""
    folder = sites / "small run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DNCBM_CONFIG", str(small_run.settings.path))
        main("browse", ["--browser_folder", str(folder)])
    model = ConceptBottleneckModel.from_run(small_run.settings, device="cpu", load_encoder=False)
    sae, probe = small_run.sae, small_run.probe
    strengths = load_concept_strengths(small_run.settings, sae, probe.dataset, "val").matrix
    labels = load_probe_data(small_run.settings, sae, probe, "val").labels.numpy()
    return Real(folder, model, strengths, labels, read_names(small_run.settings, sae))


def test_a_real_site_opens(open_page, real: Real) -> None:
    page = open_page(real.folder)
    for name in ("Concepts", "Classes", "Start"):
        page.get_by_role("navigation", name="Views").get_by_role("link", name=name).click()
        settle(page)
    page.get_by_role("navigation", name="Views").get_by_role("link", name="Concepts").click()
    expect_cards(page, concept_labels(real.names), ordered=False)
    page.goto(page.url.split("#")[0] + "#/classes")
    settle(page)
    right = real.model.decision_function(real.strengths).argmax(axis=1) == real.labels
    for number, name in enumerate(real.model.classes_):
        row = page.get_by_role("row").filter(has=page.get_by_role("link", name=name, exact=True))
        expect(row).to_contain_text(f"{100 * right[real.labels == number].mean():.1f} %")


@pytest.mark.parametrize("edited", [{}, {0: 0.0}, {0: 0.0, 1: 0.25, 5: 2.0}], ids=str)
def test_a_real_site_computes_what_the_library_computes(
    open_page, real: Real, tmp_path: Path, edited: dict[int, float]
) -> None:
    """The factors are those of the concepts that are strongest on average, the first of them 0."""
    order = np.argsort(-np.asarray(real.strengths.mean(axis=0)).ravel(), kind="stable")
    factors = {int(order[place]): factor for place, factor in edited.items()}
    model = real.model.intervene(scale=factors)
    wanted, plain = model.decision_function(real.strengths), real.model.decision_function(real.strengths)
    classes = [str(name) for name in real.model.classes_]
    edit = ",".join(f"{concept}:{factor:g}" for concept, factor in factors.items())
    page = open_page(real.folder)
    for image in range(0, len(wanted), 5):
        page.goto(f"{real.folder.as_uri()}/index.html#/image/0/{image}?edit={edit}")
        settle(page)
        np.testing.assert_allclose(logits(page), wanted[image], atol=1e-5)
        said = page.get_by_role("region", name="Prediction").locator(".predicted")
        expect(said).to_contain_text(classes[plain[image].argmax()])
        if factors:
            expect(said).to_contain_text(f"With edits: {classes[wanted[image].argmax()]}")
    if not factors:
        return
    page.get_by_role("button", name="Accuracy of the split").click()
    scores = [f"{100 * one.score(real.strengths, real.labels):.1f} %" for one in (real.model, model)]
    assert accuracy_table(page)["Overall"] == [str(len(wanted)), *scores]
    differ = (wanted.argmax(axis=1) != plain.argmax(axis=1)).sum()
    expect(page.get_by_text(re.compile(rf"^{differ} predictions? differs?\."))).to_be_visible()
    assert exported(page, real.names, tmp_path) == {concept: factors[concept] for concept in sorted(factors)}
