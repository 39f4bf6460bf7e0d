// Overview: what a run was, its state, its curves; several runs overlaid.
"use strict";

const COLORS = ["#1f5f99", "#c2571a", "#3b8254", "#7b4fa3", "#8a6d1f", "#b23a6b", "#4b5a68", "#2a8c94"];
const PHASES = ["rollout", "scorer", "reference", "learner", "sync", "evaluate"];
const PHASE_COLORS = ["#1f5f99", "#6d9fce", "#9aa7b4", "#c2571a", "#8a6d1f", "#3b8254"];
const FONT = { family: "system-ui, sans-serif", size: 12, color: "#3b444d" };

// [title, unit, metrics: names or patterns, what it means]
const CHARTS = [
  ["Reward", "score", ["scorer/reward_mean"], "Mean score of the completions of an iteration."],
  ["Held-out score, 95 % over prompts", "score", [/^eval\/[^/]+\/(sampled|greedy|refined|pair_accuracy)$/, /exploitability/]],
  ["Win rate, 95 % over prompts", "share", [/^eval\/[^/]+\/win_rate(_length_controlled)?$/]],
  ["KL to the reference", "nats per response", ["reference/kl", /^eval\/[^/]+\/reference_kl$/],
    "How far the policy has moved: reference/kl on what is trained on, eval on fresh held-out completions."],
  ["Length", "tokens", ["rollout/length_mean", /^eval\/[^/]+\/length$/]],
  ["Truncated", "share", ["rollout/truncated"]],
  ["Entropy of the policy", "nats per token", ["policy/entropy"], "Randomness of the next token. Near 0 all completions of a prompt are alike."],
  ["Loss", "", ["learner/loss", "critic/loss", /^eval\/[^/]+\/nll$/]],
  ["Gradient norm", "", ["learner/grad_norm", "critic/grad_norm"], "Before clipping."],
  ["Tokens per second while generating", "tokens/s", ["tokens/s"]],
  ["Staleness", "versions", ["staleness/max"], "Weight updates between a completion and its training step."],
  ["Engine against learner", "nats per token", ["rollout/mismatch_kl"],
    "Difference between vLLM and the learner (which trains) on the same tokens. It should stay near 0."],
];
const FROM_ZERO = ["Truncated", "Staleness", "Length", "Tokens per second while generating"];

function layout(unit, more) {
  return {
    font: FONT,
    margin: { l: 60, r: 40, t: 8, b: 36 }, // on the right there is room for the modebar
    paper_bgcolor: "#fff",
    plot_bgcolor: "#fff",
    hovermode: "x unified",
    hoverlabel: { namelength: 40 },
    xaxis: { gridcolor: "#eef1f4", zeroline: false, title: { text: "iteration", standoff: 6 } },
    yaxis: { gridcolor: "#eef1f4", zeroline: false, automargin: true, title: { text: unit, standoff: 8 }, exponentformat: "power" },
    modebar: { orientation: "v" },
    showlegend: true,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, xanchor: "left", font: { size: 11 }, traceorder: "normal" },
    ...more,
  };
}

// Whole numbers on an axis of few iterations.
function iterationAxis(runs) {
  const last = Math.max(...runs.flatMap((run) => run.x), 0);
  return { gridcolor: "#eef1f4", zeroline: false, title: { text: "iteration", standoff: 6 }, ...(last <= 10 ? { dtick: 1 } : {}) };
}

function figure(title, name, tall, meaning) {
  const element = h("div", { class: tall ? "chart tall" : "chart", "data-chart": name });
  const note = meaning ? [h("p", { class: "meaning" }, meaning)] : [];
  return [h("figure", {}, h("figcaption", {}, title), ...note, element), element];
}

// Plotly is the last script: facts are shown while the browser still reads it.
const plotlyLoaded = new Promise((resolve) => {
  if (document.readyState === "complete") resolve();
  else window.addEventListener("load", resolve);
});

