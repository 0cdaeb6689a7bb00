// The page: what is in the content, put in its places, and what the reader does with it.

const dialogues = CONTENT.dialogues, texts = new Map();
const list = document.getElementById("list"), detail = document.getElementById("detail");
const state = { chosen: -1, beside: -1, open: false };

function lineOf(run, label) {
  const name = CONTENT.runs.length > 1 ? CONTENT.runs[run].name : "";
  return [name, label].filter((part) => part).join(", ");
}

const users = [...new Set(CONTENT.runs.flatMap((run) =>
  Object.values(run.marks).flat().map((mark) => mark.user)))];

function curveSeries(panel) {
  return CONTENT.runs.flatMap((run, number) => panel.lines.flatMap(([metric, name], i) => {
    const line = { colour: number, dashed: i > 0 }, points = run.curves[metric];
    const aside = 5 * number - 2.5 * (CONTENT.runs.length - 1) + 3 * i;
    const marks = users.map((user, u) => ({
      ...line, aside, shape: u ? "rect" : "circle",
      label: [lineOf(number, name), "held out", user].filter((part) => part).join(", "),
      points: (run.marks[metric] ?? []).filter((m) => m.user === user)
        .map((m) => [m.step, m.value, m.low, m.high]),
    }));
    const own = points ? [{ ...line, label: lineOf(number, name || "training"), points }] : [];
    return [...own, ...marks.filter((found) => found.points.length)];
  }));
}

function drawCharts() {
  const curves = document.querySelector("#curves .charts");
  if (users.length) curves.before(markLegend(users));
  for (const panel of CONTENT.panels) {
    curves.append(chart({ ...panel, xName: "step", series: curveSeries(panel) }));
  }
  const paths = document.querySelector("#trajectories .charts");
  for (const { user, lines } of CONTENT.trajectories) {
    const series = lines.map((line) => ({
      label: lineOf(line.run, `${line.when} (${line.count} dialogues)`), colour: line.run,
      dashed: line.when === "before", points: line.points.map((point, turn) => [turn, ...point]),
    }));
    paths.append(chart({ title: `Judged by ${user}`, unit: "emotion, points", bound: "points",
      xName: "turn", series }));
  }
  const empty = el("p", { class: "faint" }, "Nothing yet.");
  for (const place of [curves, paths]) if (!place.children.length) place.append(empty.cloneNode(true));
}

function drawTables() {
  const place = document.querySelector("#tables > div");
  for (const { title, note, head, rows } of CONTENT.tables) {
    place.append(table(title, head, rows), el("p", { class: "note" }, note));
  }
}

function drawRuns() {
  CONTENT.runs.forEach((run, number) => {
    const ended = run.ended ? "ended" : "not ended";
    document.getElementById("runs").append(el("li", { class: `colour-${number % 8}` },
      el("b", {}, run.name), ` ${run.task}, ${ended}`));
  });
  const of = CONTENT.runs.filter((run) => run.shown[1])
    .map((run) => `${run.name}: ${run.shown[0]} of ${run.shown[1]}`);
  document.getElementById("shown").textContent = [`${dialogues.length} dialogues.`,
    of.length ? `Of training (evenly chosen) ${of.join("; ")}.` : ""].join(" ");
}

// The filters.

function drawFilters() {
  const form = document.getElementById("filters");
  const search = el("input", { type: "search", name: "text", autocomplete: "off" });
  form.append(el("label", { class: "wide" }, "Search ", search));
  for (const [name, [label, of]] of Object.entries(CHOICES)) {
    const values = [...new Set(dialogues.map(of))];
    if (values.length < 2) continue;
    const options = values.map((value) => el("option", { value }, value));
    const all = el("option", { value: "" }, "all");
    form.append(el("label", {}, `${label} `, el("select", { name, "data-choice": "" }, all, options)));
  }
  form.append(
    el("label", {}, "Final emotion from", el("input", { type: "number", name: "least", max: 100 })),
    el("label", {}, "to", el("input", { type: "number", name: "most", max: 100 })),
    el("button", { type: "reset" }, "Reset"),
    el("output", { id: "count", "aria-live": "polite" }),
  );
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
}

function matches(d, values, wanted) {
  for (const [name, [, of]] of Object.entries(CHOICES)) {
    if (values[name] && of(d) !== values[name]) return false;
  }
  if (values.least !== "" && (d.final === null || d.final < +values.least)) return false;
  if (values.most !== "" && (d.final === null || d.final > +values.most)) return false;
  if (!wanted) return true;
  if (!texts.has(d)) texts.set(d, searched(d));
  return texts.get(d).includes(wanted);
}

