"use strict";
// Two runs side by side: which concepts they share, and which only one of them has.

/** A concept of each run that were matched, -1 where a concept has no partner. @typedef {{ left: number, right: number,
 *   cosine: number }} Pair */
/** @typedef {{ route: Route, runs: [number, number], concepts: Concepts[], tops: (Tops | null)[], datasets: (number | null)[],
 *   pairs: Pair[], n_dead: number }} Comparison */
/** What the list shows. @typedef {{ at: number, show: string, q: string, sort: string, page: number }} PairChoice */

const PAIRS_PER_PAGE = 50;

/** @type {View} */
async function showRuns(route) {
  const heading = h("h1", {}, "Two runs side by side");
  const command = site.command.includes("--beside") ? site.command : `${site.command} --beside FLAG=VALUE`;
  if (site.runs.length < 2) return h("div", {}, heading, note("A second run is missing here.", command));
  const a = numberIn(route.params.get("a") ?? undefined, site.runs.length) ?? 0;
  const asked = numberIn(route.params.get("b") ?? undefined, site.runs.length);
  const b = asked === null || (asked === a && site.runs.length === 2) ? Number(a === 0) : asked;
  const chosen = site.runs.length > 2 ? runSelects(route, a, b) : null;
  if (a === b) return h("div", {}, heading, chosen, note("Choose two different runs."));
  if (!site.matches.some(([one, other]) => one === Math.min(a, b) && other === Math.max(a, b))) {
    return h("div", {}, heading, chosen, note("The comparison of these two runs is missing.", command));
  }
  return h("div", {}, heading, chosen, pairList(await comparison(route, [a, b])));
}

/** @param {Route} route @param {number} a @param {number} b */
function runSelects(route, a, b) {
  const params = new URLSearchParams(route.params);
  params.delete("page");
  const select = (/** @type {string} */ key, /** @type {number} */ now) => {
    const found = h(
      "select", { onchange: () => (params.set(key, found.value), go(linkTo(route, "runs", params))) },
      site.runs.map((run, number) => h("option", { value: number, selected: number === now }, run.label)),
    );
    return found;
  };
  const labels = [h("label", {}, "First run", select("a", a)), h("label", {}, "Second run", select("b", b))];
  return h("div", { class: "controls" }, labels);
}

/** @param {Route} route @param {[number, number]} runs @returns {Promise<Comparison>} */
async function comparison(route, runs) {
  const [low, high] = [Math.min(...runs), Math.max(...runs)];
  const datasets = runs.map((run) => cardDataset(site.runs[run]));
  /** @type {[Match, Concepts[], (Tops | null)[]]} */
  const [match, concepts, tops] = await Promise.all([
    chunk(`match_${low}_${high}`),
    Promise.all(runs.map((run) => ofRun(run, "concepts"))),
    Promise.all(runs.map((run, side) => datasets[side] === null ? null : ofRun(run, `tops_${datasets[side]}`))),
  ]);
  const all = allPairs(match, site.runs[high].n_latents, low !== runs[0]);
  const pairs = all.filter(({ left, right }) =>
    left < 0 ? !isDead(concepts[1], right) : right >= 0 || !isDead(concepts[0], left));
  return { route, runs, concepts, tops, datasets, pairs, n_dead: all.length - pairs.length };
}

/** Every concept of both runs once, with its partner. A match is stored from the run of lower number to the other one.
 * @param {Match} match @param {number} nOther latents of the other one @param {boolean} swapped @returns {Pair[]} */
function allPairs({ partner, cosine }, nOther, swapped) {
  const taken = new Uint8Array(nOther);
  /** @type {Pair[]} */
  const pairs = [];
  const add = (/** @type {number} */ one, /** @type {number} */ other, /** @type {number} */ near) =>
    pairs.push(swapped ? { left: other, right: one, cosine: near } : { left: one, right: other, cosine: near });
  partner.forEach((other, one) => {
    add(one, other, other < 0 ? NaN : cosine[one]);
    if (other >= 0) taken[other] = 1;
  });
  taken.forEach((is, other) => is || add(-1, other, NaN));
  return pairs;
}

