"use strict";
// An image: what the probe predicts, which concepts that rests on, and what it predicts once they are edited.

/** Contributions that are shown at first, and classes. */
const FIRST_SHOWN = 12;
const TOP_CLASSES = 10;
/** Milliseconds that a view waits for the weights, so that going back finds the page as tall as it was. */
const WEIGHTS_PATIENCE = 300;

/** @type {View} */
async function showImage(route) {
  const dataset = numberIn(route.parts[0], site.datasets.length);
  const image = dataset === null ? null : numberIn(route.parts[1], site.datasets[dataset].n);
  if (dataset === null || image === null) {
    const all = h("a", { href: linkTo(route, "concepts", editsOf(route)) }, "the concepts");
    return h("div", {}, h("h1", {}, "There is no such image"), h("p", {}, "Go to ", all, "."));
  }
  /** @type {Images} */
  const images = await chunk(`images_${dataset}`);
  const run = site.runs[route.run];
  const explains = run.has_probe && dataset === site.probed && run.has_strengths[dataset];
  const predicted = h("section", { class: "prediction", "aria-label": "Prediction" });
  const reasons = h("section", { class: "reasons", "aria-labelledby": "reasons-title" });
  const facts = imageFacts(route, dataset, image, images);
  const view = h(
    "article", { class: "image-view follows-edits" }, imagePager(route, dataset, image, images),
    h("h1", {}, named(images.names[image])),
    h("div", { class: "image-top" }, h("div", {}, picture(dataset, image, imageName(images, image)), facts), predicted),
    reasons, explains ? editPanel(route) : null,
  );
  if (explains) await filledOrNoted(explainImage(route, image, images, view), predicted);
  else await fillStrengths(route, dataset, image, reasons);
  return view;
}

/** Wait for a part of the view, but not for long: then a note stands there until it is filled.
 * @param {Promise<void>} filling @param {HTMLElement} place */
async function filledOrNoted(filling, place) {
  let done = false;
  const said = (/** @type {unknown} */ error) => refill(place, note(error instanceof Error ? error.message : String(error)));
  const safe = filling.catch(said);
  const patience = new Promise((resolve) => setTimeout(resolve, WEIGHTS_PATIENCE));
  await Promise.race([safe.then(() => (done = true)), patience]);
  if (!done) refill(place, note("Reading the weights of the probe …"));
}

/** @param {Route} route @param {number} dataset @param {number} image @param {Images} images */
function imagePager(route, dataset, image, images) {
  const ofClass = dataset === site.probed && site.runs[route.run].has_probe;
  const label = images.label[image];
  return pager(route, image, site.datasets[dataset].n, {
    list: ofClass ? "class" : "", label: "Images", one: "image", link: (other) => imageLink(route, dataset, other),
    path: ofClass ? `class/${label}` : "concepts", title: ofClass ? ["Class ", named(images.classes[label])] : "Concepts",
  });
}

/** @param {Route} route @param {number} dataset @param {number} image @param {Images} images */
function imageFacts(route, dataset, image, images) {
  const label = images.label[image];
  const of = images.classes[label] === undefined ? "–" : named(images.classes[label]);
  const linked = dataset === site.probed && site.runs[route.run].has_probe && images.classes[label] !== undefined;
  const group = dataset === site.probed ? site.groups[images.group[image]] : undefined;
  /** @type {[string, Child][]} */
  const facts = [
    ["Data set", named(site.datasets[dataset].name)], [`Index in ${site.split}`, images.key[image].toLocaleString("en")],
    ["Class", linked ? h("a", { href: classLink(route, label) }, of) : of],
  ];
  if (group !== undefined) facts.push(["Group", named(group)]);
  return h("dl", {}, facts.map(([what, value]) => [h("dt", {}, what), h("dd", {}, value)]));
}

// ------------------------------------------------------------------------------------------- images without a probe

/** @param {number} n @param {() => void} onclick */
function showAllButton(n, onclick) {
  return h("button", { type: "button", onclick }, `Show all ${n}`);
}

