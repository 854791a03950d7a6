"use strict";
// One concept: what is known of its name, its images, the classes it votes for, and the concepts near it.

/** @typedef {{ route: Route, run: Run, concept: number, concepts: Concepts, details: ConceptDetails, row: number,
 *   dataset: number | null, tops: Tops | null }} ShownConcept */

/** What a verdict says. @type {Record<string, string>} */
const CONCEPT_VERDICTS = {
  named: "The word nearest to it stands out more than those of random directions do. That does not make the name right.",
  collision: "It holds a word, but another latent holds the same one.",
  abstains: "It is dead, or failed the test of whether it holds a word: its name is only the nearest word.",
};

/** @type {View} */
async function showConcept(route) {
  const run = site.runs[route.run];
  const concept = numberIn(route.parts[0], run.n_latents);
  if (concept === null) return noSuchConcept(route, run);
  const dataset = cardDataset(run);
  const [concepts, { details, row }, tops] = await Promise.all([
    /** @type {Promise<Concepts>} */ (ofRun(route.run, "concepts")),
    detailsOf(route.run, concept),
    dataset === null ? null : /** @type {Promise<Tops>} */ (ofRun(route.run, `tops_${dataset}`)),
  ]);
  const shown = { route, run, concept, concepts, details, row, dataset, tops };
  const edits = run.has_probe ? editPanel(route) : null;
  return h(
    "div", { class: "concept" }, conceptPager(shown), conceptHead(shown),
    h("p", { class: "actions" }, edits && removalButton(concept, edits), exampleLink(shown)),
    h("div", { class: "columns" }, nameSection(shown), evidenceSection(shown)),
    site.datasets.map((_, number) => datasetSection(shown, number)),
    votesSection(shown), neighboursSection(shown), edits,
  );
}

/** @param {Route} route @param {Run} run */
function noSuchConcept(route, run) {
  const all = h("a", { href: linkTo(route, "concepts", editsOf(route)) }, `All ${counted(run.n_latents, "concept")}`);
  return h("div", {}, h("h1", {}, "There is no such concept"), h("p", {}, all, `, numbered from 0 to ${run.n_latents - 1}.`));
}

/** The data set whose images stand for a concept, as in the list of concepts; null if there are none. @param {Run} run */
function cardDataset(run) {
  const dataset = shownDataset(run, new URLSearchParams());
  return run.has_strengths[dataset] && site.datasets[dataset].thumbnails ? dataset : null;
}

/** Whether a concept is known to be dead: it fires on no training image or, where that is not known, on no kept image.
 * @param {Concepts} concepts @param {number} concept */
function isDead(concepts, concept) {
  const [rate, activity] = [concepts.rate[concept], concepts.activity.row(concept)];
  const known = Number.isFinite(rate) ? [rate] : activity.filter(Number.isFinite);
  return known.length > 0 && known.every((share) => share === 0);
}

/** @param {ShownConcept} shown */
function conceptPager({ route, run, concept }) {
  return pager(route, concept, run.n_latents, {
    list: "concepts", label: "Concepts", one: "concept", path: "concepts", title: "Concepts",
    link: (other) => conceptLink(route, other),
  });
}

/** @param {ShownConcept} shown */
function conceptHead({ run, concept, concepts }) {
  const [rate, classes] = [concepts.rate[concept], concepts.n_classes[concept]];
  const facts = [
    `Latent ${concept} of ${run.n_latents.toLocaleString("en")}`,
    Number.isFinite(rate) && `active on ${shareOfImages(rate)} of the SAE's training images`,
    run.has_probe && classes > 0 && `among the ten leading concepts of ${counted(classes, "class", "classes")}`,
  ];
  return [
    h("h1", {}, named(concepts.labels[concept])),
    h("p", {}, run.has_names && [badge(concepts.verdicts[concept]), " "], facts.filter(Boolean).join(" · ")),
    isDead(concepts, concept)
      ? note(`This latent is dead: no ${Number.isFinite(rate) ? "training image" : "image here"} activates it.`) : null,
  ];
}

