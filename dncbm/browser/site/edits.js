"use strict";
// Edits of concept strengths: in the address, what they do to logits and accuracy, and the panel that lists them.

/** Largest factor of a strength. */
const MOST_FACTOR = 2;

// ------------------------------------------------------------------------------------------------------ the address

/** The edits of an address, `edit=12:0,40:1.5`, by concept; parts that say nothing sensible are ignored.
 * @param {Pick<Route, "run" | "params">} route @returns {Edits} */
function readEdits(route) {
  const found = new Map();
  for (const part of (route.params.get("edit") ?? "").split(",")) {
    const [, text, factor] = part.match(/^(\d{1,9}):(\d(?:\.\d{1,4})?)$/) ?? [];
    const concept = numberIn(text, site.runs[route.run].n_latents);
    if (concept !== null && Number(factor) <= MOST_FACTOR) found.set(concept, Number(factor));
  }
  return tidied(found);
}

/** @param {Edits} edits @returns {Edits} ascending, without factors of 1 */
function tidied(edits) {
  return new Map([...edits].filter(([, factor]) => factor !== 1).sort(([a], [b]) => a - b));
}

/** Edits as the address holds them. @param {Edits} edits */
function editText(edits) {
  return [...tidied(edits)].map(([concept, factor]) => `${concept}:${factor}`).join(",");
}

/** Write edits to the address of what is shown. @param {Edits} edits */
function changeEdits(edits) {
  changeParam("edit", editText(edits));
}

/** Write to the address of what is shown. @param {string} name @param {string} value */
function changeParam(name, value) {
  if (isLeft()) return;
  const route = currentRoute();
  route.params.set(name, value);
  replaceAddress(linkTo(route, [route.view, ...route.parts].join("/"), route.params));
}

/** Whether what is shown was left: the address is that of the next view, which still loads. */
function isLeft() {
  return byId("content").hasAttribute("aria-busy");
}

/** Whether the address is a view's own. @param {Route} route of the view */
function isShown({ view, parts, run }) {
  const now = currentRoute();
  return now.view === view && now.run === run && now.parts.join("/") === parts.join("/");
}

/** Links of this run take the edits along, and what shows edits follows them. */
function followEdits() {
  const { run, params } = currentRoute();
  for (const link of document.querySelectorAll("a[href^='#/']")) {
    const [path, query] = (link.getAttribute("href") ?? "").slice(2).split("?");
    const own = new URLSearchParams(query ?? "");
    if (Number(own.get("run") ?? 0) !== run) continue;
    own.set("edit", params.get("edit") ?? "");
    link.setAttribute("href", linkTo({ run }, path, own));
  }
  for (const shows of document.querySelectorAll(".follows-edits")) shows.dispatchEvent(new Event("editschange"));
}
document.addEventListener("addresschange", followEdits);

// --------------------------------------------------------------------------------------------------- the arithmetic

/**
 * Logits of an image: the sum over its active concepts of strength * factor * weight.
 * @param {ArrayLike<number>} concepts that are active @param {ArrayLike<number>} strengths of these
 * @param {(concept: number) => Float32Array} weightOf @param {number} nClasses @param {Edits} edits
 */
function logitsOf(concepts, strengths, weightOf, nClasses, edits) {
  const logits = new Float64Array(nClasses);
  for (let place = 0; place < concepts.length; place++) {
    const scaled = strengths[place] * (edits.get(concepts[place]) ?? 1);
    if (!scaled) continue;
    const weight = weightOf(concepts[place]);
    for (let number = 0; number < nClasses; number++) logits[number] += scaled * weight[number];
  }
  return logits;
}

/** Probabilities of the classes. @param {Float64Array} logits */
function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = logits.map((logit) => Math.exp(logit - most));
  const total = powers.reduce((a, b) => a + b, 0);
  return powers.map((power) => power / total);
}

/** The class of the largest logit; of equal ones the lowest. @param {ArrayLike<number>} logits */
function predictedOf(logits) {
  let best = 0;
  for (let number = 1; number < logits.length; number++) if (logits[number] > logits[best]) best = number;
  return best;
}

/**
 * What each active concept adds to the logit of a class; with `minus`, to its logit minus that of another class.
 * @param {ArrayLike<number>} concepts @param {ArrayLike<number>} strengths @param {(concept: number) => Float32Array} weightOf
 * @param {Edits} edits @param {number} number @param {number | null} [minus]
 */
function contributionsTo(concepts, strengths, weightOf, edits, number, minus = null) {
  return Float64Array.from(concepts, (concept, place) => {
    const factor = edits.get(concept) ?? 1;
    return strengths[place] * factor * weightFor(weightOf(concept), number, minus);
  });
}

