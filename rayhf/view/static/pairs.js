// Pairs with a word diff, win matrices with cycles, judgments; and search trees.
"use strict";

const PAIR_TABS = [["pairs", "Training pairs"], ["wins", "Win matrices"], ["judgments", "Judgments"]];

function pairTabs(app, current) {
  return [h("h1", {}, "Pairs and comparisons"), tabs(PAIR_TABS, current, (key) => app.href(key, {})), note(app)];
}

function iterationForm(app, page) {
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); app.go(page, { first: form.first.value, last: form.last.value }); } },
    [["first", "from iteration"], ["last", "to iteration"]].map(([name, label]) =>
      h("label", {}, label, h("input", { name, type: "number", value: app.parameters[name] || "" }))),
    h("button", { type: "submit" }, "filter"));
  return form;
}

async function pairsPage(app) {
  const query = { run: app.run, ...app.parameters };
  const list = pagedList((next) => app.source.pairs({ ...query, next }),
    (rows) => h("div", {}, rows.map((pair) => pairCard(app, pair, true))), "This run has no training pairs.");
  return { page: h("div", {}, pairTabs(app, "pairs"), iterationForm(app, "pairs"), list) };
}

function pairCard(app, pair, withPrompt) {
  const [chosen, rejected] = pair.rows;
  const diff = wordDiff(rejected.text, chosen.text);
  const side = (row, title, words, tag) => h("div", {},
    h("h3", {}, title, row.score !== null && h("span", { class: "quiet" }, ` score ${number(row.score)}`),
      h("span", { class: "quiet" }, `, ${row.tokens} tokens`, row.sample >= 0 ? `, sample ${row.sample}` : "")),
    words ? diffText(words, tag) : h("div", { class: "text" }, row.text),
    replyBlocks(row.replies, row.sample));
  const facts = Object.entries(pair.scalars).map(([name, value]) => `${name} ${number(value, 3)}`);
  return h("section", { class: "card", style: { marginBottom: "12px" } },
    h("header", {},
      withPrompt && h("a", { href: app.href("group", { iteration: pair.iteration - pair.back, prompt: pair.prompt_id }) }, `iteration ${pair.iteration}`),
      pair.objective !== "policy" && badge(pair.objective),
      h("span", { class: "quiet" }, [`judged by: ${pair.origin}`, ...facts].join(" · ")),
      h("span", { class: "score" }, pair.margin === null ? "" : `margin ${number(pair.margin)}`)),
    withPrompt && pair.prompt && h("div", { class: "message text" }, pair.prompt),
    h("div", { class: "pair" }, side(chosen, "chosen", diff && diff[1], "ins"), side(rejected, "rejected", diff && diff[0], "del")));
}

// ---------------------------------------------------------------- win matrices

async function winsPage(app) {
  const query = { run: app.run, has: "wins", ...app.parameters };
  const list = pagedList((next) => app.source.prompts({ ...query, next }), (rows) => promptTable(app, rows, "group"),
    "No completions of this run were compared with each other.");
  return { page: h("div", {}, pairTabs(app, "wins"), iterationForm(app, "wins"), list) };
}

function promptTable(app, rows, target) {
  return table([
    ["iteration", (r) => r.iteration, "number"],
    ["prompt", (r) => h("div", { class: "text" }, r.prompt), "wide"],
    ["source", (r) => r.source, ""],
    ["samples", (r) => r.samples, "number"],
  ], rows, (r) => app.go(target, { iteration: r.iteration, prompt: r.prompt_id }));
}

function matrixOf(group) {
  const compared = group.samples.filter((sample) => sample.wins !== null);
  if (!compared.length) return null;
  const marked = new Set(group.cycles.flatMap(([a, b, c]) => [`${a} ${b}`, `${b} ${c}`, `${c} ${a}`]));
  const cell = (i, j, p) => {
    if (p === null) return h("td", { class: "quiet" }, "?");
    const color = p >= 0.5 ? "31, 95, 153" : "214, 96, 20";
    return h("td", {
      class: marked.has(`${i} ${j}`) ? "cycle" : null,
      style: { backgroundColor: i === j ? "#f5f7f9" : `rgba(${color}, ${(1.3 * Math.abs(p - 0.5)).toFixed(3)})` },
    }, p.toFixed(2));
  };
  return h("div", {}, h("h2", {}, "Win probabilities"),
    h("p", { class: "quiet" }, "Row against column. ", group.cycles.length
      ? `Outlined cells are part of a cycle: ${group.cycles.slice(0, 5).map((c) => `#${c.join(" beats #")} beats #${c[0]}`).join("; ")}${group.cycles.length > 5 ? " and more" : ""}.`
      : "There is no cycle of three."),
    h("div", { class: "scroll" }, h("table", { class: "matrix" },
      h("tr", {}, h("th", {}), compared.map((s) => h("th", {}, `#${s.sample}`))),
      compared.map((s) => h("tr", {}, h("th", {}, `#${s.sample}`), compared.map((other) => cell(s.sample, other.sample, s.wins[other.sample])))))));
}

// ---------------------------------------------------------------- judgments

async function judgmentsPage(app) {
  const query = { run: app.run, ...app.parameters };
  const ofScorers = pagedList((next) => app.source.samples({ ...query, replied: "true", next }), (rows) => verdictTable(app, rows),
    "No judge wrote about this run's samples, or its keep_replies is 0.");
  const ofPolicy = pagedList((next) => app.source.samples({ ...query, kind: "judgement", next }), (rows) => sampleTable(app, rows),
    "This run has no judgments of a policy.");
  return { page: h("div", {}, pairTabs(app, "judgments"), iterationForm(app, "judgments"),
    h("h2", {}, "Verdicts of judges and rubrics"), ofScorers,
    h("h2", {}, "Judgments that a policy wrote (SPaR)"), ofPolicy) };
}

