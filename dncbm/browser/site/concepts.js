"use strict";
// All concepts of a run, as cards or as a table. What is searched, filtered and sorted is in the address.

const CARDS_PER_PAGE = 60;
const ROWS_PER_PAGE = 100;

/**
 * What concepts are sorted by; the first ones are columns of the table too.
 * @typedef {{ key: string, title: string, about: string, ascending?: boolean, text?: (value: number) => string,
 *   values: (concepts: Concepts, dataset: number) => ArrayLike<number> }} ConceptColumn
 * @type {ConceptColumn[]}
 */
const CONCEPT_COLUMNS = [
  { key: "similarity", title: "Similarity", about: "Cosine of the name and the concept", text: fixed,
    values: (all) => all.similarity },
  { key: "z", title: "z", about: "How far the tested word stands out of all words, in standard deviations", text: fixed,
    values: (all) => all.z },
  { key: "q", title: "q", about: "q-value of the test of whether the concept holds a word", ascending: true,
    text: smallNumber, values: (all) => all.q },
  { key: "margin", title: "Margin", about: "Similarity less that of the second word", text: (value) => fixed(value, 3),
    values: (all) => all.margin },
  { key: "auc", title: "AUC", about: "How well the name tells the images that activate the concept from others", text: fixed,
    values: (all) => all.auc },
  { key: "monoscore", title: "MonoScore", about: "How alike the images that activate the concept are", text: fixed,
    values: (all) => all.monoscore },
  { key: "stability", title: "Stability", about: "Mean cosine with the matched concepts of other seeds", text: fixed,
    values: (all) => all.stability },
  { key: "activity", title: "Activity", about: "Share of the images of the data set that activate the concept",
    text: shareOfImages, values: (all, dataset) => columnOf(all.activity, dataset) },
  { key: "most", title: "Largest strength", about: "Over the images of the data set", text: strength,
    values: (all, dataset) => columnOf(all.most, dataset) },
  { key: "classes", title: "Classes", about: "Classes with it among their ten leading concepts", text: String,
    values: (all) => all.n_classes },
  { key: "index", title: "Index", about: "Number of the concept", ascending: true,
    values: (all) => all.labels.map((_, index) => index) },
  { key: "name", title: "Name", about: "In alphabetical order, names that abstain last", ascending: true, values: nameRanks },
];

/**
 * What an address may filter by. `keeps` gives the test for a value of the address, or null if the value says nothing.
 * @typedef {{ key: string, title: string, choices?: [string, string][], known: (list: ConceptList) => boolean,
 *   keeps: (list: ConceptList, value: string) => ((concept: number) => boolean) | null }} ConceptFilter
 * @type {ConceptFilter[]}
 */
const CONCEPT_FILTERS = [
  { key: "verdict", title: "Verdict", known: ({ run }) => verdictsOf(run).length > 1,
    keeps: ({ concepts, run }, value) => {
      const kept = verdictsOf(run).filter((verdict) => value.split(",").includes(verdict || "untested"));
      return kept.length ? (concept) => kept.includes(concepts.verdicts[concept]) : null;
    } },
  { key: "active", title: "Activity", known: (list) => isOffered(list, "activity"),
    choices: [["some", "active"], ["none", "on no image"], ["rare", "on up to 1 %"], ["often", "on 1 to 10 %"],
      ["mostly", "on over 10 %"]],
    keeps: ({ concepts, dataset }, value) => {
      const [above, upTo] = ACTIVITY_RANGES[value].map(Math.fround); // as activity is stored
      const activity = columnOf(concepts.activity, dataset);
      return (concept) => activity[concept] > above && activity[concept] <= upTo;
    } },
  { key: "named", title: "Name", known: ({ concepts }) => concepts.shared.some((n) => n > 1),
    choices: [["own", "not shared"], ["shared", "shared with others"]],
    keeps: ({ concepts }, value) => (concept) => concepts.shared[concept] > 1 === (value === "shared") },
  { key: "evidence", title: "Name predicts images", known: ({ concepts }) => concepts.auc_q.some(Number.isFinite),
    choices: [["yes", "better than random words"], ["no", "no better"], ["unknown", "not known"]],
    keeps: ({ concepts }, value) => (concept) => {
      const q = concepts.auc_q[concept];
      return value === "unknown" ? Number.isNaN(q) : value === "yes" ? q <= site.criteria.fdr : q > site.criteria.fdr;
    } },
  { key: "uses", title: "Among the ten leading concepts of", known: (list) => isOffered(list, "classes"),
    choices: [["0", "no class"], ["1-2", "1 or 2 classes"], ["3-", "3 or more classes"]],
    keeps: ({ concepts }, value) => (concept) => {
      const n = concepts.n_classes[concept];
      return value === "0" ? n === 0 : value === "3-" ? n >= 3 : n === 1 || n === 2;
    } },
  ...["similarity", "monoscore", "stability"].map(minimumFilter),
];
/** More than the first and at most the second share of images. @type {Record<string, [number, number]>} */
const ACTIVITY_RANGES = { some: [0, 1], none: [-1, 0], rare: [0, 0.01], often: [0.01, 0.1], mostly: [0.1, 1] };

