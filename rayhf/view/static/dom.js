// Small helpers for building pages. Text always becomes a text node, never HTML.
"use strict";

function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

function replace(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

// Plotly reads a few HTML tags in names and labels.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function number(value, digits = 4) {
  if (value === null || value === undefined) return "";
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return String(value);
  const size = Math.abs(value);
  return size >= 1e6 || (size < 1e-3 && size > 0) ? value.toExponential(2) : String(Number(value.toPrecision(digits)));
}

function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (value >= size) return `${(value / size).toFixed(1)} ${unit}`;
  }
  return `${value} B`;
}

// columns: [title, row => cell, "number" or ""]
function table(columns, rows, onclick) {
  const head = columns.map(([title, , kind]) => h("th", { class: kind }, title));
  const body = rows.map((row) =>
    h(
      "tr",
      onclick && { class: "link", tabindex: 0, onclick: () => onclick(row), onkeydown: (e) => e.key === "Enter" && onclick(row) },
      columns.map(([, cell, kind]) => h("td", { class: kind }, cell(row))),
    ),
  );
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

function select(options, value, onchange, attributes) {
  const element = h("select", { ...attributes, onchange: () => onchange(element.value) },
    options.map(([key, label]) => h("option", { value: key, selected: key === value }, label)));
  return element;
}

function tabs(names, current, href) {
  return h("div", { class: "tabs" }, names.map(([key, label]) =>
    h("a", { href: href(key), "aria-current": key === current ? "page" : null }, label)));
}

function badge(text, kind) {
  return h("span", { class: `badge ${kind || ""}` }, text);
}

function outcomeBadge(sample) {
  if (!sample.outcome || sample.outcome === "Scored") return null;
  return badge(sample.outcome, sample.outcome === "Failed" ? "bad" : "warn");
}

function flags(sample) {
  return [
    outcomeBadge(sample),
    sample.truncated && badge("truncated", "warn"),
    sample.labeled && badge(`person: ${sample.labeled}`, "good"),
  ];
}

// What judges wrote, a block each. `sample` is the completion that was shown first, or alone.
function replyBlocks(replies, sample, { criteria = {}, open = false } = {}) {
  return (replies || []).map((reply) => h("details", { class: "reply", open },
    h("summary", { class: "quiet" },
      [reply.part || "judge", reply.against !== null && `#${sample} first, #${reply.against} second`].filter(Boolean).join(": "), " ",
      reply.left_out && badge("does not count", "warn")),
    criteria[reply.part] && h("div", { class: "quiet" }, criteria[reply.part]),
    h("div", { class: "text" }, spoken(reply.text))));
}

// A reply that is a JSON object (of a judge with a schema) as lines "name: value".
function spoken(text) {
  try {
    const fields = JSON.parse(text);
    if (fields && fields.constructor === Object) {
      return Object.entries(fields).map(([name, value]) => `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`).join("\n");
    }
  } catch {
    // Any other text.
  }
  return text;
}

// First pages of lists that are being loaded; a page counts as shown once they are there.
const pending = [];

// A list that loads page after page: load(next) => page; show(rows) => node.
function pagedList(load, show, empty) {
  const rows = h("div", {});
  const status = h("p", { class: "quiet", role: "status" });
  const more = h("button", { type: "button", hidden: true, onclick: () => next(cursor) }, "more");
  let cursor = null;
  let count = 0;
  async function next(from) {
    more.disabled = true;
    try {
      const page = await load(from);
      count += page.rows.length;
      if (page.rows.length) rows.append(show(page.rows));
      cursor = page.next;
      more.hidden = !cursor;
      const searched = cursor && page.reached !== undefined ? `, searched down to iteration ${page.reached}` : "";
      status.textContent = count || cursor ? `${count} shown${searched}` : empty;
    } catch (error) {
      status.textContent = error.message;
    }
    more.disabled = false;
  }
  pending.push(next(null));
  return h("div", {}, rows, status, more);
}

// ---------------------------------------------------------------- words that differ

const MAX_WORDS = 800;

// Returns two lists of [word, whether it is only in this text], by longest common subsequence.
function wordDiff(first, second) {
  const a = first.split(/(\s+)/).filter(Boolean);
  const b = second.split(/(\s+)/).filter(Boolean);
  if (a.length > MAX_WORDS || b.length > MAX_WORDS) return null;
  const width = b.length + 1;
  const length = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      length[i * width + j] =
        a[i] === b[j]
          ? length[(i + 1) * width + j + 1] + 1
          : Math.max(length[(i + 1) * width + j], length[i * width + j + 1]);
    }
  }
  const left = [];
  const right = [];
  let i = 0;
  let j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      left.push([a[i++], false]);
      right.push([b[j++], false]);
    } else if (j >= b.length || (i < a.length && length[(i + 1) * width + j] >= length[i * width + j + 1])) {
      left.push([a[i++], true]);
    } else {
      right.push([b[j++], true]);
    }
  }
  return [left, right];
}

function diffText(words, tag) {
  return h("div", { class: "text" }, words.map(([word, own]) => (own && word.trim() ? h(tag, {}, word) : word)));
}

// ---------------------------------------------------------------- tokens

const TOKEN_COLORS = [
  ["", "no colors", null],
  ["logp", "log-prob", (t, i) => t.logp[i]],
  ["reference", "gap: log-prob − reference", (t, i) => t.reference && t.logp[i] - t.reference[i]],
  ["learner", "gap: learner − engine", (t, i) => t.learner && t.learner[i] - t.logp[i]],
  ["advantage", "advantage", (t, i) => t.advantage && t.advantage[i]],
  ["value", "value of the critic", (t, i) => t.value && t.value[i]],
];

// Color modes that at least one of the samples has numbers for.
function tokenModes(samples) {
  const known = new Set(["", "logp"]);
  for (const sample of samples) for (const name of Object.keys(sample.tokens || {})) known.add(name);
  return TOKEN_COLORS.filter(([name]) => known.has(name));
}

// The largest absolute value among samples, so that they share one scale.
function tokenScale(samples, mode) {
  const [, , value] = TOKEN_COLORS.find(([name]) => name === mode);
  let largest = 0;
  for (const sample of samples) {
    if (!value || !sample.tokens) continue;
    sample.tokens.text.forEach((_, i) => {
      const size = Math.abs(value(sample.tokens, i));
      if (size > largest) largest = size;
    });
  }
  return largest;
}

function tokenText(sample, mode, scale) {
  const [, label, value] = TOKEN_COLORS.find(([name]) => name === mode);
  const tokens = sample.tokens;
  if (!value || !tokens || !tokens.text.length) return h("div", { class: "text" }, sample.text);
  const spans = tokens.text.map((text, i) => {
    const x = value(tokens, i);
    const known = typeof x === "number" && Number.isFinite(x);
    const strength = known && scale ? Math.min(1, Math.abs(x) / scale) : 0;
    const color = known && x < 0 ? "214, 96, 20" : "31, 95, 153";
    return h("span", {
      title: `${JSON.stringify(text)}  ${label} ${known ? number(x, 3) : "not recorded"}`,
      style: { backgroundColor: `rgba(${color}, ${(0.6 * strength).toFixed(3)})` },
    }, text);
  });
  return h("div", { class: "text tokens" }, spans);
}