/** Remove it and show what that does to the accuracy, or restore it. @param {number} concept
 * @param {HTMLElement} edits the panel */
function removalButton(concept, edits) {
  const isEdited = () => readEdits(currentRoute()).has(concept);
  const title = () => (isEdited() ? "Restore this concept" : "Remove this concept and measure accuracy");
  const toggle = () => {
    const restores = isEdited();
    changeEdits(readEdits(currentRoute()).set(concept, restores ? 1 : 0));
    if (restores) return announce("Restored");
    edits.dispatchEvent(new Event("measure"));
    edits.scrollIntoView();
    edits.querySelector("h2")?.focus({ preventScroll: true });
  };
  const follow = () => refill(button, title());
  const button = h("button", { type: "button", class: "follows-edits", onclick: toggle, oneditschange: follow }, title());
  return button;
}

/** To the image that activates it most, where its strength can be changed. @param {ShownConcept} shown */
function exampleLink({ route, run, dataset, details, row }) {
  const from = run.has_probe ? site.probed : dataset;
  const image = from === null ? -1 : details.datasets[from].top.row(row)[0];
  return from !== null && image >= 0 && h("a", { href: imageLink(route, from, image) }, "See it on an image");
}

// ---------------------------------------------------------------------------------------------- its name, and evidence

/** Title, value and what it means. @typedef {[string, Child, string]} Fact */

/** What is known, each with what it means. @param {(Fact | false)[]} rows */
function factList(rows) {
  const known = /** @type {Fact[]} */ (rows.filter(Boolean));
  return h("dl", { class: "facts" }, known.map(([title, value, meaning]) => [
    h("dt", {}, title), h("dd", {}, value, h("span", { class: "meaning" }, meaning)),
  ]));
}

/** @param {ShownConcept} shown */
function nameSection({ route, run, concept, concepts }) {
  const heading = h("h2", {}, "Its name");
  if (!run.has_names) {
    return h("section", {}, heading, note("The list of names is missing.", run.commands.names));
  }
  const similarities = concepts.similarities.row(concept);
  const rows = concepts.words[concept].map((word, place) => ({
    label: h("a", { href: searchLink(route, word) }, named(word)), value: similarities[place],
  }));
  const measured = rows.filter(({ value }) => Number.isFinite(value));
  return h(
    "section", {}, heading,
    measured.length ? bars("Nearest words, by cosine similarity", measured, { most: 1 }) : null,
    factList(nameFacts(route, concepts, concept)),
  );
}

/** @param {Route} route @param {Concepts} concepts @param {number} concept @returns {(Fact | false)[]} */
function nameFacts(route, concepts, concept) {
  const [q, z, margin] = [concepts.q[concept], concepts.z[concept], concepts.margin[concept]];
  const [shared, verdict, other] = [concepts.shared[concept], concepts.verdicts[concept], concepts.alternatives[concept]];
  const tested = concepts.tested[concept];
  const same = h("a", { href: searchLink(route, concepts.names[concept]) }, counted(shared, "latent"));
  return [
    verdict !== "" && ["Verdict", badge(verdict), CONCEPT_VERDICTS[verdict]],
    tested !== "" && tested !== concepts.names[concept] && ["Tested word", named(tested),
      "The nearest one once words and latents are centred, which verdict, q-value and z are about."],
    Number.isFinite(q) && ["q-value", smallNumber(q),
      "Of all names with a q this low or lower, about this share belong to directions that hold no word."],
    Number.isFinite(z) && ["z", fixed(z, 1), "How far the tested word stands out of all words, in standard deviations."],
    Number.isFinite(margin) && ["Margin", fixed(margin, 3), "How much nearer its name is than the second word (cosine)."],
    shared > 1 && ["Same name", same, "This many latents have this name, this one included."],
    other !== "" && ["More specific", named(other), "Of its nearest words, the one that the fewest other latents are near."],
  ];
}

/** @param {Route} route @param {string} word */
function searchLink(route, word) {
  return linkTo(route, "concepts", { q: word, ...editsOf(route) });
}

