"use strict";
// Which view is shown, the bar above it, and the keys that work everywhere.

/** @type {Record<string, View>} */
const VIEWS = {
  start: showStart,
  concepts: showConcepts,
  concept: showConcept,
  classes: showClasses,
  class: showClass,
  image: showImage,
  edits: showEdits,
  runs: showRuns,
};
/** Keys and what they do, for the help. */
const KEYS = [
  ["/", "search"],
  ["← ↑ → ↓", "move in a list; in a view of one thing, ← and → show the one before and after"],
  ["Enter", "open"],
  ["Esc", "leave the search or the help; then back to the list"],
  ["?", "this help"],
];
let shown = 0;

/** @param {string} id */
function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

async function show() {
  const [turn, route, place] = [++shown, currentRoute(), history.state];
  const main = byId("content");
  main.setAttribute("aria-busy", "true");
  /** @type {HTMLElement} */
  let found;
  try {
    found = await (Object.hasOwn(VIEWS, route.view) ? VIEWS[route.view] : showNothing)(route);
  } catch (error) {
    found = h("div", {}, h("h1", {}, "This cannot be shown"), failure(error, show), toStart(route));
    console.error(error);
  }
  if (turn !== shown) return; // another view was asked for meanwhile
  main.replaceChildren(found);
  main.removeAttribute("aria-busy");
  showBar(route);
  const heading = found.querySelector("h1");
  document.title = [...new Set([heading?.textContent, site.title])].filter(Boolean).join(" · ");
  heading?.setAttribute("tabindex", "-1");
  scrollTo(0, place?.y ?? 0);
  const asked = found.querySelector("[data-focus]");
  const first = found.querySelectorAll("[data-item]")[place?.item ?? -1] ?? asked;
  if (first instanceof HTMLElement) first.focus({ preventScroll: true });
  if (first && first === asked && !place) first.scrollIntoView({ block: "center" });
  else if (turn > 1) heading?.focus({ preventScroll: true });
  main.dataset.shown = location.hash || "#/start";
}

/** @type {View} */
async function showNothing(route) {
  return h("div", {}, h("h1", {}, "There is no such page"), toStart(route));
}

/** @param {Route} route */
function toStart(route) {
  return h("p", {}, "Go to ", h("a", { href: linkTo(route, "start", editsOf(route)) }, "Start"), ".");
}

/** @param {unknown} error @param {() => void} again */
function failure(error, again) {
  const retry = h("button", { type: "button", onclick: again }, "Try again");
  return [note(error instanceof Error ? error.message : String(error)), h("p", {}, retry)];
}

/** @param {Route} route */
function showBar(route) {
  const run = site.runs[route.run];
  const views = [["start", "Start"], ["concepts", "Concepts"]];
  if (run.has_probe) views.push(["classes", "Classes"]);
  if (site.runs.length > 1) views.push(["runs", "Runs"]);
  const here = /** @type {Record<string, string>} */ ({ concept: "concepts", class: "classes" })[route.view] ?? route.view;
  refill(
    byId("nav"),
    views.map(([view, title]) =>
      h("a", { href: linkTo(route, view, editsOf(route)), "aria-current": view === here ? "page" : null }, title),
    ),
  );
  const runs = h(
    "select", { id: "run", onchange: () => changeRun(currentRoute(), Number(runs.value)) },
    site.runs.map((one, number) => h("option", { value: number, selected: number === route.run }, one.label)),
  );
  const choice = site.runs.length > 1 && route.view !== "runs" ? h("label", {}, "Run ", runs) : null;
  const about = { type: "button", class: "quiet", "aria-label": "Keyboard shortcuts", title: "Keyboard shortcuts (?)" };
  const help = h("button", { ...about, onclick: showHelp }, "?");
  refill(byId("tools"), run.has_probe && editCount(), choice, help);
}

/** The same view of another run. Concepts differ from run to run, so that of one concept becomes all of them.
 * @param {Route} route @param {number} run */
function changeRun(route, run) {
  const path = route.view === "concept" ? "concepts" : [route.view, ...route.parts].join("/");
  route.params.delete("edit");
  go(linkTo({ run }, path, route.params));
}