/**
 * @typedef {object} ConceptList
 * @property {Route} route
 * @property {URLSearchParams} params what the address says, without what does not concern the list
 * @property {Run} run
 * @property {Concepts} concepts
 * @property {number} dataset whose images and activity are shown
 * @property {Tops | null} tops
 * @property {ConceptColumn[]} columns of which something is known
 * @property {ConceptFilter[]} filters that this run has anything for
 * @property {Map<string, number[]>} orders sort -> all concepts in its order
 * @property {HTMLSelectElement} sort
 * @property {HTMLButtonElement} direction
 * @property {HTMLElement} summary
 * @property {HTMLElement} results
 */

/** @type {View} */
async function showConcepts(route) {
  /** @type {Concepts} */
  const concepts = await ofRun(route.run, "concepts");
  const run = site.runs[route.run];
  const params = new URLSearchParams(route.params);
  params.delete("focus");
  const dataset = shownDataset(run, params);
  /** @type {ConceptList} */
  const list = {
    route, params, run, concepts, dataset, tops: await topsOf(route.run, dataset), columns: [], filters: [], orders: new Map(),
    sort: h("select"), direction: h("button", { type: "button", class: "quiet" }), summary: h("summary"), results: h("div"),
  };
  list.columns = CONCEPT_COLUMNS.filter((column) => isKnown(list, column));
  list.filters = CONCEPT_FILTERS.filter((filter) => filter.known(list));
  const page = h(
    "div", {}, h("h1", {}, "Concepts"), conceptControls(list), filterControls(list), columnMeanings(list), list.results,
  );
  fillResults(list);
  return page;
}

/** @param {ConceptList} list */
function columnMeanings({ columns }) {
  const meanings = columns.map(({ title, about }) => [h("dt", {}, title), h("dd", {}, about)]);
  return h("details", { class: "meanings" }, h("summary", {}, "What the columns mean"), h("dl", {}, meanings));
}

/** The data set of the address, or else the first one that can be shown. @param {Run} run @param {URLSearchParams} params */
function shownDataset(run, params) {
  const asked = numberIn(params.get("data") ?? undefined, site.datasets.length);
  if (asked !== null && run.has_strengths[asked]) return asked;
  const pictured = site.datasets.findIndex(({ thumbnails }, dataset) => thumbnails && run.has_strengths[dataset]);
  return Math.max(pictured >= 0 ? pictured : run.has_strengths.indexOf(true), 0);
}

/** The images for the cards; null if there are none.
 * @param {number} run @param {number} dataset @returns {Promise<Tops | null>} */
async function topsOf(run, dataset) {
  const shown = site.runs[run].has_strengths[dataset] && site.datasets[dataset].thumbnails;
  return shown ? ofRun(run, `tops_${dataset}`) : null;
}

// ------------------------------------------------------------------------------------------------ which, in which order

/** @param {Matrix<Float32Array>} matrix @param {number} column */
function columnOf({ data, width }, column) {
  return Float32Array.from({ length: data.length / width }, (_, row) => data[row * width + column]);
}

/** The place of each concept's name in the alphabet; NaN without a name that holds. @param {Concepts} concepts */
function nameRanks({ names, verdicts }) {
  const { compare } = new Intl.Collator("en", { numeric: true });
  const ranks = new Map([...new Set(names)].sort(compare).map((name, rank) => [name, rank]));
  return names.map((name, concept) => (name && verdicts[concept] !== "abstains" ? Number(ranks.get(name)) : NaN));
}

/** @param {ConceptList} list @param {ConceptColumn} column */
function isKnown({ concepts, run, dataset }, column) {
  if (column.key === "classes") return run.has_probe;
  return Array.prototype.some.call(column.values(concepts, dataset), Number.isFinite);
}