/** @param {Route} route @param {number} dataset @param {number} image @param {HTMLElement} place */
async function fillStrengths(route, dataset, image, place) {
  const title = h("h2", { id: "reasons-title" }, "Concepts");
  const other = site.probed !== null && dataset !== site.probed && site.runs[route.run].has_probe;
  const why = other && note(`The probe classifies ${site.datasets[Number(site.probed)].name}, so it predicts nothing here.`);
  if (!site.runs[route.run].has_strengths[dataset]) {
    return refill(place, title, note(`This run has no concept strengths of ${site.datasets[dataset].name}.`));
  }
  const { concepts, strengths } = await strengthsOf(route.run, dataset, image);
  if (!concepts.length) return refill(place, title, note("No concept is active on this image."));
  /** @type {Concepts} */
  const { labels } = await ofRun(route.run, "concepts");
  const order = [...concepts.keys()].sort((a, b) => strengths[b] - strengths[a]);
  const rows = order.map((at) => ({
    label: h("a", { href: conceptLink(route, concepts[at]) }, named(labels[concepts[at]])), value: strengths[at],
  }));
  const list = h("div");
  const shows = (/** @type {number} */ n) => {
    const more = n < rows.length && showAllButton(rows.length, () => shows(rows.length));
    refill(list, bars("Concepts that are active on this image, by strength", rows.slice(0, n), { text: strength }), more);
  };
  shows(FIRST_SHOWN);
  return refill(place, title, why, list);
}

// ------------------------------------------------------------------------------------------------ images with a probe

/**
 * An image and what the probe makes of it.
 * @typedef {object} Explained
 * @property {Uint16Array | Uint32Array} concepts that are active
 * @property {Float32Array} strengths
 * @property {(concept: number) => Float32Array} weightOf
 * @property {string[]} labels of all concepts
 * @property {number} truth its class
 * @property {Float64Array} before logits without edits
 * @property {Float64Array} logits
 * @property {Float64Array} probabilities
 * @property {Edits} edits those of the address
 * @property {(concept: number, factor: number) => void} edit
 * @property {(concept: number) => void} removeAndMeasure
 */

/** @param {Route} route @param {number} image @param {Images} images @param {HTMLElement} view */
async function explainImage(route, image, images, view) {
  /** @type {[Awaited<ReturnType<typeof strengthsOf>>, (concept: number) => Float32Array, Concepts]} */
  const [{ concepts, strengths }, weightOf, { labels }] = await Promise.all([
    strengthsOf(route.run, Number(site.probed), image), weightsOf(route.run), ofRun(route.run, "concepts"),
  ]);
  const before = logitsOf(concepts, strengths, weightOf, site.classes.length, new Map());
  /** @type {Explained} */
  const found = {
    concepts, strengths, weightOf, labels, truth: images.label[image], before, logits: before,
    probabilities: softmax(before), get edits() { return readEdits(currentRoute()); },
    edit: (concept, factor) => changeEdits(found.edits.set(concept, factor)),
    removeAndMeasure: (concept) => {
      found.edit(concept, 0);
      const panel = view.querySelector(".edits");
      panel?.dispatchEvent(new Event("measure"));
      panel?.querySelector(".accuracy-result")?.scrollIntoView({ block: "center" });
    },
  };
  const parts = [predictionPart(found), reasonsPart(found)];
  const update = () => {
    if (!isShown(route)) return;
    found.logits = logitsOf(concepts, strengths, weightOf, site.classes.length, found.edits);
    found.probabilities = softmax(found.logits);
    for (const part of parts) part.update();
  };
  let frame = 0;
  view.addEventListener("editschange", () => {
    frame ||= requestAnimationFrame(() => ((frame = 0), update()));
  });
  update();
  refill(/** @type {HTMLElement} */ (view.querySelector(".prediction")), parts[0].element);
  refill(/** @type {HTMLElement} */ (view.querySelector(".reasons")), parts[1].element);
}

// --------------------------------------------------------------------------------------------------- the prediction

/** @typedef {{ element: HTMLElement, update: () => void }} Part */

/** @param {Explained} found @returns {Part} */
function predictionPart(found) {
  const [said, top, table] = [h("div", { class: "predicted" }), h("div"), allClasses(found)];
  const was = softmax(found.before);
  const first = predictedOf(found.before);
  /** @type {number | null} */
  let last = null;
  const update = () => {
    const { logits, probabilities, edits } = found;
    const now = predictedOf(logits);
    if (last !== null && now !== last) announce(`Predicted now: ${site.classes[now]}.`);
    last = now;
    const edited = found.concepts.some((concept) => edits.has(concept));
    refill(
      said, predictionLine(found, edited ? "Without edits" : "Predicted", first, was[first]),
      edited ? predictionLine(found, "With edits", now, probabilities[now]) : null,
      edits.size && !edited ? note("None of the edited concepts is active on this image.") : null,
    );
    const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a] || a - b).slice(0, TOP_CLASSES);
    const rows = order.map((number) => {
      const [before, after] = [percent(was[number]), percent(probabilities[number])];
      const text = before === after ? after : `${before.replace("\u00a0%", "")} → ${after}`;
      return { label: classNamed(found, number), value: probabilities[number], text };
    });
    refill(top, bars(`Most probable classes${edited ? ", without → with edits" : ""}`, rows, { most: 1 }));
    table.update();
  };
  return { element: h("div", {}, said, top, table.element), update };
}