/** The pairs, and what to choose among them. @param {Comparison} compared */
function pairList(compared) {
  const { route, runs } = compared;
  const [a, b] = runs.map((run) => site.runs[run].label);
  const choice = pairChoice(route.params);
  const [summary, list, output] = [h("p"), h("div"), h("output", {}, fixed(choice.at))];
  const update = (/** @type {Partial<PairChoice>} */ changes) => {
    Object.assign(choice, changes);
    refill(output, fixed(choice.at));
    const matched = compared.pairs.filter(({ cosine }) => cosine >= choice.at);
    refill(summary, summaryOf(compared, matched, choice.at));
    refill(list, ...pagesOf(compared, choice));
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.value === choice.show));
  };
  const change = (/** @type {Partial<PairChoice>} */ changes) => {
    if (isLeft()) return;
    update({ page: 0, ...changes });
    replaceAddress(linkTo(route, "runs", pairParams(runs, choice)));
    announce(list.querySelector(".count")?.textContent ?? "");
  };
  const shows = [["matched", "Matched"], ["a", `Only in ${a}`], ["b", `Only in ${b}`]];
  const buttons = shows.map(([value, title]) =>
    h("button", { type: "button", value, onclick: () => change({ show: value }) }, title));
  const controls = pairControls(choice, output, change);
  const which = h("div", { class: "choice", role: "group", "aria-label": "Which concepts" }, buttons);
  update({});
  const meaning = "Concepts are paired one to one, by the cosine of their centred decoder columns.";
  return [summary, h("p", { class: "faint" }, meaning), controls, which, list];
}

/** @param {URLSearchParams} params @returns {PairChoice} */
function pairChoice(params) {
  const { cosine } = site.criteria;
  const [at, show] = [Number(params.get("at") || cosine), params.get("show") ?? ""];
  return {
    at: at >= 0 && at <= 1 ? at : cosine,
    show: ["a", "b"].includes(show) ? show : "matched",
    q: params.get("q") ?? "",
    sort: params.get("sort") === "activity" ? "activity" : "cosine",
    page: Math.max((numberIn(params.get("page") ?? undefined, 1e6) ?? 1) - 1, 0),
  };
}

/** @param {[number, number]} runs @param {PairChoice} choice */
function pairParams([a, b], { at, show, q, sort, page }) {
  return {
    ...editsOf(currentRoute()), a, b, q, at: at === site.criteria.cosine ? null : at, show: show === "matched" ? null : show,
    sort: sort === "cosine" ? null : sort, page: page ? page + 1 : null,
  };
}

/** @param {PairChoice} choice @param {HTMLElement} output @param {(changes: Partial<PairChoice>) => void} change */
function pairControls(choice, output, change) {
  const range = h("input", {
    type: "range", min: 0, max: 1, step: 0.01, value: choice.at, oninput: () => change({ at: Number(range.value) }),
  });
  const search = h("input", { type: "search", value: choice.q, oninput: () => change({ q: search.value }) });
  const sorts = [["cosine", "cosine"], ["activity", "activity"]];
  const sort = h(
    "select", { onchange: () => change({ sort: sort.value }) },
    sorts.map(([value, title]) => h("option", { value, selected: value === choice.sort }, title)),
  );
  return h(
    "div", { class: "controls" }, h("label", {}, h("span", {}, "Matched from a cosine of ", output), range),
    h("label", {}, "Search names", search), h("label", {}, "Sort by", sort),
  );
}

/** @param {Comparison} compared @param {Pair[]} matched @param {number} at @returns {Child} */
function summaryOf({ runs, concepts, pairs, n_dead }, matched, at) {
  const [a, b] = runs.map((run) => site.runs[run].label);
  const live = pairs.filter(({ left }) => left >= 0).length;
  const same = matched.filter((pair) => haveSameName(concepts, pair)).length;
  const haveNames = runs.every((run) => site.runs[run].has_names);
  return [
    `${matched.length.toLocaleString("en")} of ${counted(live, "live concept")} of ${a} (${percent(matched.length / live)}) `,
    `have a match in ${b} at a cosine of at least ${fixed(at)}.`,
    haveNames && matched.length > 0 && ` ${percent(same / matched.length)} of these have the same name.`,
    n_dead > 0 && ` Left out: ${counted(n_dead, "dead latent")} of the two runs.`,
  ];
}