/** @param {ConceptList} list @param {string} key */
function isOffered(list, key) {
  return list.columns.some((column) => column.key === key);
}

/** @param {string} key of a column @returns {ConceptFilter} */
function minimumFilter(key) {
  const column = /** @type {ConceptColumn} */ (CONCEPT_COLUMNS.find((one) => one.key === key));
  return { key: `min-${key}`, title: `${column.title} at least`, known: (list) => isOffered(list, key),
    keeps: ({ concepts, dataset }, value) => {
      const values = column.values(concepts, dataset);
      const least = Math.fround(Number(value)); // as values are stored
      return Number.isFinite(least) ? (concept) => values[concept] >= least : null;
    } };
}

/** Column and direction of the address, or else the first column. @param {ConceptList} list */
function sorting({ params, columns }) {
  const column = columns.find(({ key }) => key === params.get("sort")) ?? columns[0];
  return { column, ascending: Boolean(column.ascending) !== (params.get("order") === "reversed") };
}

/** All concepts in the order of the address; unknown values last. @param {ConceptList} list */
function conceptOrder(list) {
  const { column, ascending } = sorting(list);
  const key = [column.key, ascending, list.dataset].join();
  const found = list.orders.get(key);
  if (found) return found;
  const values = column.values(list.concepts, list.dataset);
  const order = list.concepts.labels.map((_, concept) => concept).sort((a, b) => {
    const [one, other] = [values[a], values[b]];
    if (one === other) return a - b;
    if (Number.isNaN(one) || Number.isNaN(other)) return Number(Number.isNaN(one)) - Number(Number.isNaN(other)) || a - b;
    return ascending ? one - other : other - one;
  });
  list.orders.set(key, order);
  return order;
}

/** The tests of the filters with a value that they know. @param {ConceptList} list */
function filterTests(list) {
  return list.filters.flatMap(({ key, choices, keeps }) => {
    const value = list.params.get(key);
    const isKnown = value && (!choices || choices.some(([choice]) => choice === value));
    return (isKnown && keeps(list, value)) || [];
  });
}

/** The concepts of the address, in its order. @param {ConceptList} list */
function foundConcepts(list) {
  const tests = [...filterTests(list), searchTest(list) ?? []].flat();
  return conceptOrder(list).filter((concept) => tests.every((test) => test(concept)));
}

/** @param {URLSearchParams} params */
function searched(params) {
  return (params.get("q") ?? "").trim().toLowerCase();
}

/** "#12" is a concept's number, "12" may be a part of a word too. @param {ConceptList} list */
function searchTest({ params, concepts }) {
  const text = searched(params);
  const number = /^#?\d+$/.test(text) ? Number(text.replace("#", "")) : -1;
  if (text.startsWith("#") && number >= 0) return (/** @type {number} */ concept) => concept === number;
  if (number >= 0) {
    const holds = (/** @type {string} */ word) => word.includes(text);
    return (/** @type {number} */ concept) => concept === number || concepts.words[concept].some(holds);
  }
  const haystack = text ? haystackOf(concepts) : [];
  return text ? (/** @type {number} */ concept) => haystack[concept].includes(text) : null;
}

/** @type {WeakMap<Concepts, string[]>} */
const haystacks = new WeakMap();

/** All that can be searched for in each concept, in lower case. @param {Concepts} concepts */
function haystackOf(concepts) {
  const { labels, names, words } = concepts;
  const found =
    haystacks.get(concepts) ?? labels.map((label, i) => [label, names[i], ...words[i]].join("\n").toLowerCase());
  haystacks.set(concepts, found);
  return found;
}

// -------------------------------------------------------------------------------------------------------------- controls

/** Change what is listed. "back" does not undo it, but leaves the list. @param {ConceptList} list
 * @param {Record<string, string>} changes */
function changeList(list, changes) {
  if (isLeft()) return;
  list.params.delete("page");
  for (const [key, value] of Object.entries(changes)) {
    if (value) list.params.set(key, value);
    else list.params.delete(key);
  }
  announce(counted(fillResults(list), "concept"));
  replaceAddress(linkTo(list.route, "concepts", list.params));
}

/** @param {ConceptList} list */
function conceptControls(list) {
  const { params, route } = list;
  const search = h("input", {
    type: "search", value: params.get("q") ?? "", placeholder: "name or #number", autocomplete: "off", spellcheck: "false",
    "data-focus": isAskedFor(route, "search"),
    oninput: () => changeList(list, { q: search.value }),
    onkeydown: (/** @type {KeyboardEvent} */ event) => toFirstResult(list, event),
  });
  return h(
    "div", { class: "controls", role: "search" },
    h("label", { class: "wide" }, "Search names and candidates", search),
    sortControls(list), datasetControl(list), viewControl(list),
  );
}