/** @param {ShownConcept} shown */
function evidenceSection({ run, concept, concepts }) {
  const known = evidenceFacts(concepts, concept).filter(Boolean);
  const { evidence_dataset: from } = concepts;
  return h(
    "section", {}, h("h2", {}, "Evidence"),
    from !== "" && known.length > 0 &&
      h("p", { class: "faint" }, "Names and MonoScore were tested on images of ", named(from), "."),
    known.length ? factList(known) : note(run.has_names ? "Only its name was assessed." : "Nothing was assessed."),
  );
}

/** @param {Concepts} concepts @param {number} concept @returns {(Fact | false)[]} */
function evidenceFacts(concepts, concept) {
  const [auc, q, agrees] = [concepts.auc[concept], concepts.auc_q[concept], concepts.wpmi_agrees[concept]];
  const [word, mono, stable] = [concepts.wpmi_words[concept], concepts.monoscore[concept], concepts.stability[concept]];
  const agreement = agrees === 1 ? " – the same word" : agrees === 0 ? " – another word" : "";
  return [
    Number.isFinite(auc) && ["AUC of the name", [fixed(auc), Number.isFinite(q) && ` (q ${smallNumber(q)})`],
      "How well its name tells the images that activate it from the others: 0.5 is chance, 1 is perfect. " +
      "A small q means better than a random word, not that the word is right."],
    word !== "" && ["Second name", [named(word), agreement],
      "The word that CLIP-Dissect (soft-WPMI) gives its strongest images."],
    Number.isFinite(mono) && ["MonoScore", fixed(mono),
      "How alike the images are that activate it: mean cosine of pairs, weighted by strength."],
    Number.isFinite(stable) && ["Stability", fixed(stable),
      "Mean cosine with its matches in SAEs of other seeds: near 1, every seed finds it again."],
  ];
}

// ---------------------------------------------------------------------------------------------------------- its images

/** @param {ShownConcept} shown @param {number} number of the data set */
function datasetSection({ route, run, concept, concepts, details, row }, number) {
  const { name, n, of, thumbnails, no_thumbnails } = site.datasets[number];
  const most = concepts.most.row(concept)[number];
  const heading = h("h2", {}, "Images of ", named(name));
  const kept = `the ${counted(n, "image")}${n < of ? ` kept (of ${of.toLocaleString("en")})` : ""}`;
  if (!run.has_strengths[number]) return h("section", {}, heading, note("This run has no strengths of this data set."));
  if (!(most > 0)) return h("section", {}, heading, note(`It is active on none of ${kept}.`));
  const { top, top_strengths, sampled, sampled_strengths, histogram: counts } = details.datasets[number];
  const strengths = top_strengths.row(row);
  const drawn = {
    route, number, most, images: sampled.row(row), strengths: sampled_strengths.row(row), counts: counts.row(row),
  };
  const [share, mean] = [shareOfImages(concepts.activity.row(concept)[number]), strength(concepts.mean.row(concept)[number])];
  return h(
    "section", {}, heading,
    h("p", {}, `Active on ${share} of ${kept}. Largest strength ${strength(most)}, mean ${mean}.`),
    thumbnails ? null : note(`There are no pictures. ${no_thumbnails}`),
    h("h3", {}, "Strongest"),
    gallery(route, number, top.row(row), `Strongest images of ${name}`, (place) => strength(strengths[place])),
    h("div", { class: "range" }, rangeParts(drawn),
      h("div", {}, h("h3", {}, "How strengths are distributed"), histogram("images", drawn.counts, most))),
  );
}

/** Images from equal parts of the range of strengths, the highest first. @param {{ route: Route, number: number, most: number,
 *   images: Int32Array, strengths: Float32Array, counts: Int32Array }} drawn */
