"use strict";
// Bars and histograms. Every number that is drawn is also written.

/**
 * A table of labelled bars on either side of zero; `title` is its caption.
 * @param {string} title @param {{ label: Child, value: number, text?: string, after?: Child }[]} rows
 * @param {{ most?: number, text?: (value: number) => string }} [options] the value of a full bar, and how values are written
 */
function bars(title, rows, { most, text = (value) => fixed(value) } = {}) {
  const full = most ?? Math.max(...rows.map((row) => Math.abs(row.value)), 1e-30);
  const signed = rows.some((row) => row.value < 0) && rows.some((row) => row.value > 0);
  const lines = rows.map(({ label, value, text: said, after }) => {
    const bar = h("span");
    drawBar(bar, value / full, signed);
    return h(
      "tr", {}, h("th", { scope: "row" }, label), h("td", { class: "drawn", "aria-hidden": "true" }, bar),
      h("td", { class: "number" }, said ?? text(value)), after === undefined ? null : h("td", { class: "after" }, after),
    );
  });
  return h("table", { class: "bars" }, h("caption", {}, title), h("tbody", {}, lines));
}

/** Draw a bar, or draw it again. @param {HTMLElement} bar @param {number} part of a full bar, from -1 to 1
 * @param {boolean} signed whether zero is in the middle */
function drawBar(bar, part, signed) {
  const share = Math.min(Math.abs(part), 1) * (signed ? 50 : 100);
  bar.className = `bar-of ${part < 0 ? "negative" : "positive"}`;
  bar.style.width = `${share}%`;
  const left = part < 0 ? (signed ? 50 : 100) - share : signed ? 50 : 0;
  bar.style.marginLeft = `${left}%`;
}

/**
 * Counts of equal parts of (0, most]. Heights are logarithmic, since most strengths are small.
 * @param {string} title @param {ArrayLike<number>} counts @param {number} most
 */
function histogram(title, counts, most) {
  const [width, height, all] = [240, 60, Array.from(counts)];
  const top = Math.log1p(Math.max(...all, 1));
  const [step, total] = [width / all.length, all.reduce((sum, one) => sum + one, 0)];
  const said = all.map((n, place) => {
    const [low, high] = [strength((most * place) / all.length), strength((most * (place + 1)) / all.length)];
    const tall = n ? Math.max((height * Math.log1p(n)) / top, 1) : 0;
    const shape = { x: place * step, y: height - tall, width: Math.max(step - 1, 0.5), height: tall };
    return svg("rect", shape, svg("title", {}, `${low} to ${high}: ${counted(n, "image")}`));
  });
  const about = `${title}: ${counted(total, "image")}, strengths up to ${strength(most)}`;
  return h(
    "figure", { class: "histogram" },
    svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": about, preserveAspectRatio: "none" }, said),
    h("figcaption", {}, h("span", {}, "0"), h("span", {}, `${title} (logarithmic)`), h("span", {}, strength(most))),
  );
}
