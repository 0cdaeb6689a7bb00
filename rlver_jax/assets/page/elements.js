"use strict";
// Elements of the page. Texts of dialogues become text nodes here, and nothing else.

const CONTENT = JSON.parse(document.getElementById("content").textContent);
const SVG = document.querySelector("svg").namespaceURI;

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== ""));
  return node;
}

/** An HTML element; children are nodes or texts. */
function el(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

/** An element of SVG. */
function svg(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

/** A table of texts in a frame that scrolls by itself. */
function table(caption, head, rows) {
  const headCells = head.map((text) => el("th", { scope: "col" }, text));
  const body = rows.map((row) =>
    el("tr", {}, row.map((text, i) => (i ? el("td", {}, text) : el("th", { scope: "row" }, text)))));
  const whole = el("table", {}, el("caption", {}, caption), el("thead", {}, el("tr", {}, headCells)),
    el("tbody", {}, body));
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption }, whole);
}

/** A fold whose inside is made when it is first opened. */
function fold(summary, make, attributes = {}) {
  const node = el("details", attributes, el("summary", {}, summary));
  node.addEventListener("toggle", () => {
    if (node.open && node.children.length === 1) node.append(...[make()].flat());
  });
  return node;
}

function plain(number) {
  return number < 0 ? `−${-number}` : String(number);
}

function signed(number) {
  return number > 0 ? `+${number}` : number < 0 ? plain(number) : "±0";
}