/** @param {Concepts[]} concepts @param {Pair} pair */
function haveSameName([a, b], { left, right }) {
  return left >= 0 && right >= 0 && a.names[left] !== "" && a.names[left] === b.names[right];
}

/** @param {Comparison} compared @param {PairChoice} choice @returns {Child[]} */
function pagesOf(compared, choice) {
  const { route, runs } = compared;
  const found = chosenPairs(compared, choice);
  const pages = Math.max(Math.ceil(found.length / PAIRS_PER_PAGE), 1);
  const page = Math.min(choice.page, pages - 1);
  const start = page * PAIRS_PER_PAGE;
  const to = (/** @type {number} */ other) => linkTo(route, "runs", pairParams(runs, { ...choice, page: other }));
  const what = choice.show === "matched" ? "pair" : "concept";
  const only = choice.show !== "matched";
  const shown = pages > 1 && `, page ${page + 1} of ${pages}`;
  return [
    h("p", { class: "faint count" }, counted(found.length, what), only && " without a match at this cosine", shown,
      only && ". Beside each is its partner."),
    found.length ? pairTable(compared, found.slice(start, start + PAIRS_PER_PAGE)) : note(`No ${what} matches.`),
    pages > 1 && h(
      "nav", { class: "pages", "aria-label": "Pages" },
      page > 0 && h("a", { rel: "prev", href: to(page - 1) }, "← Previous"),
      page + 1 < pages && h("a", { rel: "next", href: to(page + 1) }, "Next →"),
    ),
  ];
}

/** The pairs to be listed, in order. @param {Comparison} compared @param {PairChoice} choice */
function chosenPairs({ concepts: [a, b], pairs }, { at, show, q, sort }) {
  const wanted = q.trim().toLowerCase();
  const holds = (/** @type {Concepts} */ concepts, /** @type {number} */ one) =>
    one >= 0 && concepts.labels[one].toLowerCase().includes(wanted);
  const found = pairs.filter((pair) => {
    const kept = show === "matched" ? pair.cosine >= at : !(pair.cosine >= at) && pair[show === "a" ? "left" : "right"] >= 0;
    return kept && (holds(a, pair.left) || holds(b, pair.right));
  });
  const rank = (/** @type {Pair} */ { left, right, cosine }) => {
    if (sort === "activity") return show === "b" ? -activityOf(b, right) : -activityOf(a, left);
    if (Number.isNaN(cosine)) return -2; // no partner at all
    return show === "matched" ? -cosine : cosine;
  };
  return found.sort((one, other) => rank(one) - rank(other));
}

/** Share of images on which a concept is active: of the training images, or else of the kept images of one data set.
 * @param {Concepts} concepts @param {number} concept */
function activityOf(concepts, concept) {
  const rate = concepts.rate[concept];
  return (Number.isNaN(rate) ? concepts.activity.row(concept)[site.probed ?? 0] : rate) || 0;
}

/** @param {Comparison} compared @param {Pair[]} pairs */
function pairTable(compared, pairs) {
  const [a, b] = compared.runs.map((run) => h("div", {}, site.runs[run].label));
  const lines = pairs.map((pair) => {
    const same = haveSameName(compared.concepts, pair) && h("span", { class: "badge" }, "same name");
    const between = h("div", { class: "cosine" }, h("span", { class: "hidden" }, "cosine "), fixed(pair.cosine), " ", same);
    return h("li", { class: "pair" }, pairSide(compared, 0, pair.left), between, pairSide(compared, 1, pair.right));
  });
  return [
    h("div", { class: "pair pair-head", "aria-hidden": "true" }, a, h("div", { class: "cosine" }, "cosine"), b),
    h("ul", { class: "pairs arrows", "aria-label": "Concepts of the two runs" }, lines),
  ];
}

/** @param {Comparison} compared @param {number} side @param {number} concept */
function pairSide({ route, runs, concepts, tops, datasets }, side, concept) {
  if (concept < 0) return h("div", { class: "faint" }, "no partner");
  const [found, run] = [tops[side], runs[side]];
  const edits = run === route.run ? editsOf(currentRoute()) : {}; // they are of this run's concepts
  return h(
    "a", { href: linkTo({ run }, `concept/${concept}`, edits), "data-item": true },
    named(concepts[side].labels[concept]), found && topPictures(found, datasets[side], concept, 3),
  );
}
