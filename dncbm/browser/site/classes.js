"use strict";
// All classes of the probed data set, and one of them.

/** Images of a class that are shown at first, and then at a time. */
const CLASS_IMAGES = 48;

/** @typedef {{ number: number, name: string, size: number, right: number, logit: number }} ClassFacts */

/** Key -> title and order of the classes, the first at the top; by number where the order leaves it open.
 * @type {Record<string, [string, (a: ClassFacts, b: ClassFacts) => number]>} */
const CLASS_ORDERS = {
  "": ["Number", () => 0],
  name: ["Name", (a, b) => a.name.localeCompare(b.name)],
  size: ["Most images", (a, b) => b.size - a.size],
  worst: ["Lowest accuracy", (a, b) => unknownLast(a.right, b.right) || a.right - b.right],
  best: ["Highest accuracy", (a, b) => unknownLast(a.right, b.right) || b.right - a.right],
  logit: ["Highest mean logit", (a, b) => unknownLast(a.logit, b.logit) || b.logit - a.logit],
};

/** Unknown numbers come last in either direction. @param {number} a @param {number} b */
function unknownLast(a, b) {
  return Number(Number.isNaN(a)) - Number(Number.isNaN(b));
}

/** @param {Route} route @param {string} title */
function noProbe(route, title) {
  return h("div", {}, h("h1", {}, title), note("This run has no probe.", site.runs[route.run].commands.probe));
}

/** @param {Route} route @returns {Promise<ClassFacts[]>} */
async function classFacts(route) {
  /** @type {Classes} */
  const { size, right, mean_logit: logit } = await ofRun(route.run, "classes");
  return site.classes.map((name, number) => ({
    number, name, size: size[number], right: right[number] / size[number], logit: logit[number],
  }));
}

/** @type {View} */
async function showClasses(route) {
  if (!site.runs[route.run].has_probe) return noProbe(route, "Classes");
  const facts = await classFacts(route);
  const [body, found] = [h("tbody", { class: "arrows" }), h("p", { role: "status" })];
  const search = h("input", { type: "search", value: route.params.get("q") ?? "", oninput: () => changed() });
  const sorted = route.params.get("sort") ?? "";
  const sort = h("select", { onchange: () => changed() });
  for (const [key, [title]] of Object.entries(CLASS_ORDERS)) {
    sort.append(h("option", { value: key, selected: key === sorted }, title));
  }
  const fill = () => {
    const asked = search.value.trim().toLowerCase();
    const shown = facts.filter(({ name }) => name.toLowerCase().includes(asked)).sort(CLASS_ORDERS[sort.value][1]);
    const params = { q: search.value.trim(), sort: sort.value };
    listed.set("classes", { run: route.run, items: shown.map(({ number }) => number), path: "classes", params });
    refill(body, shown.map((one) => classLine(route, one)));
    found.textContent = shown.length === facts.length ? counted(facts.length, "class", "classes")
      : `${counted(shown.length, "class", "classes")} of ${facts.length.toLocaleString("en")}`;
  };
  const changed = () => {
    if (isLeft()) return;
    replaceAddress(linkTo(route, "classes", { ...editsOf(currentRoute()), q: search.value.trim(), sort: sort.value }));
    fill();
  };
  fill();
  const controls = h("div", { class: "controls" }, h("label", {}, "Search", search), h("label", {}, "Order", sort));
  const { name, n, of } = site.datasets[Number(site.probed)];
  const sample = n < of ? `, of which ${n.toLocaleString("en")} of ${counted(of, "image")} are here` : "";
  const what = `The classes of ${name} (${site.split})${sample}`;
  const lead = h("p", {}, what, ": images, share that the probe predicts right, and mean logit of the class over its images.");
  const top = [h("h1", {}, "Classes"), withoutEdits(route), lead, controls];
  return h("div", {}, top, found, classTable(body));
}

/** @param {HTMLElement} body */
function classTable(body) {
  const numbers = ["Images", "Accuracy", "Mean logit"].map((text) => h("th", { scope: "col", class: "number" }, text));
  const head = h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Class"), numbers));
  const region = { class: "scroll", tabindex: 0, role: "region", "aria-label": "Table of the classes" };
  return h("div", region, h("table", { class: "class-table" }, head, body));
}

/** @param {Route} route @param {ClassFacts} facts */
function classLine(route, { number, name, size, right, logit }) {
  const props = { href: classLink(currentRoute(), number), "data-item": true, "data-focus": isAskedFor(route, number) };
  const link = h("a", props, named(name));
  const cells = [size.toLocaleString("en"), percent(right), fixed(logit)].map((text) => h("td", { class: "number" }, text));
  return h("tr", {}, h("th", { scope: "row" }, link), cells);
}