/** @param {Explained} found @param {string} when @param {number} number @param {number} probability */
function predictionLine({ truth }, when, number, probability) {
  const link = h("a", { href: classLink(currentRoute(), number) }, named(site.classes[number]));
  const verdict = h("span", { class: number === truth ? "is-right" : "is-wrong" }, number === truth ? "right" : "wrong");
  return h("p", {}, `${when}: `, h("strong", {}, link), `, ${percent(probability)}, `, verdict);
}

/** @param {Explained} found @param {number} number */
function classNamed({ truth }, number) {
  const link = h("a", { href: classLink(currentRoute(), number) }, named(site.classes[number]));
  return number === truth ? [link, " (true class)"] : link;
}

/** All classes with their logits, filled once it is opened. @param {Explained} found @returns {Part} */
function allClasses(found) {
  const was = softmax(found.before);
  const body = h("tbody");
  const head = (/** @type {string} */ text) => h("th", { scope: "col", class: text === "Class" ? null : "number" }, text);
  const heads = ["Class", "Logit", "Logit without edits", "Probability", "Probability without edits"].map(head);
  const table = h("table", {}, h("thead", {}, h("tr", {}, heads)), body);
  const update = () => {
    if (!details.open) return;
    if (!body.childElementCount) add(body, site.classes.map((_, number) => classRow(found, number, was)));
    for (const row of /** @type {Iterable<HTMLElement>} */ (body.children)) {
      const logit = found.logits[Number(row.dataset.class)];
      if (row.dataset.logit === String(logit)) continue;
      row.dataset.logit = String(logit);
      row.children[1].textContent = fixed(logit, 3);
      row.children[3].textContent = percent(found.probabilities[Number(row.dataset.class)]);
    }
  };
  const details = h(
    "details", { class: "all-classes", ontoggle: update },
    h("summary", {}, `All logits (${counted(site.classes.length, "class", "classes")})`),
    h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Logits of all classes" }, table),
  );
  return { element: details, update };
}

/** @param {Explained} found @param {number} number @param {Float64Array} was */
function classRow(found, number, was) {
  const texts = ["", fixed(found.before[number], 3), "", percent(was[number])];
  const cells = texts.map((text) => h("td", { class: "number" }, text));
  return h("tr", { "data-class": number }, h("th", { scope: "row" }, classNamed(found, number)), cells);
}

// ---------------------------------------------------------------------------------------------- the local explanation

/** Contributions to the logit of a class, each with a slider. @param {Explained} found @returns {Part} */
function reasonsPart(found) {
  const [list, sum] = [h("ul", { class: "contributions" }), h("p", { class: "contributions-sum" })];
  const more = showAllButton(found.concepts.length, () => {
    all = true;
    fill();
    rows[FIRST_SHOWN].element.querySelector("a")?.focus();
  });
  /** @type {ContributionRow[]} */
  let rows = [];
  let all = false;
  const choice = reasonChoice(found, () => fill());
  const update = () => updateRows(found, choice.chosen(), rows, sum);
  const fill = () => {
    const order = contributionOrder(found, choice.chosen());
    rows = (all ? order : order.slice(0, FIRST_SHOWN)).map((at) => contributionRow(found, at, choice.chosen()));
    refill(list, rows.map((row) => row.element));
    more.hidden = all || order.length <= FIRST_SHOWN;
    update();
  };
  const title = h("h2", { id: "reasons-title" }, "Why");
  if (!found.concepts.length) {
    return { element: h("div", {}, title, note("No concept is active on this image, so all logits are 0.")), update };
  }
  fill();
  return { element: h("div", {}, title, choice.element, list, more, sum), update };
}

/** @typedef {{ number: number, minus: number | null, text: Child[] }} ChosenReason */

/** Which logit is explained: of any class, or how far the class that is predicted wrongly is ahead of the true one. It is that
 * of the class predicted without edits unless another is chosen. @param {Explained} found @param {() => void} changed */
