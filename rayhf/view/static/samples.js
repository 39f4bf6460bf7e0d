// Samples: the filtered list, one prompt's group side by side, a held-out prompt over iterations.
"use strict";

const FILTERS = [
  ["text", "text in completion or prompt", "search"],
  ["first", "from iteration", "number"],
  ["last", "to iteration", "number"],
  ["minimum", "lowest score", "number"],
  ["maximum", "highest score", "number"],
  ["source", "source", "text"],
  ["kind", "kind", "text"],
];
const OUTCOMES = [["", "any"], ["Scored", "Scored"], ["Invalid", "Invalid"], ["Skipped", "Skipped"], ["Failed", "Failed"], ["none", "not scored"]];
const KINDS = ["answer", "step", "rollout", "judgement", "refinement"];
const SAMPLE_TABS = [["samples", "Training samples"], ["heldout", "Held-out prompts over iterations"]];

function sampleTabs(app, current) {
  return tabs(SAMPLE_TABS, current, (key) => app.href(key, {}));
}

async function samplesPage(app) {
  const query = { run: app.run, ...app.parameters };
  const form = h("form", { onsubmit: (event) => { event.preventDefault(); apply(); } },
    FILTERS.map(([name, label, type]) =>
      h("label", {}, label, h("input", { name, type, step: "any", list: name === "kind" && "kinds", value: query[name] || "" }))),
    h("label", {}, "outcome", select(OUTCOMES, query.outcome || "", () => {}, { name: "outcome" })),
    ["truncated", "labeled"].map((name) => h("label", { class: "check" },
      h("input", { name, type: "checkbox", checked: query[name] === "true" }), name === "labeled" ? "labeled by people" : name)),
    h("datalist", { id: "kinds" }, KINDS.map((kind) => h("option", { value: kind }))),
    h("button", { type: "submit" }, "filter"),
    h("a", { href: app.href("samples", {}) }, "clear"));
  function apply() {
    const values = {};
    for (const input of form.elements) {
      if (input.name) values[input.name] = input.type === "checkbox" ? (input.checked ? "true" : "") : input.value.trim();
    }
    app.go("samples", values);
  }
  const list = pagedList((next) => app.source.samples({ ...query, next }), (rows) => sampleTable(app, rows), "No sample matches.");
  return { page: h("div", {}, h("h1", {}, "Samples"), sampleTabs(app, "samples"), note(app), form, list) };
}

function note(app) {
  const text = app.source.note();
  return text && h("p", { class: "note" }, text);
}

function sampleTable(app, rows) {
  return table([
    ["iteration", (s) => s.iteration, "number"],
    ["sample", (s) => s.sample, "number"],
    ["kind", (s) => s.kind, ""],
    ["source", (s) => s.source, ""],
    ["prompt", (s) => h("div", { class: "text" }, s.prompt), "wide"],
    ["reference answer", (s) => h("div", { class: "text" }, s.reference_answer), "answer"],
    ["completion", (s) => h("div", { class: "text" }, s.text), "wide"],
    ["score", (s) => number(s.score), "number"],
    ["", (s) => [flags(s), s.reason && h("div", { class: "quiet" }, s.reason)], ""],
  ], rows, (s) => app.go("group", { iteration: s.iteration, prompt: s.prompt_id }));
}

// ---------------------------------------------------------------- one prompt

async function groupPage(app) {
  const { iteration, prompt } = app.parameters;
  const group = await app.source.group(app.run, Number(iteration), prompt);
  const { runs } = await app.source.overview([app.run]);
  const criteria = (runs[0] && runs[0].criteria) || {};
  const modes = tokenModes(group.samples);
  const cards = h("div", { class: "cards" });
  let mode = modes.some(([name]) => name === app.tokenMode) ? app.tokenMode : "";
  let sorted = false;
  function show() {
    const scale = tokenScale(group.samples, mode);
    const samples = sorted ? [...group.samples].sort((a, b) => (b.score ?? -Infinity) - (a.score ?? -Infinity)) : group.samples;
    replace(cards, samples.map((sample) => sampleCard(sample, mode, scale, criteria)));
  }
  show();
  const named = group.samples.some((sample) => sample.tokens);
  const pairs = group.examples.filter((example) => example.rows.length === 2);
  const page = h("div", {},
    h("h1", {}, `Prompt ${group.prompt_id}, iteration ${group.iteration}`),
    h("p", {}, h("a", { href: app.href("samples", {}) }, "all samples"),
      hasTree(group) && [" · ", h("a", { href: app.href("tree", { iteration, prompt }) }, "search tree")]),
    messages(group.messages),
    referenceAnswer(group),
    Object.keys(group.row).length > 0 && h("details", {}, h("summary", {}, "columns of the row"),
      table([["column", (r) => r[0], ""], ["value", (r) => h("div", { class: "text" }, r[1]), "wide"]], Object.entries(group.row))),
    h("form", {},
      h("label", {}, "color of tokens", select(modes, mode, (name) => { mode = name; app.tokenMode = name; show(); }, { name: "mode", disabled: !named })),
      h("label", { class: "check" }, h("input", { type: "checkbox", onchange: (e) => { sorted = e.target.checked; show(); } }), "best score first"),
      h("span", { class: "quiet" }, named
        ? "Blue is above zero, orange below; hover over a token for its number. Reference, learner and advantage are known for samples that were trained on."
        : "Tokens cannot be shown: the run has no policy/tokenizer.json yet.")),
    cards,
    matrixOf(group),
    pairs.length > 0 && [h("h2", {}, "Training pairs of this prompt"), pairs.map((pair) => pairCard(app, pair, false))]);
  return { page };
}

