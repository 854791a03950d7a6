"use strict";
// Elements, made without any HTML from data: texts are always texts, whatever a name holds.

/** @typedef {string | number | Node | null | undefined | false | Child[]} Child */

/**
 * An element. Keys of `props` that begin with "on" are listeners, all others attributes; false and null leave one out, true
 * sets it to "".
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag @param {Record<string, any>} [props] @param {...Child} children @returns {HTMLElementTagNameMap[K]}
 */
function h(tag, props = {}, ...children) {
  return /** @type {any} */ (filled(document.createElement(tag), props, children));
}

/** An SVG element, as `h`. @param {string} tag @param {Record<string, any>} [props] @param {...Child} children */
function svg(tag, props = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);
}

/** @param {Element} element @param {Record<string, any>} props @param {Child[]} children */
function filled(element, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  add(element, children);
  return element;
}

/** @param {Element} element @param {Child[]} children */
function add(element, children) {
  for (const child of children) {
    if (Array.isArray(child)) add(element, child);
    else if (child !== null && child !== undefined && child !== false) element.append(/** @type {Node} */ (child));
  }
}

/** Replace all of an element's children. @param {Element} element @param {...Child} children */
function refill(element, ...children) {
  element.replaceChildren();
  add(element, children);
}

// ------------------------------------------------------------------------------------------------------------ texts

/** A number with some decimals; a dash if it is unknown. @param {number} value @param {number} [digits] */
function fixed(value, digits = 2) {
  if (!Number.isFinite(value)) return "–";
  return value.toFixed(digits).replace(/^-(0(\.0*)?)$/, "$1").replace("-", "−");
}

/** A fraction in percent, which no line breaks; a dash if it is unknown. @param {number} value @param {number} [digits] */
function percent(value, digits = 1) {
  return Number.isFinite(value) ? `${fixed(100 * value, digits)}\u00a0%` : "–";
}

/** A small number, such as a q-value. @param {number} value */
function smallNumber(value) {
  return value < 0.001 ? "< 0.001" : fixed(value, 3);
}

/** A strength, with three digits. @param {number} value */
function strength(value) {
  return Number.isFinite(value) ? Number(value.toPrecision(3)).toString() : "–";
}

/** "1 image", "1,200 images". @param {number} n @param {string} one @param {string} [many] */
function counted(n, one, many = `${one}s`) {
  return `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
}

/** A name: isolated, so that right-to-left ones do not turn what is around them. @param {string} text */
function named(text) {
  return h("bdi", { class: "name", title: text.length > 60 ? text : null }, text);
}

/** What a verdict means. @param {string} verdict */
function badge(verdict) {
  const said = verdict || "not tested";
  return h("span", { class: `badge ${verdict || "untested"}` }, said);
}

/** A note on something that is missing, and perhaps the command that makes it.
 * @param {string} text @param {string} [command] */
function note(text, command) {
  return h("p", { class: "note" }, text, command ? [" To make it, run ", h("code", {}, command), "."] : null);
}

// ------------------------------------------------------------------------------------------------------- from one to the next

/** View -> the list that it showed last: what is in it, in its order, and its address; `per` of them are on a page, or the
 * first ones are `shown`.
 * @type {Map<string, { run: number, items: number[], path: string, params: URLSearchParams | Record<string, string>,
 *   per?: number, shown?: number }>} */
const listed = new Map();

/**
 * Links from one of n things to the ones before and after it, and up to where it is listed. They follow the list that a view
 * showed last, if that holds it; or else they go by number, and up to `path`.
 * @param {Route} route @param {number} item @param {number} n
 * @param {{ list: string, label: string, one: string, path: string, title: Child, link: (item: number) => string }} options
 *   the view, and what links are called
 */
function pager(route, item, n, { list, label, one, path, title, link }) {
  const shown = listed.get(list);
  const items = shown?.run === route.run ? shown.items : [];
  const place = items.indexOf(item);
  const [before, after] = place < 0 ? [item - 1, item + 1] : [items[place - 1] ?? -1, items[place + 1] ?? n];
  const counts = [place + 1, items.length].map((number) => number.toLocaleString("en"));
  const up = place < 0 || !shown ? linkTo(route, path, editsOf(route)) : linkTo(route, shown.path, {
    ...Object.fromEntries(new URLSearchParams(shown.params)), ...editsOf(route), focus: item,
    page: shown.per && place >= shown.per ? 1 + Math.floor(place / shown.per) : null,
  });
  return h(
    "nav", { class: "pager", "aria-label": label },
    before >= 0 && h("a", { rel: "prev", href: link(before) }, `← Previous ${one}`),
    h("a", { rel: "up", href: up }, "↑ ", title, place < 0 ? null : ` (${counts.join(" of ")})`),
    after < n && h("a", { rel: "next", href: link(after) }, `Next ${one} →`),
  );
}

/** Whether an address asks for the focus on one thing of a list. @param {Route} route @param {number | string} item */
function isAskedFor(route, item) {
  return route.params.get("focus") === String(item);
}

// ------------------------------------------------------------------------------------------------------------ images

/**
 * An image of a data set, cut from its sheet. Without thumbnails, a box with its number.
 * @param {number} dataset @param {number} image @param {string} label what it shows, for those who cannot see it
 */
function picture(dataset, image, label) {
  const { thumbnails } = site.datasets[dataset];
  const found = h("span", { class: "picture", role: "img", "aria-label": label, title: label });
  if (!thumbnails) {
    found.append(h("span", { class: "no-picture", "aria-hidden": "true" }, `#${image}`));
    return found;
  }
  const { columns, per_sheet, per_folder } = thumbnails;
  const sheet = Math.floor(image / per_sheet);
  const [row, column] = [Math.floor((image % per_sheet) / columns), image % columns];
  const rows = Math.ceil(per_sheet / columns);
  const at = (/** @type {number} */ place, /** @type {number} */ n) => (n > 1 ? `${(100 * place) / (n - 1)}%` : "0");
  found.style.backgroundImage = `url("thumbnails/${dataset}/${Math.floor(sheet / per_folder)}/${sheet}.webp")`;
  found.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
  found.style.backgroundPosition = `${at(column, columns)} ${at(row, rows)}`;
  return found;
}

/**
 * Images as links to their own pages, with a line below each; -1 stands for none.
 * @param {Route} route @param {number} dataset @param {Iterable<number>} images @param {string} label of the list
 * @param {(place: number) => string} [below] @param {Images | null} [about] if it is loaded, names and classes are told
 */
function gallery(route, dataset, images, label, below, about) {
  const items = [...images].map((image, place) => {
    if (image < 0) return null;
    const said = [imageName(about, image), below?.(place)].filter(Boolean).join(", ");
    return h(
      "li", {}, h("a", { href: imageLink(route, dataset, image) }, picture(dataset, image, said)),
      below ? h("span", { class: "below" }, below(place)) : null,
    );
  });
  return h("ul", { class: "gallery", "aria-label": label }, items);
}

/** What an image is called. @param {Images | null | undefined} about @param {number} image */
function imageName(about, image) {
  if (!about) return `image ${image}`;
  const of = about.classes[about.label[image]];
  return of === undefined ? about.names[image] : `${about.names[image]} (${of})`;
}