/** @param {Float32Array} weight @param {number} number @param {number | null} minus */
function weightFor(weight, number, minus) {
  return weight[number] - (minus === null ? 0 : weight[minus]);
}

// ------------------------------------------------------------------------------------------------------ the accuracy

/** Accuracy of some images without and with edits; `of` names the class that is meant, where it may be another.
 * @typedef {{ name: string, n: number, before: number, after: number, of?: [string, string] }} Accuracy */

/**
 * Accuracy of the kept images of the probed data set without and with edits, and how many predictions differ.
 * @param {Route} route @param {Edits} edits @param {(done: number, of: number) => void} [onProgress] in images
 * @param {AbortSignal} [signal] it rejects once this is aborted
 * @returns {Promise<{ changed: number, rows: Accuracy[] }>}
 */
async function accuracyWith(route, edits, onProgress, signal) {
  const { run } = route;
  const dataset = Number(site.probed);
  const { n } = site.datasets[dataset];
  /** @type {[Images, Predictions, (concept: number) => Float32Array]} */
  const [images, { predicted }, weightOf] = await Promise.all([
    chunk(`images_${dataset}`), ofRun(run, "predictions"), weightsOf(run),
  ]);
  const after = predicted.slice();
  for (let first = 0; first < n; first += site.per_chunk.images) {
    signal?.throwIfAborted();
    /** @type {Strengths} */
    const strengths = await ofRun(run, `strengths_${dataset}_${first / site.per_chunk.images}`);
    predictAgain(strengths, weightOf, edits, after.subarray(first, first + site.per_chunk.images));
    onProgress?.(Math.min(first + site.per_chunk.images, n), n);
    await new Promise((resolve) => setTimeout(resolve)); // the page stays responsive
  }
  signal?.throwIfAborted();
  const changed = after.filter((number, image) => number !== predicted[image]).length;
  return { changed, rows: accuracies(images, predicted, after) };
}

/** Predict the images of a chunk on which an edited concept is active; the others keep what they have.
 * @param {Strengths} chunk @param {(concept: number) => Float32Array} weightOf @param {Edits} edits
 * @param {Int32Array} predicted it is changed */
function predictAgain({ indptr, indices, values }, weightOf, edits, predicted) {
  for (let image = 0; image < predicted.length; image++) {
    const concepts = indices.subarray(indptr[image], indptr[image + 1]);
    if (!concepts.some((concept) => edits.has(concept))) continue;
    const strengths = values.subarray(indptr[image], indptr[image + 1]);
    predicted[image] = predictedOf(logitsOf(concepts, strengths, weightOf, site.classes.length, edits));
  }
}

/** Overall, and of each group; without groups, the mean and the worst of the classes.
 * @param {Images} images @param {Int32Array} before @param {Int32Array} after @returns {Accuracy[]} */
function accuracies({ label, group }, before, after) {
  const everyone = new Int32Array(label.length);
  const overall = accuraciesBy(everyone, ["Overall"], label, before, after);
  if (site.groups.length && group.length) return [...overall, ...accuraciesBy(group, site.groups, label, before, after)];
  const classes = accuraciesBy(label, site.classes, label, before, after).filter(({ n }) => n);
  if (classes.length < 2) return overall;
  const mean = (/** @type {"before" | "after"} */ when) => classes.reduce((sum, one) => sum + one[when], 0) / classes.length;
  const worst = (/** @type {"before" | "after"} */ when) => classes.reduce((a, b) => (b[when] < a[when] ? b : a));
  const [was, is] = [worst("before"), worst("after")];
  return [
    ...overall,
    { name: "Mean over classes", n: label.length, before: mean("before"), after: mean("after") },
    { name: "Worst class", n: NaN, before: was.before, after: is.after, of: [was.name, is.name] },
  ];
}

/** @param {Int32Array} part of each image @param {string[]} names of the parts
 * @param {Int32Array} label @param {Int32Array} before @param {Int32Array} after @returns {Accuracy[]} */
function accuraciesBy(part, names, label, before, after) {
  const [n, was, is] = [0, 1, 2].map(() => new Float64Array(names.length));
  label.forEach((number, image) => {
    n[part[image]] += 1;
    was[part[image]] += Number(before[image] === number);
    is[part[image]] += Number(after[image] === number);
  });
  return names.map((name, one) => ({ name, n: n[one], before: was[one] / n[one], after: is[one] / n[one] }));
}

// --------------------------------------------------------------------------------------------------------- the panel

/** All edits, in a view of their own. @type {View} */
async function showEdits(route) {
  if (!site.runs[route.run].has_probe) return noProbe(route, "What is edited");
  return h("div", {}, h("h1", {}, "What is edited"), editPanel(route));
}