function messages(list) {
  return list.map((message) => h("div", { class: "message" }, h("b", {}, message.role), h("div", { class: "text" }, message.content)));
}

function referenceAnswer(prompt) {
  return prompt.reference_answer && messages([{ role: "reference answer", content: prompt.reference_answer }]);
}

function sampleCard(sample, mode, scale, criteria) {
  const parts = Object.entries(sample.scores);
  const stats = Object.entries(sample.stats);
  return h("section", { class: "card" },
    h("header", {}, h("b", {}, `#${sample.sample}`), sample.kind !== "answer" && sample.kind, flags(sample),
      h("span", { class: "quiet" }, `${sample.length} tokens, weights ${sample.version}`),
      h("span", { class: "score" }, sample.score === null ? "" : number(sample.score))),
    sample.reason && h("p", { class: "note" }, sample.reason),
    sample.thinking && h("details", {}, h("summary", { class: "quiet" }, "thinking"), h("div", { class: "text" }, sample.thinking)),
    tokenText(sample, mode, scale),
    (parts.length > 1 || (parts.length > 0 && criteria[parts[0][0]])) && table([
      ["part of the score", (r) => [r[0], criteria[r[0]] && h("div", { class: "quiet" }, criteria[r[0]])], ""],
      ["", (r) => number(r[1]), "number"]], parts),
    replyBlocks(sample.replies, sample.sample, { criteria }),
    stats.length > 0 && h("p", { class: "quiet" }, stats.map(([name, value]) => `${name} ${number(value, 3)}`).join(" · ")));
}

// ---------------------------------------------------------------- held-out prompts

async function heldoutPage(app) {
  const page = h("div", {}, h("h1", {}, "Samples"), sampleTabs(app, "heldout"));
  const prompts = await app.source.heldoutPrompts(app.run);
  if (!prompts.length) {
    page.append(h("p", { class: "quiet" }, "This run has recorded no held-out completions."));
    return { page };
  }
  const chosen = app.parameters.prompt || prompts[0].prompt_id;
  const shown = prompts.find((each) => each.prompt_id === chosen) || { prompt: "" };
  const answers = await app.source.heldoutAnswers(app.run, chosen);
  const kinds = [...new Set(answers.map((row) => row.kind))];
  const iterations = [...new Set(answers.map((row) => row.iteration))].sort((a, b) => a - b);
  const find = (iteration, kind) => answers.find((row) => row.iteration === iteration && row.kind === kind);
  const options = prompts.map((each) => [each.prompt_id, each.prompt.replace(/\s+/g, " ").slice(0, 90)]);
  append(page, [
    h("form", {}, h("label", {}, "prompt", select(options, chosen, (prompt) => app.go("heldout", { prompt }), { name: "prompt" }))),
    messages([{ role: "user", content: shown.prompt }]),
    referenceAnswer(shown),
    table([
      ["iteration", (i) => i, "number"],
      ...kinds.flatMap((kind) => [
        [kind, (i) => { const row = find(i, kind); return row && [h("div", { class: "text" }, row.text), flags({ ...row, truncated: row.finish_reason === "length" }), replyBlocks(row.replies, 0)]; }, "wide"],
        ["score", (i) => { const row = find(i, kind); return row && (row.score === null ? row.reason : number(row.score)); }, "number"],
      ]),
    ], iterations)]);
  return { page };
}
