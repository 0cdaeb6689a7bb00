// The dialogues: a list with filters and search, and the chosen one, beside another if wanted.

const SETS = { before: "before", after: "after", benchmark: "benchmark" };
const ENDS = {
  goodbye: "the user left", success: "success", failure: "failure", turns: "the last turn",
  length: "no room for more", failed: "the user failed",
};
const INSIDE = ["What the reply says", "Whether it is what I want", "What goes on in me", "Feeling"];

const runOf = (d) => CONTENT.runs[d.run].name;
const setOf = (d) => SETS[d.set] ?? `step ${d.step}`;
const scenarioOf = (d) => CONTENT.scenarios[d.scenario];
const endOf = (d) => ENDS[d.end] ?? d.end;

// What can be chosen: label, and the text of a dialogue that the choice is of.
const CHOICES = {
  run: ["Run", runOf],
  set: ["Set", setOf],
  user: ["User", (d) => d.user],
  intention: ["Intention", (d) => scenarioOf(d).intention],
  character: ["Character", (d) => scenarioOf(d).character],
  tactic: ["Tactic", (d) => scenarioOf(d).tactic || "none"],
  level: ["Level", (d) => d.level],
  end: ["End", endOf],
};

/** All that is said and thought in a dialogue and told of its scenario, in small letters. */
function searched(d) {
  const s = scenarioOf(d);
  const said = d.turns.flatMap((t) => [t.reply, t.thought ?? "", t.message, ...t.plan]);
  const rest = d.rest ? [d.rest.reply, d.rest.thought ?? ""] : [];
  return [s.id, s.persona, s.background, s.topic, s.task, s.tactic, ...s.traits, d.opening, ...said,
    ...rest].join("\n").toLowerCase();
}

function changeMark(change) {
  const kind = change > 0 ? "up" : change < 0 ? "down" : "same";
  return el("span", { class: `change ${kind}` }, signed(change));
}

function listed(d, number) {
  const outcome = d.final === null ? [`${d.start} → –`] :
    [`${d.start} → ${plain(d.final)} `, changeMark(d.final - d.start)];
  const where = [CONTENT.runs.length > 1 ? `${runOf(d)}, ` : "", `${setOf(d)}, ${d.user}`];
  const button = el("button", { type: "button", tabindex: -1, "data-number": number },
    el("span", { class: "id" }, scenarioOf(d).id), el("span", { class: "outcome" }, outcome),
    el("span", { class: "faint" }, where.join("")), el("span", { class: "faint end" }, endOf(d)));
  return el("li", {}, button);
}

function replyOf(turn, open) {
  const thought = turn.thought === undefined ? null : el("details", { class: "thought", open },
    el("summary", {}, turn.formed ? "thought" : "thought (not well-formed)"),
    el("p", {}, turn.thought || "(none)"));
  return [el("div", { class: "said policy" }, el("h4", {}, "Policy"), thought, el("p", {}, turn.reply))];
}

function userOf(turn, open) {
  const inside = INSIDE.flatMap((label, i) =>
    turn.plan[i] ? [el("dt", {}, label), el("dd", {}, turn.plan[i])] : []);
  if (!turn.parsed) {
    inside.push(el("dt", {}, "Change"), el("dd", {}, "could not be read, and was asked for alone"));
  }
  const bar = el("progress", { max: 100, value: Math.max(0, turn.emotion), "aria-hidden": "true" });
  const emotion = el("p", { class: "emotion" }, changeMark(turn.change), " emotion ",
    el("b", {}, plain(turn.emotion)), " ", bar);
  const activity = inside.length ? el("details", { class: "inside", open },
    el("summary", {}, "inner activity"), el("dl", {}, inside)) : null;
  const message = turn.message ? el("p", {}, turn.message) : null;
  return [el("div", { class: "said user" }, el("h4", {}, "User"), emotion, activity, message)];
}

/** What happened in a turn of one dialogue; turn 0 is the opening. */
function exchange(d, number, open) {
  if (number === 0) {
    return el("div", { class: "said user" }, el("h4", {}, "User"),
      el("p", { class: "emotion" }, "emotion ", el("b", {}, String(d.start))), el("p", {}, d.opening));
  }
  const turn = d.turns[number - 1];
  if (turn) return [...replyOf(turn, open), ...userOf(turn, open)];
  return number === d.turns.length + 1 && d.rest ? replyOf(d.rest, open) : [];
}

function path(d) {
  const points = [d.start, ...d.turns.map((t) => t.emotion)];
  return points.map((emotion, turn) => [turn, emotion, null, null]);
}

function named(d) {
  return [CONTENT.runs.length > 1 ? `${runOf(d)}, ` : "", `${setOf(d)}, ${d.user}`].join("");
}

function about(s) {
  const rows = [["Persona", s.persona], ["Background", s.background], ["Topic", s.topic],
    ["Character", [s.character, ...s.traits].join(", ")], ["Tactic", s.tactic]];
  return el("details", {}, el("summary", {}, "scenario"), el("dl", {}, rows.flatMap(([label, text]) =>
    text ? [el("dt", {}, label), el("dd", { class: "lines" }, text)] : [])));
}

/** The article of one dialogue, or of two on the same scenario. */
function told(both, choice, open) {
  const s = scenarioOf(both[0]);
  const heads = both.map((d) => el("div", { class: "cell" }, el("h3", {}, named(d)),
    el("p", {}, `emotion ${d.start} → ${d.final === null ? "–" : plain(d.final)} `,
      d.final === null ? "" : changeMark(d.final - d.start), `, ${endOf(d)}`,
      d.level === "vanilla" ? "" : `, level ${d.level}`, d.greedy ? ", greedy" : "")));
  const rows = [el("div", { class: "row" }, heads)];
  const most = Math.max(...both.map((d) => d.turns.length + (d.rest ? 1 : 0)));
  for (let number = 0; number <= most; number++) {
    const label = number ? `Turn ${number}` : "Opening";
    const cells = both.map((d) => {
      const parts = [exchange(d, number, open)].flat();
      const tag = both.length > 1 && parts.length ? el("p", { class: "tag" }, named(d)) : null;
      return el("div", { class: "cell" }, tag, parts);
    });
    rows.push(el("h3", { class: "turn" }, label), el("div", { class: "row" }, cells));
  }
  const series = both.map((d, i) =>
    ({ label: named(d), colour: i, dashed: both.length > 1 && i === 0, points: path(d) }));
  const curve = chart({ title: "Emotion", unit: "points", bound: "points", xName: "turn", series });
  return [
    el("h3", { class: "title" }, s.id), el("p", {}, el("b", {}, "Hidden intention: "), s.task),
    about(s), choice, el("div", { class: "charts" }, curve),
    el("div", { class: both.length > 1 ? "pair" : "" }, rows),
  ];
}