/** A note for figures that edits do not change; nothing if there are no edits. @param {Route} route */
function withoutEdits(route) {
  return readEdits(route).size ? note("All figures on this page are without edits.") : null;
}

/** How many concepts are edited, as a link to them; nothing if none is. */
function editCount() {
  const count = h("span", { class: "edit-count follows-edits", oneditschange: () => update() });
  const update = () => {
    const route = currentRoute();
    const { size } = readEdits(route);
    const link = size && h("a", { href: linkTo(route, "edits", editsOf(route)) }, `${counted(size, "concept")} edited`);
    refill(count, link || null);
  };
  update();
  return count;
}

/** What is edited, what that does to the accuracy, and the edits as a list for 13_intervene.py. @param {Route} route */
function editPanel(route) {
  const [list, result, exported] = [h("div"), h("div", { class: "accuracy-result" }), h("div")];
  const title = h("h2", { id: "edits-title", tabindex: -1 }, "Edits");
  let text = "";
  let stop = new AbortController();
  const update = async () => {
    const edits = readEdits(currentRoute());
    if (!isShown(route) || editText(edits) === text) return;
    text = editText(edits);
    stop.abort();
    refill(result);
    /** @type {Concepts} */
    const concepts = await ofRun(route.run, "concepts");
    if (text !== editText(edits)) return; // changed meanwhile
    const hadFocus = list.contains(document.activeElement);
    refill(list, edits.size ? editList(edits, concepts, measure) : noEdits());
    if (hadFocus) title.focus();
    const open = exported.querySelector("details")?.open;
    refill(exported, edits.size ? exportPart(route, edits, concepts, open) : null);
  };
  const measure = () => {
    const edits = readEdits(currentRoute());
    if (!edits.size || isLeft()) return;
    stop.abort();
    stop = new AbortController();
    showAccuracy(route, edits, result, stop);
  };
  refill(list, noEdits());
  update();
  const props = { class: "edits follows-edits", "aria-labelledby": "edits-title", oneditschange: update, onmeasure: measure };
  return h("section", props, title, list, result, exported);
}

function noEdits() {
  return note(
    "No concept is edited. Remove a concept on its own page, or on that of an image, where sliders also scale its strength. " +
      "Edits are part of the address, so you can send them.",
  );
}

/** @param {Edits} edits @param {Concepts} concepts @param {() => void} measure */
function editList(edits, concepts, measure) {
  const rows = [...edits].map(([concept, factor]) => {
    const restore = () => changeEdits(readEdits(currentRoute()).set(concept, 1));
    const label = concepts.labels[concept];
    return h(
      "li", {}, h("a", { href: conceptLink(currentRoute(), concept) }, named(label)),
      h("span", { class: "factor" }, factor ? `× ${fixed(factor)}` : "removed"),
      h("button", { type: "button", onclick: restore, "aria-label": `Remove this edit of ${label}` }, "Remove this edit"),
    );
  });
  return [
    h("ul", { class: "edit-list" }, rows),
    h(
      "div", { class: "actions" },
      h("button", { type: "button", class: "main", onclick: measure }, "Accuracy of the split with these edits"),
      h("button", { type: "button", onclick: () => changeEdits(new Map()) }, "Restore all"), linkButton(),
    ),
  ];
}

/** Copies a text; where the browser forbids that, as in a frame, it selects the text in a field instead.
 * @param {string} title @param {() => string} text @param {HTMLInputElement | HTMLTextAreaElement} field */
function copyButton(title, text, field) {
  const button = h("button", { type: "button", onclick: async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Now copy what is selected";
      field.hidden = false;
      field.value = text();
      field.select();
    }
    announce(button.textContent);
    setTimeout(() => (button.textContent = title), 2500);
  } }, title);
  return button;
}

/** Copies the address of what is shown, which a site within the frame of another does not show. */
function linkButton() {
  const field = h("input", { readonly: true, hidden: true, "aria-label": "Link to what is shown" });
  return [copyButton("Copy the link", () => location.href, field), field];
}

/** Compute the accuracy, with its progress and a way to stop. Leaving the view stops it, too.
 * @param {Route} route @param {Edits} edits @param {HTMLElement} result @param {AbortController} stop */