function filter() {
  const values = Object.fromEntries(new FormData(document.getElementById("filters")));
  const wanted = values.text.trim().toLowerCase();
  let count = 0;
  dialogues.forEach((d, number) => {
    const found = matches(d, values, wanted);
    list.children[number].hidden = !found;
    count += found;
  });
  document.getElementById("count").textContent = `${count} of ${dialogues.length}`;
  const left = shownNumbers();
  if (!left.includes(state.chosen)) choose(left.length ? left[0] : -1);
}

function shownNumbers() {
  return dialogues.map((_, number) => number).filter((number) => !list.children[number].hidden);
}

// The chosen dialogue.

/** The other dialogues on the same scenario, by their numbers. */
function others(number) {
  const { scenario } = dialogues[number];
  return dialogues.map((_, other) => other)
    .filter((other) => other !== number && dialogues[other].scenario === scenario);
}

/** The same user before or after training, where it is there. */
function partner(number) {
  const d = dialogues[number], wanted = { before: "after", after: "before" }[d.set];
  return others(number).find((other) => {
    const o = dialogues[other];
    return o.set === wanted && o.run === d.run && o.user === d.user;
  }) ?? -1;
}

function choose(number, focus = false) {
  list.querySelectorAll("[aria-current]").forEach((button) => {
    button.removeAttribute("aria-current");
    button.tabIndex = -1;
  });
  state.chosen = number;
  state.beside = number < 0 ? -1 : partner(number);
  if (number >= 0) {
    const button = list.children[number].firstChild;
    button.setAttribute("aria-current", "true");
    button.tabIndex = 0;
    if (focus) button.focus({ preventScroll: true });
    const top = button.parentNode.offsetTop - list.offsetTop;
    if (top < list.scrollTop) list.scrollTop = top;
    const under = top + button.offsetHeight - list.clientHeight;
    if (under > list.scrollTop) list.scrollTop = under;
  }
  drawDetail();
}

function drawDetail() {
  if (state.chosen < 0) {
    detail.replaceChildren(el("p", { class: "faint" }, "No dialogue."));
    return;
  }
  const options = others(state.chosen).map((number) =>
    el("option", { value: number, selected: number === state.beside ? "" : null },
      named(dialogues[number])));
  const select = el("select", {}, el("option", { value: -1 }, "nothing"), options);
  select.addEventListener("change", () => {
    state.beside = +select.value;
    drawDetail();
    detail.querySelector(".tools select").focus();
  });
  const unfold = el("button", { type: "button", "aria-pressed": String(state.open) }, "Unfold all");
  unfold.addEventListener("click", () => {
    unfoldAll();
    detail.querySelector(".tools button").focus();
  });
  const besides = options.length ? el("label", {}, "Beside it ", select) : null;
  const tools = el("p", { class: "tools" }, besides, unfold);
  const both = [dialogues[state.chosen]];
  if (state.beside >= 0) both.push(dialogues[state.beside]);
  if (both.length > 1 && both[1].set === "before") both.reverse();
  detail.replaceChildren(...told(both, tools, state.open ? "" : null));
}

function unfoldAll() {
  state.open = !state.open;
  drawDetail();
}

function move(step) {
  const shown = shownNumbers(), place = shown.indexOf(state.chosen);
  if (!shown.length) return;
  choose(shown[Math.max(0, Math.min(shown.length - 1, place + step))], true);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input, select, textarea");
  const search = document.querySelector("#filters input");
  if (typing) {
    if (event.key === "Escape" && event.target === search) {
      event.preventDefault();  // which would empty the field
      move(0);
    }
    return;
  }
  const inList = list.contains(event.target);
  const steps = { j: 1, k: -1 };
  if (inList) Object.assign(steps, { ArrowDown: 1, ArrowUp: -1, Home: -1e9, End: 1e9 });
  if (event.key in steps) move(steps[event.key]);
  else if (event.key === "/") search.focus();
  else if (event.key === "f") unfoldAll();
  else return;
  event.preventDefault();
}

// Light and dark: as the system has it, until the reader chooses.

function startTheme() {
  const root = document.documentElement, button = document.getElementById("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => root.dataset.theme ?? (dark.matches ? "dark" : "light");
  const label = () => {
    button.lastElementChild.textContent = now() === "dark" ? "Light" : "Dark";
  };
  button.addEventListener("click", () => {
    root.dataset.theme = now() === "dark" ? "light" : "dark";
    label();
  });
  dark.addEventListener("change", label);
  label();
}

startTheme();
drawRuns();
drawCharts();
drawTables();
drawFilters();
list.append(...dialogues.map(listed));
list.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button) choose(+button.dataset.number, true);
});
document.addEventListener("keydown", onKey);
filter();
