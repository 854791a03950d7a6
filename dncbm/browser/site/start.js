"use strict";
// The first page: what this is, how to read it, and what is known of the run as a whole.

/** Status of a claim -> its mark and the class that colours it. @type {Record<string, [string, string]>} */
const CLAIM_MARKS = { supported: ["✓", "yes"], "not supported": ["✗", "no"], "not tested": ["–", "open"] };
/** @type {View} */
async function showStart(route) {
  const run = site.runs[route.run];
  return h(
    "div", { class: "start" }, h("h1", {}, named(site.title)), h("p", { class: "lead" }, site.lead), startSearch(route),
    otherRuns(route), howToRead(run),
    h("h2", {}, site.runs.length > 1 ? ["This run: ", named(run.label)] : "This run"),
    run.missing.map(({ what, command }) => note(what, command)),
    h("div", { class: "columns" }, runFigures(run), verdictCounts(route, run)),
    claimList(run), shownDatasets(), howItWasMade(run), howToShare(),
  );
}

/** @param {Route} route */
function startSearch(route) {
  const search = h("input", { type: "search", autocomplete: "off", spellcheck: "false" });
  const submit = (/** @type {Event} */ event) => {
    event.preventDefault();
    go(linkTo(route, "concepts", { q: search.value.trim(), ...editsOf(route) }));
  };
  const n = site.runs[route.run].n_latents;
  const all = h("a", { href: linkTo(route, "concepts", editsOf(route)) }, `All ${counted(n, "concept")}`);
  return h(
    "form", { class: "controls", role: "search", onsubmit: submit },
    h("label", { class: "wide" }, "Search the concepts", search), h("button", { class: "main" }, "Search"), all,
  );
}

/** @param {Route} route */
function otherRuns(route) {
  if (site.runs.length === 1) return null;
  const items = site.runs.map((run, number) => {
    const here = number === route.run ? "page" : null;
    return h("li", {}, h("a", { href: linkTo({ run: number }, "start"), "aria-current": here }, named(run.label)));
  });
  const said = `This folder holds ${counted(site.runs.length, "run")}:`;
  return h("nav", { class: "runs", "aria-label": "Runs" }, said, h("ul", {}, items));
}

/** @param {Run} run */
function howToRead(run) {
  const names = run.has_names
    ? [" Each is named after the word whose text embedding is nearest to its direction. ",
      h("strong", {}, "A name is a guess"), ": look at the images that activate a concept before you believe it."]
    : " They have no names, so look at the images that activate them.";
  const probe = run.has_probe
    ? " A linear classifier adds up strength × weight, a concept's contribution to a class, over the concepts of an image."
      + " So you can take each prediction apart, remove a concept or scale its strength on every image, and see what changes."
    : "";
  return [
    h("h2", {}, "How to read this"),
    h("p", {}, "An image encoder turns an image into a vector whose numbers mean nothing by themselves. A sparse autoencoder"
      + " rewrites the vector as a sum of a few out of many directions, the concepts, each with a strength.", names, probe),
    h("p", {}, "Every view has its own address, and what you edit is part of it, so going back also takes back the edits made"
      + " since. Once the folder is on a web host, you can send these addresses to others. Press ",
      h("kbd", {}, "?"), " for the keyboard shortcuts."),
  ];
}

/** @param {Run} run */
function runFigures({ figures, n_silent, n_latents }) {
  const all = [...figures];
  if (n_silent !== null) {
    const silent = `${n_silent.toLocaleString("en")} of ${n_latents.toLocaleString("en")}`;
    all.push(["Concepts that no image of this folder activates", silent]);
  }
  const rows = all.map(([title, value]) => factRow(title, value));
  return h("section", {}, h("h3", {}, "Figures"), h("table", {}, h("tbody", {}, rows)));
}

/** @param {string} title @param {Child} value */
function factRow(title, value) {
  return h("tr", {}, h("th", { scope: "row" }, title), h("td", { class: "value" }, value));
}

/** @param {Route} route @param {Run} run */
function verdictCounts(route, run) {
  if (!run.has_names) return null;
  const rows = verdictsOf(run).map((verdict) => {
    const link = linkTo(route, "concepts", { verdict: verdict || "untested", ...editsOf(route) });
    return h(
      "tr", {}, h("th", { scope: "row" }, badge(verdict)),
      h("td", { class: "number" }, h("a", { href: link }, run.verdicts[verdict].toLocaleString("en"))),
      h("td", {}, CONCEPT_VERDICTS[verdict] ?? "Its name is the nearest word."),
    );
  });
  return h("section", {}, h("h3", {}, "Verdicts on the names"), h("table", {}, h("tbody", {}, rows)));
}