async function showAccuracy(route, edits, result, stop) {
  const abort = () => stop.abort();
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Images predicted again" });
  const done = h("span", { class: "number" });
  const cancel = h("button", { type: "button", onclick: abort }, "Cancel");
  refill(result, h("div", { class: "actions" }, bar, done, cancel));
  addEventListener("hashchange", abort);
  announce("Computing the accuracy.");
  try {
    const found = await accuracyWith(route, edits, (images, of) => {
      bar.value = images / of;
      done.textContent = `${images.toLocaleString("en")} of ${counted(of, "image")}`;
    }, stop.signal);
    replaceProgress(result, bar, accuracyTable(found));
    const [{ before, after }] = found.rows;
    announce(`Accuracy: ${percent(before)} before, ${percent(after)} with these edits.`);
  } catch (error) {
    const problem = error instanceof Error ? error.message : String(error);
    replaceProgress(result, bar, stop.signal.aborted ? null : note(problem));
  } finally {
    removeEventListener("hashchange", abort);
  }
}

/** Show what came of it where the progress was; the focus does not get lost. @param {HTMLElement} result
 * @param {HTMLElement} bar of the progress @param {Child} found */
function replaceProgress(result, bar, found) {
  if (!result.contains(bar)) return; // another computation has begun
  const hadFocus = result.contains(document.activeElement);
  refill(result, found);
  const next = result.querySelector(".scroll") ?? result.parentElement?.querySelector("button.main");
  if (hadFocus && next instanceof HTMLElement) next.focus();
}

/** @param {{ changed: number, rows: Accuracy[] }} found */
function accuracyTable({ changed, rows }) {
  const { n, of, name } = site.datasets[Number(site.probed)];
  const lines = rows.map((row) => {
    const cell = (/** @type {Child[]} */ ...children) => h("td", { class: "number" }, children);
    const whose = (/** @type {0 | 1} */ when) => row.of && h("div", { class: "faint whose" }, named(row.of[when]));
    const more = 100 * (row.after - row.before);
    return h(
      "tr", {}, h("th", { scope: "row" }, named(row.name)), cell(Number.isNaN(row.n) ? "" : row.n.toLocaleString("en")),
      cell(percent(row.before), whose(0)), cell(percent(row.after), whose(1)), cell(more >= 0.05 ? "+" : "", fixed(more, 1)),
    );
  });
  const head = (/** @type {string} */ text) => h("th", { scope: "col", class: text === "Part" ? null : "number" }, text);
  const heads = ["Part", "Images", "Before", "After", "Change in points"].map(head);
  const kept = n < of ? `${n.toLocaleString("en")} of ${counted(of, "image")}` : counted(n, "image");
  return [
    h(
      "div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Accuracy with these edits" },
      h(
        "table", { class: "accuracy" }, h("caption", {}, `Accuracy on ${name} (${site.split}), ${kept}`),
        h("thead", {}, h("tr", {}, heads)), h("tbody", {}, lines),
      ),
    ),
    h("p", {}, `${counted(changed, "prediction differs", "predictions differ")}.`),
  ];
}

// -------------------------------------------------------------------------------------------------------- the export

/** The edits as a list that 13_intervene.py reads, and the name of the file.
 * @param {Route} route @param {Edits} edits @param {Concepts} concepts */
function conceptList(route, edits, concepts) {
  const all = [...edits];
  const removes = all.every(([, factor]) => factor === 0);
  const file = removes ? "removed_concepts.txt" : "scaled_concepts.txt";
  const command = `${site.runs[route.run].commands.intervene} ${removes ? "--remove" : "--scale"} ${file}`;
  const said = removes ? "Concepts that are removed" : "Concepts and the factors of their strengths";
  const about = `# ${said}, from the browser of ${site.title}. Run: ${command}`.replace(/\s+/g, " ");
  const spelled = (/** @type {number} */ concept) =>
    site.runs[route.run].has_names ? (concepts.spellings[concept] ?? concepts.labels[concept]) : String(concept);
  const lines = all.map(([concept, factor]) => (removes ? spelled(concept) : `${spelled(concept)},${factor}`));
  return { file, text: [about, ...lines, ""].join("\n") };
}

/** @param {Route} route @param {Edits} edits @param {Concepts} concepts @param {boolean} [open] */
function exportPart(route, edits, concepts, open) {
  const { file, text } = conceptList(route, edits, concepts);
  const area = h("textarea", { readonly: true, rows: Math.min(edits.size + 5, 12), "aria-label": "List of concepts" }, text);
  return h(
    "details", { class: "export", open }, h("summary", {}, "Export as a list of concepts"),
    h("p", {}, h("code", {}, "scripts/13_intervene.py"), " reads this list; it also refits the probe and tries random edits."),
    area,
    h(
      "div", { class: "actions" },
      h("button", { type: "button", onclick: () => download(file, text) }, `Download ${file}`),
      copyButton("Copy the list", () => text, area),
    ),
  );
}

/** @param {string} file @param {string} text */
function download(file, text) {
  const href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  h("a", { href, download: file }).click();
  setTimeout(() => URL.revokeObjectURL(href), 10_000);
}