/** From the search to its first result. @param {ConceptList} list @param {KeyboardEvent} event */
function toFirstResult(list, event) {
  const first = list.results.querySelector("a[data-item]");
  if (event.isComposing || !["ArrowDown", "Enter"].includes(event.key) || !(first instanceof HTMLElement)) return;
  event.preventDefault();
  first.focus();
}

/** @param {ConceptList} list */
function sortControls(list) {
  const { sort, direction, params } = list;
  sort.append(...list.columns.map(({ key, title, about }) => h("option", { value: key, title: about }, title)));
  sort.addEventListener("change", () => changeList(list, { sort: sort.value, order: "" }));
  direction.addEventListener("click", () => changeList(list, { order: params.get("order") ? "" : "reversed" }));
  return [h("label", {}, "Sort by", sort), direction];
}

/** @param {ConceptList} list */
function datasetControl(list) {
  const options = site.datasets.map(({ name }, dataset) => {
    const selected = dataset === list.dataset;
    return list.run.has_strengths[dataset] ? h("option", { value: dataset, selected }, name) : null;
  });
  const select = h("select", { onchange: () => changeDataset(list, select) }, options);
  return select.length > 1 ? h("label", {}, "Images of", select) : null;
}

/** @param {ConceptList} list @param {HTMLSelectElement} select */
async function changeDataset(list, select) {
  const dataset = Number(select.value);
  const isLate = () => isLeft() || !select.isConnected || Number(select.value) !== dataset; // something else is asked for
  try {
    const tops = await topsOf(list.route.run, dataset);
    if (isLate()) return;
    Object.assign(list, { dataset, tops });
    changeList(list, { data: select.value });
  } catch (error) {
    if (isLate()) return;
    select.value = String(list.dataset);
    list.results.prepend(note(error instanceof Error ? error.message : String(error)));
  }
}

/** @param {ConceptList} list */
function viewControl(list) {
  const buttons = [["", "Cards"], ["table", "Table"]].map(([view, title]) => {
    const choose = () => {
      changeList(list, { view });
      buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    };
    const pressed = (list.params.get("view") === "table") === (view === "table");
    const button = h("button", { type: "button", "aria-pressed": String(pressed), onclick: choose }, title);
    return button;
  });
  return h("div", { class: "toggle", role: "group", "aria-label": "Show as" }, buttons);
}

/** @param {ConceptList} list */
function filterControls(list) {
  if (!list.filters.length) return null;
  const clear = () => {
    list.filters.forEach(({ key }) => list.params.delete(key));
    go(linkTo(list.route, "concepts", list.params));
  };
  return h(
    "details", { class: "filters", open: filterTests(list).length > 0 }, list.summary,
    h(
      "div", { class: "controls" }, list.filters.map((filter) => filterControl(list, filter)),
      h("button", { type: "button", onclick: clear }, "Clear"),
    ),
  );
}

/** @param {ConceptList} list @param {ConceptFilter} filter */
function filterControl(list, { key, title, choices }) {
  const now = list.params.get(key) ?? "";
  if (key === "verdict") return verdictFilter(list, now);
  if (!choices) {
    const set = () => changeList(list, { [key]: number.value });
    const number = h("input", { type: "number", step: 0.05, value: now, oninput: set });
    return h("label", {}, title, number);
  }
  const select = h(
    "select", { onchange: () => changeList(list, { [key]: select.value }) }, h("option", { value: "" }, "any"),
    choices.map(([value, text]) => h("option", { value, selected: value === now }, text)),
  );
  return h("label", {}, title, select);
}

/** One box for each verdict; all or none of them ticked is the same. @param {ConceptList} list @param {string} now */
function verdictFilter(list, now) {
  const boxes = verdictsOf(list.run).map((verdict) => {
    const value = verdict || "untested";
    const checked = now.split(",").includes(value);
    const box = h("input", { type: "checkbox", value, checked, onchange: () => changeList(list, { verdict: ticked() }) });
    return { box, label: h("label", { class: "tick" }, box, badge(verdict), list.run.verdicts[verdict].toLocaleString("en")) };
  });
  const ticked = () => boxes.filter(({ box }) => box.checked).map(({ box }) => box.value).join();
  return h("fieldset", {}, h("legend", {}, "Verdict"), boxes.map(({ label }) => label));
}