async function draw(element, traces, shape) {
  await plotlyLoaded;
  return Plotly.react(element, traces, shape, { displaylogo: false, responsive: true, displayModeBar: "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] });
}

function drawCurves(element, runs, traces, shape) {
  const alarms = alarmLines(runs);
  return draw(element, [...traces, ...alarms], { ...shape, xaxis: iterationAxis(runs), ...(alarms.length ? { yaxis2: ALARM_AXIS } : {}) });
}

function curve(run, name) {
  if (name !== "tokens/s") return run.curves[name];
  const tokens = run.curves["rollout/tokens"];
  const seconds = run.curves["time/rollout_s"];
  return tokens && seconds && tokens.map((t, i) => (t !== null && seconds[i] ? t / seconds[i] : null));
}

function names(run, patterns) {
  const all = Object.keys(run.curves);
  return patterns.flatMap((p) =>
    p instanceof RegExp ? all.filter((name) => p.test(name)) : curve(run, p) ? [p] : []);
}

function lines(runs, patterns) {
  const traces = [];
  const one = new Set(runs.flatMap((run) => names(run, patterns))).size === 1;
  runs.forEach((run, index) => {
    names(run, patterns).forEach((name, nth) => {
      const color = COLORS[(runs.length > 1 ? index : nth) % COLORS.length];
      const dash = runs.length > 1 ? ["solid", "dot", "dash", "dashdot"][nth % 4] : "solid";
      const points = run.x.map((x, i) => [x, curve(run, name)[i]]).filter(([, y]) => y !== null && y !== undefined);
      if (!points.length) return;
      traces.push(...band(run, name, color), {
        x: points.map(([x]) => x),
        y: points.map(([, y]) => y),
        name: plain(runs.length === 1 ? name : one ? run.id : `${run.id}: ${name}`),
        mode: points.length < 25 ? "lines+markers" : "lines",
        marker: { size: 5 },
        line: { color, width: 2, dash },
      });
    });
  });
  return traces;
}

// The confidence band of an evaluated figure, where there is one.
function band(run, name, color) {
  const rows = run.intervals[name];
  if (!rows) return [];
  const x = [...rows.map((r) => r[0]), ...rows.map((r) => r[0]).reverse()];
  const y = [...rows.map((r) => r[1]), ...rows.map((r) => r[2]).reverse()];
  return [{ x, y, fill: "toself", fillcolor: color + "26", line: { width: 0 }, mode: "lines",
    hoverinfo: "skip", showlegend: false }];
}

const ALARMS = { warn: ["warning", "#d9a521"], pause: ["pause", "#c2571a"], fault: ["fault", "#b3261e"] };
const ALARM_AXIS = { overlaying: "y", range: [0, 1], visible: false, fixedrange: true }; // the plot's height

// A dotted line in every iteration with an alarm: the legend names the guards, hovering shows the message.
function alarmLines(runs) {
  return Object.entries(ALARMS).flatMap(([kind, [word, color]]) => {
    const own = runs.flatMap((run) => run.alarms.filter((alarm) => alarm.kind === kind).map((alarm) => ({ ...alarm, run: run.id })));
    if (!own.length) return [];
    const messages = new Map();
    for (const alarm of own) {
      const message = `${runs.length > 1 ? `${alarm.run}: ` : ""}${word}: ${alarm.message}`;
      messages.set(alarm.iteration, [...(messages.get(alarm.iteration) || []), message]);
    }
    const guards = [...new Set(own.map((alarm) => alarm.guard).filter(Boolean))];
    return [{
      x: [...messages.keys()].flatMap((x) => [x, x, null]),
      y: [...messages.keys()].flatMap(() => [0, 1, null]),
      text: [...messages.values()].flatMap((each) => Array(3).fill(wrapped(each.slice(0, 3)))),
      yaxis: "y2",
      mode: "lines",
      line: { color, width: 1, dash: "dot" },
      name: plain([word, listed(guards, 3)].filter(Boolean).join(": ")),
      hovertemplate: "%{text}<extra></extra>",
    }];
  });
}

function listed(guards, most) {
  if (!guards.length) return "";
  const more = guards.length > most ? ` and ${guards.length - most} others` : "";
  return `guard${guards.length > 1 ? "s" : ""} ${guards.slice(0, most).join(", ")}${more}`;
}

// Lines of at most 50 characters; the whole text is in the table of alarms.
function wrapped(texts) {
  return texts.map((text) => {
    const short = text.length > 200 ? `${text.slice(0, 200)} …` : text;
    return short.replace(/(.{1,50})(\s+|$)/g, "$1\n").trim().split("\n").map(plain).join("<br>");
  }).join("<br>");
}

function phaseChart(element, run) {
  const traces = PHASES.filter((phase) => run.curves[`time/${phase}_s`]).map((phase) => ({
    x: run.x,
    y: run.curves[`time/${phase}_s`],
    name: phase,
    type: "bar",
    marker: { color: PHASE_COLORS[PHASES.indexOf(phase)], line: { width: 0 } },
  }));
  return draw(element, traces, layout("s", { barmode: "stack", bargap: 0.1, xaxis: iterationAxis([run]) }));
}

function factsOf(run) {
  const left = run.eta_s ? `, about ${Math.round(run.eta_s / 60)} min left` : "";
  const kind = { running: "good", done: "good", crashed: "bad", stalled: "bad", paused: "warn", stopped: "warn" };
  return [
    h("dl", { class: "facts" },
      h("dt", {}, "state"), h("dd", {}, badge(run.state, kind[run.state]), ` ${run.iteration} of ${run.iterations} iterations${left}`),
      run.reason && [h("dt", {}, "reason"), h("dd", {}, run.reason)],
      run.phase && [h("dt", {}, "under way"), h("dd", {}, run.phase)],
      h("dt", {}, "next step"), h("dd", {}, run.advice),
      run.facts.map(([label, text]) => [h("dt", {}, label), h("dd", {}, text)])),
    run.thinned && h("p", { class: "quiet" }, `The curves show ${run.x.length} of ${run.thinned} iterations.`),
  ];
}

async function overviewPage(app) {
  const { runs: all, differences } = await app.source.overview(app.selected);
  const runs = all.filter((run) => !run.error);
  const page = h("div", {});
  page.append(h("h1", {}, runs.length === 1 ? runs[0].id : `${all.length} runs`));
  for (const run of all.filter((each) => each.error)) page.append(h("p", { class: "note" }, `${run.id}: ${run.error}`));
  page.append(h("div", { class: "cards" }, runs.map((run, i) =>
    h("section", { class: "card" },
      runs.length > 1 && h("h3", {}, h("span", { style: { color: COLORS[i % COLORS.length] } }, "● "), run.id), factsOf(run)))));
  if (differences.length) {
    page.append(h("h2", {}, "Config differences"), table([
      ["key", (row) => row.key, ""],
      ...runs.map((run, i) => [run.id, (row) => (row.values[i] === null ? h("span", { class: "quiet" }, "not set") : row.values[i]), "wide"]),
    ], differences));
  }
  const changes = runs.flatMap((run) => run.changes.map((row) => ({ ...row, run: run.id })));
  if (changes.length) page.append(h("h2", {}, "Evaluations, before and after"), changeTable(changes));
  const charts = h("div", { class: "charts" });
  page.append(h("h2", {}, "Curves"), charts);
  const jobs = [];
  for (const [title, unit, patterns, meaning] of CHARTS) {
    const traces = lines(runs, patterns);
    if (!traces.length) continue;
    const [frame, element] = figure(title, title, false, meaning);
    charts.append(frame);
    const yaxis = { ...layout(unit).yaxis, ...(FROM_ZERO.includes(title) ? { rangemode: "tozero" } : {}) };
    jobs.push(() => drawCurves(element, runs, traces, layout(unit, { yaxis })));
  }
  for (const run of runs.filter((each) => PHASES.some((phase) => each.curves[`time/${phase}_s`]))) {
    const [frame, element] = figure(runs.length > 1 ? `Seconds by phase, ${run.id}` : "Seconds by phase", "phases");
    charts.append(frame);
    jobs.push(() => phaseChart(element, run));
  }
  page.append(moreCurves(app, runs, jobs));
  page.append(alarmsOf(runs));
  for (const run of runs) {
    const rows = Object.entries(run.config);
    page.append(h("details", {}, h("summary", {}, `Config of ${run.id}`),
      table([["key", (r) => r[0], ""], ["value", (r) => r[1], "wide"]], rows)));
  }
  return { page, shown: () => Promise.all(jobs.map((job) => job())) };
}

function changeTable(rows) {
  const digits = (values) => values && h("span", {}, number(values[0], 3), h("span", { class: "quiet" },
    values[1] === null ? " (one prompt)" : ` (${number(values[1], 3)} to ${number(values[2], 3)})`));
  return table([
    ["run", (r) => r.run, ""],
    ["figure", (r) => h("div", { title: `${r.metric}: ${r.meaning}` }, r.metric, h("div", { class: "meaning" }, r.meaning)), ""],
    ["prompts", (r) => r.prompts, "number"],
    ["iterations", (r) => (r.before ? `${r.iterations[0]} and ${r.iterations[1]}` : r.iterations[1]), "number"],
    ["before", (r) => digits(r.before), "number"],
    ["after (95 %)", (r) => digits(r.after), "number"],
    ["difference (95 %)", (r) => digits(r.difference), "number"],
  ], rows);
}

function moreCurves(app, runs, jobs) {
  const all = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].sort();
  const element = h("div", { class: "chart tall" });
  const show = (name) => drawCurves(element, runs, lines(runs, [name]), layout(""));
  if (!all.length) return h("p", { class: "quiet" }, "There are no metrics yet.");
  app.metric = all.includes(app.metric) ? app.metric : all[0];
  jobs.push(() => show(app.metric));
  return h("div", {}, h("h2", {}, "Any metric"),
    select(all.map((name) => [name, name]), app.metric, (name) => { app.metric = name; show(name); }, { "aria-label": "metric" }), element);
}

function alarmsOf(runs) {
  const rows = runs.flatMap((run) => run.alarms.map((alarm) => ({ ...alarm, run: run.id })));
  if (!rows.length) return h("p", { class: "quiet" }, "No warnings, pauses or faults.");
  return h("div", {}, h("h2", {}, "Warnings, pauses and faults"), table([
    ["run", (r) => r.run, ""],
    ["iteration", (r) => r.iteration, "number"],
    ["kind", (r) => badge(r.kind, r.kind === "fault" ? "bad" : "warn"), ""],
    ["message", (r) => r.message, "wide"],
  ], rows));
}