function verdictTable(app, rows) {
  return table([
    ["iteration", (s) => h("a", { href: app.href("group", { iteration: s.iteration, prompt: s.prompt_id }) }, s.iteration), "number"],
    ["prompt", (s) => h("div", { class: "text" }, s.prompt), "wide"],
    ["completion", (s) => [h("span", { class: "quiet" }, `#${s.sample}`), h("div", { class: "text" }, s.text)], "wide"],
    ["score", (s) => number(s.score), "number"],
    ["verdicts", (s) => replyBlocks(s.replies, s.sample, { open: true }), "wide"],
  ], rows);
}

// ---------------------------------------------------------------- trees

const NODE_STATS = [["value", "value"], ["visits", "visits"], ["q", "Q"], ["prior", "prior"], ["reward", "reward"], ["estimate", "estimate"]];

function hasTree(group) {
  return group.samples.some((sample) => sample.parent !== null || sample.kind === "step");
}

async function treesPage(app) {
  const query = { run: app.run, has: "tree", ...app.parameters };
  const list = pagedList((next) => app.source.prompts({ ...query, next }), (rows) => promptTable(app, rows, "tree"),
    "No sample of this run is part of a search tree.");
  return { page: h("div", {}, h("h1", {}, "Trees"), note(app), iterationForm(app, "trees"), list) };
}

async function treePage(app) {
  const { iteration, prompt } = app.parameters;
  const group = await app.source.group(app.run, Number(iteration), prompt);
  const children = new Map();
  for (const sample of group.samples) {
    if (!children.has(sample.parent)) children.set(sample.parent, []);
    children.get(sample.parent).push(sample);
  }
  const path = chosenPath(group);
  const roles = pairRoles(group);
  const roots = children.get(null) || [];
  const tree = h("div", { class: "tree" }, roots.map((sample) => node(sample, children, path, roles)));
  const open = (value) => () => tree.querySelectorAll("details").forEach((element) => { element.open = value; });
  const pairs = group.examples.filter((example) => example.rows.length === 2);
  return { page: h("div", {},
    h("h1", {}, `Tree of prompt ${group.prompt_id}, iteration ${group.iteration}`),
    h("p", {}, h("a", { href: app.href("trees", {}) }, "all trees"), " · ",
      h("a", { href: app.href("group", { iteration, prompt }) }, "its samples side by side")),
    messages(group.messages),
    h("p", {}, h("button", { type: "button", onclick: open(true) }, "open all"), " ", h("button", { type: "button", onclick: open(false) }, "close all"),
      h("span", { class: "quiet" }, ` ${group.samples.length} nodes; shaded: the chosen path`)),
    tree,
    h("h2", {}, "Pairs made from it"),
    pairs.length ? pairs.map((pair) => pairCard(app, pair, false)) : h("p", { class: "quiet" }, "None.")) };
}

// MCTS marks its chosen steps; SPaR the refinement that ended its search.
function chosenPath(group) {
  const byIndex = new Map(group.samples.map((sample) => [sample.sample, sample]));
  const path = new Set(group.samples.filter((s) => s.stats.chosen === 1).map((s) => s.sample));
  for (const sample of group.samples.filter((s) => s.stats.final === 1)) {
    for (let at = sample; at; at = byIndex.get(at.parent)) path.add(at.sample);
  }
  return path;
}

// Sample -> the names of the pairs that it is part of.
function pairRoles(group) {
  const roles = new Map();
  group.examples.filter((example) => example.rows.length === 2).forEach((example, i) => {
    example.rows.forEach((row, side) => {
      if (!roles.has(row.sample)) roles.set(row.sample, []);
      roles.get(row.sample).push([`pair ${i + 1}: ${side ? "rejected" : "chosen"}`, side ? "bad" : "good"]);
    });
  });
  return roles;
}

function node(sample, children, path, roles) {
  const stats = NODE_STATS.filter(([name]) => sample.stats[name] !== undefined && sample.stats[name] !== null)
    .map(([name, label]) => `${label} ${number(sample.stats[name], 3)}`);
  if (sample.stats.votes_total) stats.push(`votes ${sample.stats.votes_yes} yes, ${sample.stats.votes_no} no`);
  if (sample.stats.verdict !== undefined) stats.push(["unreadable", "no", "yes"][sample.stats.verdict + 1]);
  if (sample.score !== null) stats.push(`score ${number(sample.score)}`);
  const line = [
    badge(sample.kind === "step" ? `#${sample.sample}` : `${sample.kind} #${sample.sample}`), " ",
    h("span", { class: "one", title: sample.text }, sample.text.trim().replace(/\s+/g, " ").slice(0, 160) || "(empty)"),
    h("span", { class: "stats" }, stats.join(" · ")), " ",
    flags(sample), (roles.get(sample.sample) || []).map(([text, kind]) => [" ", badge(text, kind)]),
  ];
  const own = children.get(sample.sample) || [];
  const onPath = path.has(sample.sample);
  const long = sample.text.length > 160;
  if (!own.length && !long) return h("div", { class: onPath ? "leaf path" : "leaf" }, line);
  return h("details", { class: onPath ? "path" : null, open: onPath && own.length > 0 }, h("summary", {}, line),
    long && h("div", { class: "text message" }, sample.text),
    h("div", { class: "tree" }, own.map((child) => node(child, children, path, roles))));
}