// --------------------------------------------------------------------------------------------------------------- results

/** Show the page of the address. Returns how many concepts there are on all pages. @param {ConceptList} list */
function fillResults(list) {
  const { params, results, concepts, sort, direction, summary } = list;
  const [table, found] = [params.get("view") === "table", foundConcepts(list)];
  const per = table ? ROWS_PER_PAGE : CARDS_PER_PAGE;
  const pages = Math.max(Math.ceil(found.length / per), 1);
  const page = Math.min(Math.max((numberIn(params.get("page") ?? "1", 1e6) ?? 1) - 1, 0), pages - 1);
  const shown = found.slice(page * per, (page + 1) * per);
  listed.set("concepts", { run: list.route.run, items: found, path: "concepts", params, per });
  const { column, ascending } = sorting(list);
  sort.value = column.key;
  direction.textContent = ascending ? "↑" : "↓";
  direction.title = ascending ? "Ascending" : "Descending";
  direction.setAttribute("aria-label", direction.title);
  const filtered = filterTests(list).length;
  summary.textContent = filtered ? `Filters (${filtered})` : "Filters";
  refill(
    results, missingImages(list), resultCount(concepts, found.length, page * per, shown.length),
    found.length === 0 ? note("No concept matches. Change the search or the filters.") : null,
    table ? conceptTable(list, shown) : conceptCards(list, shown), pageLinks(list, page, pages),
  );
  return found.length;
}

/** @param {Concepts} concepts @param {number} n found @param {number} start of the page @param {number} on it */
function resultCount({ labels }, n, start, on) {
  const [of, first, last] = [n, start + 1, start + on].map((number) => number.toLocaleString("en"));
  const said = n === labels.length ? counted(n, "concept") : `${of} of ${counted(labels.length, "concept")}`;
  return h("p", { class: "count" }, said, on < n ? `, ${first} to ${last} shown` : null);
}

/** @param {ConceptList} list */
function missingImages({ run, dataset }) {
  if (!run.has_strengths[dataset]) return note("This run has no concept strengths, so activity and images are not shown.");
  const { thumbnails, no_thumbnails: why } = site.datasets[dataset];
  return thumbnails ? null : note(`Images are not shown. ${why}`);
}

/** @param {ConceptList} list @param {number[]} concepts */
function conceptCards(list, concepts) {
  const { key, title, text, values } = sorting(list).column;
  const isNew = text && !["similarity", "activity"].includes(key); // which all cards say
  const sorted = isNew ? values(list.concepts, list.dataset) : [];
  const cards = concepts.map((concept) => conceptCard(list, concept, isNew && `${title} ${text(sorted[concept])}`));
  return h("ul", { class: "cards arrows", "aria-label": "Concepts" }, cards);
}

/** @param {ConceptList} list @param {number} concept @param {string | false | undefined} sorted what it is sorted by */
function conceptCard(list, concept, sorted) {
  const { concepts, dataset, run, tops } = list;
  const similarity = concepts.similarity[concept];
  const activity = concepts.activity.row(concept)[dataset];
  const facts = [
    isTested(run) && badge(concepts.verdicts[concept]),
    Number.isFinite(similarity) && h("span", {}, `similarity ${fixed(similarity)}`),
    Number.isFinite(activity) && h("span", {}, `active on ${activity ? shareOfImages(activity) : "no image"}`),
    sorted && h("span", {}, sorted),
  ];
  return h(
    "li", { class: "card" },
    conceptLine(list, concept, "title"),
    h("p", { class: "card-facts" }, facts.filter(Boolean).map((fact) => [fact, " "])), matchedWord(list, concept),
    tops ? cardImages(dataset, tops, concept) : null,
  );
}

/** @param {ConceptList} list @param {number} concept @param {string} [kind] */
function conceptLine({ route, concepts }, concept, kind) {
  const focus = isAskedFor(route, concept);
  const props = { class: kind, href: conceptLink(route, concept), "data-item": true, "data-focus": focus };
  return h("a", props, named(concepts.labels[concept]));
}

/** The images that activate a concept most. The link beside them says more to those who cannot see them.
 * @param {number} dataset @param {Tops} tops @param {number} concept */
function cardImages(dataset, tops, concept) {
  const images = [...tops.images.row(concept)].filter((image) => image >= 0);
  return h("div", { class: "strip", "aria-hidden": "true" }, images.map((image) => picture(dataset, image, "")));
}