// ---------------------------------------------------------------------------------------------------------- one class

/** @type {View} */
async function showClass(route) {
  const number = numberIn(route.parts[0], site.classes.length);
  const { run } = route;
  if (!site.runs[run].has_probe) return noProbe(route, "Class");
  if (number === null) {
    const all = h("a", { rel: "up", href: linkTo(route, "classes", editsOf(route)) }, "↑ Classes");
    return h("div", {}, h("h1", {}, "There is no such class"), h("p", {}, all));
  }
  const per = site.per_chunk.classes;
  /** @type {[ClassFacts[], ClassDetails, Concepts, Predictions, Images]} */
  const [facts, details, { labels }, { predicted }, images] = await Promise.all([
    classFacts(route), ofRun(run, `class_${Math.floor(number / per)}`), ofRun(run, "concepts"), ofRun(run, "predictions"),
    chunk(`images_${site.probed}`),
  ]);
  /** @type {ShownClass} */
  const shown = { route, facts: facts[number], details, row: number % per, labels, predicted, images };
  const { size, right } = shown.facts;
  const { n, of } = site.datasets[Number(site.probed)];
  const sample = n < of ? `, in a sample of ${n.toLocaleString("en")} of the split's ${counted(of, "image")}` : "";
  return h(
    "article", { class: "class-view" },
    pager(route, number, site.classes.length, {
      list: "classes", label: "Classes", one: "class", path: "classes", title: "Classes",
      link: (other) => classLink(route, other),
    }),
    h("h1", {}, named(site.classes[number])), withoutEdits(route),
    size ? h("p", {}, `${counted(size, "image")}, ${percent(right)} of them predicted right${sample}`) : null,
    size ? [classConcepts(shown), classImages(shown), classConfusions(shown)]
      : note("None of the images here is of this class, so nothing is known of it but its weights."),
  );
}

/** @typedef {{ route: Route, facts: ClassFacts, details: ClassDetails, row: number, labels: string[], predicted: Int32Array,
 *   images: Images }} ShownClass */

/** Bars of concepts; -1 stands for none.
 * @param {ShownClass} shown @param {string} title @param {ArrayLike<number>} concepts @param {ArrayLike<number>} values
 * @param {ArrayLike<number>} [weights] @param {number} [most] the value of a full bar */
function conceptBars({ route, labels }, title, concepts, values, weights, most) {
  const places = [...Array(concepts.length).keys()].filter((place) => concepts[place] >= 0);
  const rows = places.map((place) => ({
    label: h("a", { href: conceptLink(route, concepts[place]) }, named(labels[concepts[place]])),
    value: values[place], after: weights && fixed(weights[place]),
  }));
  return rows.length ? bars(title, rows, { most, text: (value) => fixed(value, 3) }) : null;
}

/** @param {ShownClass} shown */
function classConcepts(shown) {
  const { details: of, row, facts } = shown;
  const [values, negative] = [of.contributions.row(row), of.against_contributions.row(row)];
  const most = Math.max(...values, ...negative.map(Math.abs), 1e-30);
  const [title, other] = ["Concepts for it: contribution, weight", "Concepts against it: contribution, weight"];
  const pro = conceptBars(shown, title, of.concepts.row(row), values, of.weights.row(row), most);
  const contra = conceptBars(shown, other, of.against.row(row), negative, of.against_weights.row(row), most);
  const rest = of.n_remaining[row];
  const others = rest ? `The other ${counted(rest, "concept")} add ${fixed(of.remaining[row], 3)}. ` : "";
  return h(
    "section", {}, h("h2", {}, "Concepts"),
    h("p", {}, "Contribution to the logit of the class: mean over its images of strength times weight."),
    h(
      "div", { class: "columns" }, h("div", {}, pro ?? note("No concept speaks for it.")),
      h("div", {}, contra ?? note("No concept speaks against it.")),
    ),
    h("p", {}, others, "All contributions add up to the mean logit, ", h("strong", {}, fixed(facts.logit, 3)), "."),
  );
}