/** @param {Run} run */
function claimList({ claims, claims_made }) {
  if (!claims) return null; // `missing` says so
  const title = h("h2", {}, "What this run supports");
  const report = site.report ? h("a", { href: site.report }, "report") : "report";
  const items = claims.map(({ text, criterion, status, rests_on }) => {
    const [mark, kind] = CLAIM_MARKS[status] ?? CLAIM_MARKS["not tested"];
    return h(
      "li", { class: kind }, h("span", { class: "mark", "aria-hidden": "true" }, mark),
      h("div", {}, h("strong", { class: "status" }, status), ` · ${text}`, h("p", {}, rests_on),
        h("p", { class: "small" }, "Criterion: ", criterion)),
    );
  });
  const from = ["From the ", report, ` of ${claims_made} UTC. "Not supported" means that this run does not show it, `
    + "not that the opposite holds."];
  return [title, h("p", { class: "faint" }, from), h("ul", { class: "claims" }, items)];
}

function shownDatasets() {
  const rows = site.datasets.map(({ name, n, of, thumbnails, no_thumbnails, license }) => h(
    "tr", {}, h("th", { scope: "row" }, named(name)),
    h("td", {}, n < of ? `a sample of ${n.toLocaleString("en")} of ${counted(of, "image")}` : counted(n, "image"),
      thumbnails ? null : `. Not shown: ${no_thumbnails}`),
    h("td", {}, license ?? h("strong", {}, "Not stated. Check it before you publish this folder.")),
  ));
  const titles = ["Data set", `Images (${site.split})`, "Licence of the images"];
  const head = h("tr", {}, titles.map((text) => h("th", { scope: "col" }, text)));
  return [h("h2", {}, "Images"), scrolled("Images", h("table", {}, h("thead", {}, head), h("tbody", {}, rows)))];
}

/** A table that may be wider than the page; the focus on it lets the keyboard scroll it.
 * @param {string} label @param {HTMLTableElement} table */
function scrolled(label, table) {
  return h("div", { class: "scroll", role: "region", "aria-label": label, tabindex: 0 }, table);
}

/** @param {Run} run */
function howItWasMade({ name, settings, provenance }) {
  const versions = Object.entries(site.versions).map(([of, version]) => `${of} ${version}`).join(", ");
  const made = provenance.map(([artifact, when, hash]) => h(
    "tr", {}, h("th", { scope: "row" }, artifact), h("td", {}, when), h("td", {}, h("code", {}, hash)),
  ));
  const head = h("tr", {}, ["Made from", "On (UTC)", "Hash"].map((text) => h("th", { scope: "col" }, text)));
  const facts = [
    factRow("Written", `${site.made} UTC`), factRow("By", h("code", {}, site.command)), factRow("With", versions),
    factRow("Encoder", named(site.encoder)), factRow("SAE trained on", named(site.sae_dataset)),
    factRow("SAE", h("code", {}, name)),
  ];
  const artifacts = scrolled("Provenance", h("table", {}, h("thead", {}, head), h("tbody", {}, made)));
  return [
    h("h2", {}, "How it was made"), h("table", {}, h("tbody", {}, facts)),
    made.length ? h("details", {}, h("summary", {}, "Provenance"), artifacts) : null,
    settings.length
      ? h("details", {}, h("summary", {}, "Settings"), h("div", { class: "columns" }, settings.map(settingsTable)))
      : null,
  ];
}

/** @param {[string, [string, string][]]} table */
function settingsTable([title, rows]) {
  const lines = rows.map(([flag, value]) => factRow(flag, h("code", {}, value)));
  return h("table", {}, h("caption", {}, title), h("tbody", {}, lines));
}

function howToShare() {
  const unknown = site.datasets.filter(({ license, thumbnails }) => license === null && thumbnails);
  const check = unknown.length ? " The licence of some of the images is not stated: check it first." : null;
  return [
    h("h2", {}, "How to share it"),
    h("p", {}, "This folder is all there is. Copy it whole and open ", h("code", {}, "index.html"), ", or put it on any static"
      + " web host. It needs no server and loads nothing from elsewhere.", check),
  ];
}
