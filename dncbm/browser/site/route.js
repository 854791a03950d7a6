"use strict";
// The hash of the address says all that is shown: #/concepts?q=dog&sort=z, #/image/0/12?edit=3:0

/** @returns {Route} */
function currentRoute() {
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
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
  return `#/${path}${query ? `?${query}` : ""}`;
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
  location.hash = hash;
}

/** The view has changed itself: only its address follows, and "back" passes over it. @param {string} hash */
function replaceAddress(hash) {
  history.replaceState(history.state, "", hash);
  document.dispatchEvent(new Event("addresschange"));
}

/** A whole number from the address, from 0 to below n; null if it is none.
 * @param {string | undefined} text @param {number} n */
function numberIn(text, n) {
  return text !== undefined && /^\d{1,9}$/.test(text) && Number(text) < n ? Number(text) : null;
}