function showHelp() {
  const help = /** @type {HTMLDialogElement} */ (byId("help"));
  const rows = KEYS.map(([key, what]) => [h("dt", {}, h("kbd", {}, key)), h("dd", {}, what)]);
  const close = h("button", { type: "button", onclick: () => help.close() }, "Close");
  const actions = h("div", { class: "actions" }, close, linkButton());
  refill(help, h("h2", { id: "help-title" }, "Keyboard shortcuts"), h("dl", {}, rows), actions);
  help.showModal();
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  const target = /** @type {HTMLElement} */ (event.target);
  const typing = target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (/** @type {HTMLDialogElement} */ (byId("help")).open) return;
  if (event.key === "Escape") {
    event.preventDefault(); // it would clear the search
    return leave(target);
  }
  if (typing || event.defaultPrevented || (event.shiftKey && event.key.startsWith("Arrow"))) return; // shift selects
  if (event.key === "/") {
    const search = document.querySelector("input[type=search]");
    if (search instanceof HTMLInputElement) search.select();
    else go(linkTo(currentRoute(), "concepts", { ...editsOf(currentRoute()), focus: "search" }));
  } else if (event.key === "?") showHelp();
  else if (!event.key.startsWith("Arrow") || !(moveFocus(target, event.key) || turnPage(target, event.key))) return;
  event.preventDefault();
}

/** Show what is before or after: from a list only its own pages, and nothing where the key scrolls or text is selected.
 * Returns whether it does. @param {HTMLElement} target @param {string} key */
function turnPage(target, key) {
  const rel = { ArrowLeft: "prev", ArrowRight: "next" }[key];
  const inList = target.closest(".arrows");
  if (!rel || !getSelection()?.isCollapsed || (!inList && target.closest(".scroll, summary"))) return false;
  const other = document.querySelector(`${inList ? ".pages " : ""}a[rel=${rel}]`);
  if (other instanceof HTMLElement) other.click();
  return Boolean(other);
}

/** @param {HTMLElement} target */
function leave(target) {
  const up = document.querySelector("a[rel=up]");
  if (target.matches("input, select, textarea")) target.blur();
  else if (up instanceof HTMLElement) up.click();
}

/** Move the focus within a list with the class "arrows". Returns whether it moved.
 * @param {HTMLElement} target @param {string} key */
function moveFocus(target, key) {
  const list = target.closest(".arrows");
  if (!list) return false;
  const items = /** @type {HTMLElement[]} */ ([...list.querySelectorAll("[data-item]")]);
  const place = items.findIndex((item) => item.contains(target));
  if (place < 0) return false;
  const step = key === "ArrowLeft" ? -1 : key === "ArrowRight" ? 1 : 0;
  const next = step ? items[place + step] : besides(items, items[place], key === "ArrowDown" ? 1 : -1);
  next?.focus();
  return Boolean(next);
}

/** The item above (-1) or below (1) another one: in the next line, the nearest to the side.
 * @param {HTMLElement[]} items @param {HTMLElement} item @param {number} direction */
function besides(items, item, direction) {
  const from = item.getBoundingClientRect();
  const apart = (/** @type {DOMRect} */ box) => direction * (box.top - from.top);
  const boxes = items.map((one) => ({ one, box: one.getBoundingClientRect() })).filter(({ box }) => apart(box) > 4);
  const line = Math.min(...boxes.map(({ box }) => apart(box)));
  const near = boxes.filter(({ box }) => apart(box) < line + 4);
  near.sort((a, b) => Math.abs(a.box.left - from.left) - Math.abs(b.box.left - from.left));
  return near[0]?.one;
}

/** Say something to those who cannot see that it changed. @param {string} text */
function announce(text) {
  byId("status").textContent = text;
}

/** Remember how far a page is scrolled and which item of a list has the focus, so that "back" returns there. */
function rememberPlace() {
  if (byId("content").hasAttribute("aria-busy")) return; // the view before is still shown
  const item = [...document.querySelectorAll("[data-item]")].findIndex((one) => one === document.activeElement);
  changeEntry({ state: { y: scrollY, item } });
}

async function start() {
  let timer = 0;
  try {
    site = await chunk("site");
  } catch (error) {
    return refill(byId("content"), failure(error, () => location.reload()));
  }
  history.scrollRestoration = "manual";
  addEventListener("hashchange", () => {
    clearTimeout(timer); // it would write to the new address
    show();
  });
  addEventListener("keydown", onKey);
  addEventListener("scroll", () => {
    clearTimeout(timer);
    timer = setTimeout(rememberPlace, 150);
  });
  addEventListener("click", ({ target }) => {
    if (target instanceof Element && target.closest("a")) rememberPlace();
    writeEntry(); // before a link is followed, or the address copied
  }, true);
  addEventListener("blur", writeEntry);
  addEventListener("pagehide", writeEntry);
  document.querySelector(".skip")?.addEventListener("click", (event) => {
    event.preventDefault(); // its hash would be an address of ours
    byId("content").focus();
  });
  await show();
}

start();