function rangeParts({ route, number, most, images, strengths, counts }) {
  const n_parts = site.range_parts;
  const [each, bins] = [images.length / n_parts, counts.length / n_parts];
  const parts = Array.from({ length: n_parts }, (_, part) => {
    const [start, below] = [part * each, n_parts - 1 - part];
    const range = `${strength((most * below) / n_parts)}–${strength((most * (below + 1)) / n_parts)}`;
    const n = counts.subarray(below * bins, (below + 1) * bins).reduce((sum, one) => sum + one, 0);
    const drawn = images.subarray(start, start + each);
    return h(
      "div", { class: "part" }, h("p", {}, range, h("span", { class: "below" }, counted(n, "image"))),
      n ? gallery(route, number, drawn, `Strengths ${range}`, (place) => strength(strengths[start + place])) : null,
    );
  });
  return h("div", {}, h("h3", {}, "Over the whole range, drawn at random"), h("div", { class: "parts" }, parts));
}

// ------------------------------------------------------------------------------------------- its classes and neighbours

/** @param {ShownConcept} shown */
function votesSection({ route, run, details, row }) {
  if (!run.has_probe) {
    const missing = note("The probe is missing, so it votes for no class.", run.commands.probe);
    return h("section", {}, h("h2", {}, "Classes"), missing);
  }
  const { for_classes, for_weights, against_classes, against_weights } = details;
  return h(
    "section", {}, h("h2", {}, "Classes"),
    h("p", { class: "faint" }, "The probe's weight is what a strength of 1 adds to the logit of a class."),
    h("div", { class: "columns" },
      classBars(route, "Votes for", for_classes.row(row), for_weights.row(row)),
      classBars(route, "Votes against", against_classes.row(row), against_weights.row(row))),
  );
}

/** @param {Route} route @param {string} title @param {Int32Array} classes @param {Float32Array} weights */
function classBars(route, title, classes, weights) {
  const rows = [...classes].flatMap((number, place) => number < 0 ? [] : [{
    label: h("a", { href: classLink(route, number) }, named(site.classes[number])), value: weights[place],
  }]);
  return h("div", {}, rows.length ? bars(title, rows, { text: (value) => fixed(value, 3) }) : note(`${title} no class.`));
}

/** @param {ShownConcept} shown */
function neighboursSection(shown) {
  const { row, run, details: { alike, alike_cosine, together, together_share } } = shown;
  const [cosines, shares] = [alike_cosine.row(row), together_share.row(row)];
  const from = site.datasets[run.has_probe ? Number(site.probed) : run.has_strengths.indexOf(true)];
  const which = from && [" of ", named(from.name)];
  const meaning = ["Of the images", which, " where one of the two is active, both are in this share."];
  return h(
    "section", {}, h("h2", {}, "Concepts near it"),
    h("h3", {}, "Most alike"), h("p", { class: "faint" }, "By the cosine of their decoder columns."),
    neighbours(shown, "Most alike", alike.row(row), (place) => fixed(cosines[place])),
    h("h3", {}, "Most often active together"), h("p", { class: "faint" }, meaning),
    neighbours(shown, "Most often active together", together.row(row), (place) => percent(shares[place])),
  );
}

/** Concepts as links, with a line below each. @param {ShownConcept} shown @param {string} label @param {Int32Array} found
 * @param {(place: number) => string} below */
function neighbours({ route, concepts, dataset, tops }, label, found, below) {
  const items = [...found].flatMap((concept, place) => concept < 0 ? [] : [h(
    "li", {},
    h("a", { href: conceptLink(route, concept), "data-item": true },
      tops && topPictures(tops, dataset, concept, 1), named(concepts.labels[concept])),
    h("span", { class: "below" }, below(place)),
  )]);
  return items.length ? h("ul", { class: "neighbours arrows", "aria-label": label }, items) : note("There are none.");
}

/** The first of a concept's strongest images, beside its name. @param {Tops} tops @param {number | null} dataset
 * @param {number} concept @param {number} n */
function topPictures(tops, dataset, concept, n) {
  const images = [...tops.images.row(concept).subarray(0, n)].filter((image) => image >= 0);
  return h("span", { class: "pictures", "aria-hidden": "true" }, images.map((image) => picture(Number(dataset), image, "")));
}