/** The candidate that was searched for, where the label does not hold it. @param {ConceptList} list @param {number} concept */
function matchedWord({ params, concepts }, concept) {
  const text = searched(params);
  const holds = (/** @type {string} */ word) => word.toLowerCase().includes(text);
  if (!text || holds(concepts.labels[concept])) return null;
  const found = concepts.words[concept].find(holds);
  return found === undefined ? null : h("p", {}, "candidate: ", named(found));
}

/** The verdicts that there are, "" for no test last. @param {Run} run */
function verdictsOf({ verdicts }) {
  return ["named", "collision", "abstains", ""].filter((verdict) => verdicts[verdict]);
}

/** @param {Run} run */
function isTested(run) {
  return verdictsOf(run).some(Boolean);
}

/** Rare is not never. @param {number} share */
function shareOfImages(share) {
  if (share === 0) return percent(0, 0);
  return share > 0 && share < 0.001 ? `< ${percent(0.001)}` : percent(share);
}

/** @param {ConceptList} list @param {number[]} concepts */
function conceptTable(list, concepts) {
  const shown = list.columns.filter(({ text }) => text);
  const values = shown.map((column) => column.values(list.concepts, list.dataset));
  const tested = isTested(list.run);
  const rows = concepts.map((concept) => {
    const { verdicts, words } = list.concepts;
    const others = words[concept].slice(1).map((word) => h("span", {}, named(word)));
    return h(
      "tr", {}, h("td", { class: "number" }, `#${concept}`), h("th", { scope: "row" }, conceptLine(list, concept)),
      tested ? h("td", {}, badge(verdicts[concept])) : null,
      shown.map(({ text }, place) => h("td", { class: "number" }, text?.(values[place][concept]))),
      list.run.has_names ? h("td", {}, h("div", { class: "candidates" }, others)) : null,
    );
  });
  const head = tableHead(list, shown, tested);
  return h("div", { class: "scroll" }, h("table", { class: "concepts" }, head, h("tbody", { class: "arrows" }, rows)));
}

/** @param {ConceptList} list @param {ConceptColumn[]} shown @param {boolean} tested */
function tableHead(list, shown, tested) {
  return h("thead", {}, h(
    "tr", {}, sortHeading(list, "index", "#", "number"), sortHeading(list, "name", "Concept"),
    tested ? h("th", { scope: "col" }, "Verdict") : null,
    shown.map(({ key, title, about }) => sortHeading(list, key, title, "number", about)),
    list.run.has_names ? h("th", { scope: "col" }, "Other candidates") : null,
  ));
}

/** A heading that sorts; again, the other way round. @param {ConceptList} list @param {string} key @param {string} title
 * @param {string} [kind] @param {string} [about] */
function sortHeading(list, key, title, kind, about) {
  const { column, ascending } = sorting(list);
  const chosen = column.key === key;
  const sort = () => {
    changeList(list, { sort: key, order: chosen && !list.params.get("order") ? "reversed" : "" });
    const again = list.results.querySelector(`[data-sort=${key}]`); // in the new table
    if (again instanceof HTMLElement) again.focus();
  };
  const arrow = chosen ? h("span", { "aria-hidden": "true" }, ascending ? " ↑" : " ↓") : null;
  const button = h("button", { type: "button", title: about, "data-sort": key, onclick: sort }, title, arrow);
  return h("th", { scope: "col", class: kind, "aria-sort": chosen ? (ascending ? "ascending" : "descending") : null }, button);
}

/** Pages are addresses, so that "back" returns to the page before. @param {ConceptList} list @param {number} page
 * @param {number} pages */
function pageLinks({ route, params }, page, pages) {
  if (pages === 1) return null;
  const link = (/** @type {number} */ to, /** @type {string} */ title, /** @type {string | null} */ rel = null) => {
    if (to === page || to < 0 || to >= pages) return h("span", { class: "faint" }, title);
    const changed = new URLSearchParams(params);
    changed.set("page", to ? String(to + 1) : "");
    return h("a", { href: linkTo(route, "concepts", changed), rel }, title);
  };
  return h(
    "nav", { class: "pages", "aria-label": "Pages" }, link(0, "First"), link(page - 1, "Previous", "prev"),
    h("span", {}, `Page ${page + 1} of ${pages}`), link(page + 1, "Next", "next"), link(pages - 1, "Last"),
  );
}
