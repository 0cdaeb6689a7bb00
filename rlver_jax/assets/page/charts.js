// Charts of lines with bands: drawn as SVG, read with the mouse, the arrow keys, or as a table.

const WIDTH = 440, HEIGHT = 240, LEFT = 44, RIGHT = 12, TOP = 10, BOTTOM = 34;

/** Round numbers from low to high, about as many as asked for. */
function ticks(low, high, count, whole) {
  const rough = Math.max((high - low) / count, 1e-12);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const size = whole ? Math.max(1, Math.round(step)) : step;
  const first = Math.ceil(low / size - 1e-9), found = [];
  for (let i = first; i * size <= high + size * 1e-9; i++) found.push(i * size);
  return found;
}

function written(value, bound) {
  if (bound === "share") return `${Math.round(value * 100)}%`;
  return Math.abs(value) >= 10 ? value.toFixed(1) : value.toPrecision(3);
}

function withBounds([, value, low, high], bound) {
  const range = low === null ? "" : ` [${written(low, bound)}, ${written(high, bound)}]`;
  return written(value, bound) + range;
}

/** How the values are laid out: limits of both axes, and functions from values to places. */
function scales(bound, series) {
  const points = series.flatMap((line) => line.points);
  const xs = points.map((p) => p[0]);
  const ys = points.flatMap((p) => [p[1], p[2] ?? p[1], p[3] ?? p[1]]);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (bound === "share") [y0, y1] = [0, 1];
  if (bound === "points") [y0, y1] = [Math.min(0, y0), 100];
  if (bound === "from zero") [y0, y1] = [0, y1 * 1.08 || 1];
  if (x0 === x1) [x0, x1] = [x0 - 1, x1 + 1];
  const x = (v) => LEFT + 6 + ((v - x0) / (x1 - x0)) * (WIDTH - LEFT - RIGHT - 12);
  const y = (v) => HEIGHT - BOTTOM - ((v - y0) / (y1 - y0)) * (HEIGHT - TOP - BOTTOM);
  return { x0, x1, y0, y1, x, y };
}

function axes(scale, bound, xName, unit) {
  const parts = [];
  for (const value of ticks(scale.y0, scale.y1, 5, false)) {
    const at = scale.y(value).toFixed(1);
    parts.push(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: at, y2: at }));
    const label = bound === "share" ? written(value, bound) : String(+value.toPrecision(6));
    parts.push(svg("text", { x: LEFT - 6, y: at, class: "end middle" }, label));
  }
  const base = HEIGHT - BOTTOM;
  parts.push(svg("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: base, y2: base }));
  for (const value of ticks(scale.x0, scale.x1, 8, true)) {
    const at = scale.x(value).toFixed(1);
    parts.push(svg("line", { class: "axis", x1: at, x2: at, y1: base, y2: base + 4 }));
    parts.push(svg("text", { x: at, y: base + 16, class: "centre" }, String(value)));
  }
  parts.push(svg("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 3, class: "centre faint" }, xName));
  return svg("g", {}, parts);
}

function drawn(line, scale) {
  const at = (p, i) => `${scale.x(p[0]).toFixed(1)},${scale.y(p[i]).toFixed(1)}`;
  const style = `series colour-${line.colour % 8}${line.dashed ? " dashed" : ""}`;
  if (line.shape) return svg("g", { class: style }, line.points.map((p) => mark(line, p, scale)));
  const parts = [], sure = line.points.filter((p) => p[2] !== null);
  if (sure.length > 1) {
    const outline = [...sure.map((p) => at(p, 3)), ...sure.reverse().map((p) => at(p, 2))];
    parts.push(svg("polygon", { class: "band", points: outline.join(" ") }));
  }
  parts.push(svg("polyline", { points: line.points.map((p) => at(p, 1)).join(" ") }));
  if (line.points.length < 40) {
    for (const p of line.points) {
      parts.push(svg("circle", { cx: scale.x(p[0]), cy: scale.y(p[1]), r: 2.2 }));
    }
  }
  return svg("g", { class: style }, parts);
}

/** What the marks of a section mean. */
function markLegend(users) {
  return legend(users.map((user, i) =>
    ({ label: `held out, judged by ${user}`, colour: 7, shape: i ? "rect" : "circle" })));
}

/** A mark with its interval, moved a little aside where several runs have one. */
function mark(line, [step, value, low, high], scale) {
  const x = scale.x(step) + line.aside, y = scale.y(value), parts = [];
  if (low !== null) {
    parts.push(svg("line", { class: "whisker", x1: x, x2: x, y1: scale.y(low), y2: scale.y(high) }));
  }
  const place = line.shape === "circle" ? { cx: x, cy: y, r: 4.5 } :
    { x: x - 4, y: y - 4, width: 8, height: 8 };
  parts.push(svg(line.shape, { class: "mark", ...place }));
  return svg("g", {}, parts);
}

function legend(series) {
  const items = series.map((line) => {
    const swatch = line.shape ?
      mark({ ...line, aside: 0 }, [0, 0, null, null], { x: () => 14, y: () => 6 }) :
      svg("line", { x1: 1, x2: 27, y1: 6, y2: 6 });
    const style = `series colour-${line.colour % 8}${line.dashed ? " dashed" : ""}`;
    const picture = svg("svg", { viewBox: "0 0 28 12", width: 28, height: 12, "aria-hidden": "true" },
      svg("g", { class: style }, swatch));
    return el("li", {}, picture, " ", line.label);
  });
  return el("ul", { class: "legend" }, items);
}

/**
 * A chart as a figure.
 *
 * series: {label, colour, dashed, points} with points [x, value, low, high], in the order of x; or
 * marks, with `shape` (circle or rect) and `aside`.
 */
function chart({ title, unit, bound, xName, series }) {
  const scale = scales(bound, series);
  const cursor = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const xs = [...new Set(series.flatMap((line) => line.points.map((p) => p[0])))]
    .sort((a, b) => a - b);
  const last = series.map((l) => `${l.label}: ${withBounds(l.points.at(-1), bound)}`).join("; ");
  const picture = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "img",
    "aria-label": `${title}, ${unit}, by ${xName}. At the end ${last}. Arrow keys read values.`,
  }, axes(scale, bound, xName, unit), series.map((line) => drawn(line, scale)), cursor);
  const readout = el("output", { class: "readout", "aria-live": "polite" });
  let place = -1;

  function show(index) {
    place = index;
    const x = xs[index];
    cursor.setAttribute("x1", scale.x(x));
    cursor.setAttribute("x2", scale.x(x));
    cursor.setAttribute("visibility", "visible");
    const here = series.flatMap((line) => line.points.filter((p) => p[0] === x)
      .map((p) => `${line.label} ${withBounds(p, bound)}`));
    readout.textContent = `${xName} ${x}: ${here.join("; ")}`;
  }

  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * WIDTH;
    const distances = xs.map((x) => Math.abs(scale.x(x) - at));
    show(distances.indexOf(Math.min(...distances)));
  });
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.max(0, Math.min(xs.length - 1, place + step)));
  });
  const asTable = fold("as a table", () => {
    const rows = xs.map((x) => [String(x), ...series.map((line) => {
      const found = line.points.find((p) => p[0] === x);
      return found ? withBounds(found, bound) : "";
    })]);
    return table(title, [xName, ...series.map((line) => line.label)], rows);
  });
  const caption = el("figcaption", {}, el("strong", {}, title), " ",
    el("span", { class: "faint" }, unit));
  const lines = series.filter((line) => !line.shape);
  return el("figure", {}, caption, picture, legend(lines), readout, asTable);
}
