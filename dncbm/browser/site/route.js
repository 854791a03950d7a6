"use strict";
// The hash of the address says all that is shown: #/concepts?q=dog&sort=z, #/image/0/12?edit=3:0

/** @returns {Route} */
function currentRoute() {
  const [path, query] = currentEntry().hash.replace(/^#\/?/, "").split("?");
  const [view, ...parts] = path.split("/");
  const params = new URLSearchParams(query ?? "");
  const run = Number(params.get("run") ?? 0);
  return { view: view || "start", parts, params, run: site.runs[run] ? run : 0 };
}

/**
 * The address of a view. The run of `route` stays the same; other parameters are those given, without empty ones.
 * @param {Pick<Route, "run">} route @param {string} path "concept/12"
 * @param {Record<string, string | number | null | undefined> | URLSearchParams} [params]
 */
function linkTo(route, path, params = {}) {
  const given = params instanceof URLSearchParams ? [...params] : Object.entries(params);
  const kept = given.filter(([key, value]) => key !== "run" && value !== null && value !== undefined && value !== "");
  if (route.run) kept.push(["run", String(route.run)]);
  const query = new URLSearchParams(/** @type {[string, string][]} */ (kept)).toString();
  return `#/${path}${query ? `?${query}` : ""}`.replaceAll("%3A", ":").replaceAll("%2C", ","); // as people write edits
}

/** @param {Route} route @param {number} concept */
function conceptLink(route, concept) {
  return linkTo(route, `concept/${concept}`, editsOf(route));
}

/** @param {Route} route @param {number} number */
function classLink(route, number) {
  return linkTo(route, `class/${number}`, editsOf(route));
}

/** @param {Route} route @param {number} dataset @param {number} image */
function imageLink(route, dataset, image) {
  return linkTo(route, `image/${dataset}/${image}`, editsOf(route));
}

/** What is edited stays so from view to view. @param {Route} route */
function editsOf(route) {
  return { edit: route.params.get("edit") };
}

/** Go to an address: "back" returns to where this was. @param {string} hash */
function go(hash) {
  writeEntry();
  location.hash = hash;
}

/** The view has changed itself: only its address follows, and "back" passes over it. @param {string} hash */
function replaceAddress(hash) {
  changeEntry({ hash });
  document.dispatchEvent(new Event("addresschange"));
}

// ---------------------------------------------------------------------------------------------- the entry of the history

/** Milliseconds between changes of the entry: Safari refuses more than 100 in 30 s. */
const ENTRY_PAUSE = 350;
/** What the entry is to be, while its writing waits; `from` is its address until then.
 * @typedef {{ from: string, hash: string, state: any }} Entry @type {Entry | null} */
let unwritten = null;
let [entryTimer, entryWritten] = [0, -Infinity];

/** The entry of what is shown. Its hash may be newer than that of the address. @returns {Entry} */
function currentEntry() {
  if (unwritten?.from !== location.hash) unwritten = null; // that entry was left
  return unwritten ?? { from: location.hash, hash: location.hash, state: history.state };
}

/** Change the entry, at once or after a pause. @param {Partial<Entry>} changes */
function changeEntry(changes) {
  unwritten = { ...currentEntry(), ...changes };
  const wait = entryWritten + ENTRY_PAUSE - performance.now();
  if (wait <= 0) writeEntry();
  else entryTimer ||= setTimeout(writeEntry, wait);
}

/** Write what waits; later if the browser refuses. */
function writeEntry() {
  clearTimeout(entryTimer);
  entryTimer = 0;
  const { hash, state } = currentEntry();
  if (!unwritten) return;
  entryWritten = performance.now();
  try {
    history.replaceState(state, "", hash);
    unwritten = null;
  } catch {
    entryTimer = setTimeout(writeEntry, 10 * ENTRY_PAUSE);
  }
}

/** A whole number from the address, from 0 to below n; null if it is none.
 * @param {string | undefined} text @param {number} n */
function numberIn(text, n) {
  return text !== undefined && /^\d{1,9}$/.test(text) && Number(text) < n ? Number(text) : null;
}