/** @param {ShownClass} shown */
function classImages(shown) {
  const [{ route, facts }, results] = [shown, h("div")];
  const path = `class/${facts.number}`;
  const choices = imageChoices(shown);
  const options = choices.map(({ key, title, found }) => {
    const n = found.length.toLocaleString("en");
    return h("option", { value: key, selected: key === route.params.get("images") }, `${shortened(title)} (${n})`);
  });
  const changed = () => {
    changeParam("images", select.value);
    announce(counted(fill(CLASS_IMAGES), "image"));
  };
  const select = h("select", { onchange: changed }, options);
  const before = listed.get("class");
  const fill = (/** @type {number} */ n) => {
    const { key, found } = choices[select.selectedIndex];
    listed.set("class", { run: route.run, items: found, path, params: { images: key }, shown: n });
    const more = () => {
      fill(n + CLASS_IMAGES);
      results.querySelectorAll("a")[n].focus();
    };
    const [left, next] = [found.length - n, Math.min(found.length - n, CLASS_IMAGES)];
    const said = left > next ? `Show ${next} more of ${left.toLocaleString("en")}` : `Show the other ${left}`;
    const button = left > 0 && h("button", { type: "button", onclick: more }, said);
    refill(results, found.length ? classGallery(shown, found.slice(0, n)) : note("There are none."), button);
    return found.length;
  };
  const asked = choices[select.selectedIndex].found.findIndex((image) => isAskedFor(route, image));
  fill(Math.max(CLASS_IMAGES, asked + 1, (before?.path === path && before.shown) || 0)); // "back" finds all that were shown
  results.querySelectorAll("a")[asked]?.setAttribute("data-focus", "");
  return h(
    "section", {}, h("h2", {}, "Images"), h("div", { class: "controls" }, h("label", {}, "Show", select)),
    h("p", {}, "Below each is what the probe predicts."), results,
  );
}

/** Images of a class to choose from: a sample first, if that is not all. @param {ShownClass} shown
 * @returns {{ key: string, title: string, found: number[] }[]} */
function imageChoices({ facts, details, row, predicted, images }) {
  const all = [...images.label.keys()].filter((image) => images.label[image] === facts.number);
  const sample = [...details.images.row(row)].filter((image) => image >= 0);
  const choice = (/** @type {string} */ key, /** @type {string} */ title, /** @type {(image: number) => boolean} */ keeps) =>
    ({ key, title, found: all.filter(keeps) });
  const confused = [...details.confused.row(row)].filter((number) => number >= 0);
  return [
    ...(sample.length < all.length ? [{ key: "", title: "drawn at random", found: sample }] : []),
    choice("all", "all", () => true),
    choice("right", "predicted right", (image) => predicted[image] === facts.number),
    choice("wrong", "predicted wrong", (image) => predicted[image] !== facts.number),
    ...confused.map((number) =>
      choice(`taken-${number}`, `taken for ${site.classes[number]}`, (image) => predicted[image] === number)),
    ...(images.group.length ? site.groups : []).map((name, group) =>
      choice(`group-${group}`, `group ${name}`, (image) => images.group[image] === group)).filter(({ found }) => found.length),
  ];
}

/** @param {ShownClass} shown @param {number[]} found */
function classGallery({ route, facts, predicted, images }, found) {
  const said = (/** @type {number} */ place) => {
    const number = predicted[found[place]];
    return number === facts.number ? "right" : `wrong: ${shortened(site.classes[number])}`;
  };
  return gallery(route, Number(site.probed), found, "Images of the class", said, images);
}

/** @param {ShownClass} shown */
function classConfusions(shown) {
  const { details, row } = shown;
  const confused = [...details.confused.row(row)].filter((number) => number >= 0);
  const none = site.classes.length < 2 ? "There is no other class." : "All its images are predicted right.";
  const about = "Concepts that speak most for the other class against this one: mean strength times difference of weights.";
  return h(
    "section", {}, h("h2", {}, "Taken for"),
    confused.length ? h("p", {}, about) : note(none),
    h("div", { class: "columns" }, confused.map((number, place) => classConfusion(shown, number, place))),
  );
}

/** @param {ShownClass} shown @param {number} number the other class @param {number} place among the confusions */
function classConfusion(shown, number, place) {
  const { route, details, row, facts, images } = shown;
  const title = `Images taken for ${site.classes[number]}`;
  const count = details.confused_count.row(row)[place];
  const each = details.confused_concepts.width / details.confused.width;
  const part = (/** @type {Matrix<any>} */ matrix) => matrix.row(row).subarray(place * each, (place + 1) * each);
  const link = h("a", { href: classLink(route, number) }, named(site.classes[number]));
  return h(
    "div", {}, h("h3", {}, link, `: ${counted(count, "image")}, ${percent(count / facts.size)}`),
    conceptBars(shown, "Concepts behind it", part(details.confused_concepts), part(details.confused_values)),
    gallery(route, Number(site.probed), part(details.confused_images), title, undefined, images),
  );
}
