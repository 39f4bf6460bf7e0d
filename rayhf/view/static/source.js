// Where the pages get their data: from the file itself (report), or from the server (dashboard).
// Both answer the same questions with the same JSON, as promises.
"use strict";

const PAGE = 50;

async function readEmbedded(element) {
  const binary = atob(element.textContent);
  const bytes = Uint8Array.from(binary, (c) => c.charCodeAt(0));
  element.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

class EmbeddedSource {
  constructor(data) {
    this.data = data;
    this.live = false;
  }

  note() {
    const { shown, total } = this.data.sampled;
    return shown < total
      ? `This file holds the samples of ${shown} of ${total} prompts, spread over all iterations.`
      : "";
  }

  async runs() {
    return this.data.overview.runs;
  }

  async overview(names) {
    const runs = this.data.overview.runs.filter((run) => names.includes(run.id));
    return { runs, differences: names.length > 1 ? this.data.overview.differences : [] };
  }

  async timeline(run) {
    return this.data.timelines[run];
  }

  groups(query) {
    return this.data.groups
      .filter((group) => group.run === query.run)
      .filter((group) => !query.first || group.iteration >= Number(query.first))
      .filter((group) => !query.last || group.iteration <= Number(query.last))
      .sort((a, b) => b.iteration - a.iteration);
  }

  async samples(query) {
    const text = (query.text || "").toLowerCase();
    const has = (value) => (value || "").toLowerCase().includes(text);
    const rows = [];
    for (const group of this.groups(query)) {
      if (query.source && group.source !== query.source) continue;
      const inPrompt = group.messages.some((message) => has(message.content));
      for (const sample of group.samples) {
        if (query.kind && sample.kind !== query.kind) continue;
        if (query.outcome && (sample.outcome || "none") !== query.outcome) continue;
        if (query.minimum && !(sample.score !== null && sample.score >= Number(query.minimum))) continue;
        if (query.maximum && !(sample.score !== null && sample.score <= Number(query.maximum))) continue;
        if (query.truncated && !sample.truncated) continue;
        if (query.labeled && !sample.labeled) continue;
        if (query.replied && !sample.replies.length) continue;
        if (text && !inPrompt && !has(sample.text)) continue;
        rows.push({ ...sample, ...position(group) });
      }
    }
    return this.page(rows, query, this.data.sampled.samples[query.run]);
  }

  async prompts(query) {
    const wanted = {
      tree: (group) => group.samples.some((s) => s.parent !== null || s.kind === "step"),
      wins: (group) => group.samples.some((s) => s.wins !== null),
    }[query.has];
    const groups = this.groups(query).filter(wanted || (() => true));
    const rows = groups.map((group) => ({ ...position(group), samples: group.samples.length }));
    return this.page(rows, query, rows.length);
  }

  async pairs(query) {
    const rows = this.groups(query).flatMap((group) =>
      group.examples.filter((example) => example.rows.length === 2),
    );
    return this.page(rows, query, rows.length);
  }

  page(rows, query, total) {
    const start = query.next ? query.next[1] : 0;
    const end = start + PAGE;
    return { rows: rows.slice(start, end), next: end < rows.length ? [0, end] : null, total };
  }

  async group(run, iteration, prompt) {
    const found = this.data.groups.find(
      (g) => g.run === run && g.iteration === iteration && g.prompt_id === prompt,
    );
    if (!found) throw new Error("this prompt is not among those that the file holds");
    return found;
  }

  async heldoutPrompts(run) {
    return this.data.heldout[run].prompts;
  }

  async heldoutAnswers(run, prompt) {
    return this.data.heldout[run].answers[prompt] || [];
  }
}

function position(group) {
  const last = group.messages[group.messages.length - 1];
  return {
    run: group.run,
    iteration: group.iteration,
    prompt_id: group.prompt_id,
    source: group.source,
    prompt: last ? last.content : "",
    reference_answer: group.reference_answer,
  };
}

class ServerSource {
  constructor() {
    this.live = true;
  }

  note() {
    return "";
  }

  async get(what, parameters) {
    const search = new URLSearchParams();
    for (const [name, value] of Object.entries(parameters)) {
      if (value === null || value === undefined || value === "" || value === false) continue;
      for (const each of Array.isArray(value) ? value : [value]) search.append(name, each);
    }
    const response = await fetch(`api/${what}?${search}`);
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error || `the server answered ${response.status}`);
    return answer;
  }

  runs() {
    return this.get("runs", {});
  }

  overview(names) {
    return this.get("overview", { run: names });
  }

  timeline(run) {
    return this.get("timeline", { run });
  }

  list(what, query) {
    const { next, ...rest } = query;
    const cursor = next ? { iteration: next[0], row: next[1] } : {};
    return this.get(what, { ...rest, ...cursor });
  }

  samples(query) {
    return this.list("samples", query);
  }

  prompts(query) {
    return this.list("prompts", query);
  }

  pairs(query) {
    return this.list("pairs", query);
  }

  group(run, iteration, prompt) {
    return this.get("group", { run, iteration, prompt });
  }

  heldoutPrompts(run) {
    return this.get("heldout", { run });
  }

  heldoutAnswers(run, prompt) {
    return this.get("heldout", { run, prompt });
  }
}
