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

/** A fraction in percent; a dash if it is unknown. @param {number} value @param {number} [digits] */
function percent(value, digits = 1) {
  return Number.isFinite(value) ? `${fixed(100 * value, digits)} %` : "–";
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