function reasonChoice({ before, truth }, changed) {
  const first = predictedOf(before);
  const asked = currentRoute().params.get("of") ?? "";
  const option = (/** @type {string | number} */ value, /** @type {string} */ text) =>
    h("option", { value, selected: asked === String(value) }, shortened(text));
  const select = h("select", { onchange: () => (changeParam("of", select.value), changed()) });
  add(select, [option("", `the predicted class, ${site.classes[first]}`)]);
  const both = `predicted minus true, ${shortened(site.classes[first])} − ${site.classes[truth]}`;
  if (first !== truth) add(select, [option("difference", both)]);
  add(select, site.classes.map((name, number) => option(number, name)));
  /** @returns {ChosenReason} */
  const chosen = () => {
    const name = (/** @type {number} */ number) => named(site.classes[number]);
    if (select.value !== "difference") {
      const number = select.value === "" ? first : Number(select.value);
      return { number, minus: null, text: ["the logit of ", name(number)] };
    }
    return { number: first, minus: truth, text: ["the logit of ", name(first), " minus that of ", name(truth)] };
  };
  const about = "Each concept adds its strength times its weight for the class. A slider multiplies the strength. Such an " +
    "edit applies to every image.";
  const controls = h("div", { class: "controls" }, h("label", {}, "Logit of", select));
  return { element: h("div", {}, h("p", {}, about), controls), chosen };
}

/** A text that fits into a choice. @param {string} text */
function shortened(text) {
  return text.length > 80 ? `${text.slice(0, 79)}…` : text;
}

/** Places of the concepts by their contribution without edits, the largest in absolute value first: rows stay where they are
 * while a slider moves. @param {Explained} found @param {ChosenReason} chosen */
function contributionOrder({ concepts, strengths, weightOf }, { number, minus }) {
  const size = contributionsTo(concepts, strengths, weightOf, new Map(), number, minus).map(Math.abs);
  return [...concepts.keys()].sort((a, b) => size[b] - size[a] || a - b);
}

/** @typedef {{ element: HTMLElement, at: number, bar: HTMLElement, sum: HTMLElement, slider: HTMLInputElement,
 *   factor: HTMLElement, toggle: HTMLElement }} ContributionRow */

/** @param {Explained} found @param {number} at place among the active concepts @param {ChosenReason} chosen
 * @returns {ContributionRow} */
function contributionRow(found, at, chosen) {
  const concept = found.concepts[at];
  const label = found.labels[concept];
  const [bar, sum] = [h("span"), h("span", { class: "sum number" })];
  const factor = h("span", { class: "factor number", "aria-hidden": "true" });
  const slider = h("input", {
    type: "range", min: 0, max: MOST_FACTOR, step: 0.05, "aria-label": `Factor of ${label}`,
    oninput: () => found.edit(concept, Number(slider.value)),
  });
  const button = (/** @type {string} */ text, /** @type {string} */ said, /** @type {() => void} */ onclick) =>
    h("button", { type: "button", class: "quiet", "aria-label": said, onclick }, text);
  const toggle = button("Remove", "", () => found.edit(concept, found.edits.has(concept) ? 1 : 0));
  const link = h("a", { href: conceptLink(currentRoute(), concept) }, named(label));
  const element = h(
    "li", { "data-concept": concept },
    h("div", { class: "who" }, link), h("div", { class: "drawn", "aria-hidden": "true" }, bar), sum,
    h("div", { class: "slide" }, slider, factor),
    h(
      "div", { class: "buttons" }, toggle,
      button("Remove and measure", `Remove and measure accuracy: ${label}`, () => found.removeAndMeasure(concept)),
    ),
  );
  return { element, at, bar, sum, slider, factor, toggle };
}

/** @param {Explained} found @param {ChosenReason} chosen @param {ContributionRow[]} rows @param {HTMLElement} sum */
function updateRows({ concepts, strengths, weightOf, edits, labels }, { number, minus, text }, rows, sum) {
  const values = contributionsTo(concepts, strengths, weightOf, edits, number, minus);
  const full = values.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-30);
  for (const { at, bar, sum: line, slider, factor: said, element, toggle } of rows) {
    const factor = edits.get(concepts[at]) ?? 1;
    const weight = weightFor(weightOf(concepts[at]), number, minus);
    drawBar(bar, values[at] / full, true);
    const scaled = factor === 1 ? strength(strengths[at]) : `${strength(strengths[at])} × ${fixed(factor)}`;
    line.textContent = `${scaled} × ${fixed(weight, 3)} = ${fixed(values[at], 3)}`;
    if (Number(slider.value) !== factor || !said.textContent) slider.value = String(factor);
    slider.setAttribute("aria-valuetext", `${factor.toFixed(2)} times`);
    said.textContent = `${factor.toFixed(2)} ×`;
    element.classList.toggle("edited", factor !== 1);
    toggle.textContent = factor === 1 ? "Remove" : "Restore";
    toggle.setAttribute("aria-label", `${toggle.textContent} ${labels[concepts[at]]}`);
  }
  const total = values.reduce((a, b) => a + b, 0);
  const said = `${counted(values.length, "contribution adds", "contributions add")} up to `;
  refill(sum, said, h("strong", {}, fixed(total, 3)), ", ", text, ".");
}
