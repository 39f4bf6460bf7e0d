// Faults and timeline: what was lost or repeated, what waited for what, which checkpoints are kept.
"use strict";

const ITERATIONS_DRAWN = 40;

async function timelinePage(app) {
  const data = await app.source.timeline(app.run);
  const chart = h("div", { class: "chart tall" });
  const last = Math.max(0, ...data.phases.map((phase) => phase.iteration));
  const drawn = data.phases.filter((phase) => phase.iteration > last - ITERATIONS_DRAWN);
  const kinds = [...new Set(data.events.map((event) => event.kind))].sort();
  const body = h("div", {});
  const show = (kind) => replace(body, eventTable(data.events.filter((event) => !kind || event.kind === kind)));
  const attempts = new Set(data.events.map((event) => event.attempt)).size;
  const faults = data.events.filter((event) => event.kind === "fault").length;
  show("");
  const page = h("div", {},
    h("h1", {}, "Faults and timeline"),
    h("p", {}, `Faults: ${faults}. Attempts: ${attempts}. Iterations repeated after a restart: ${data.rewound}.`),
    h("figure", {}, h("figcaption", {}, `Phases, iterations ${Math.max(0, last - ITERATIONS_DRAWN + 1)} to ${last}`), chart),
    data.waits.length > 0 && [h("h2", {}, "What waited for what"), table([
      ["over all iterations", (r) => r.what, ""],
      ["seconds", (r) => r.seconds.toFixed(1), "number"],
      ["share of the time", (r) => `${(100 * r.share).toFixed(1)} %`, "number"],
    ], data.waits)],
    h("h2", {}, "Checkpoints kept"),
    data.checkpoints.length
      ? table([
        ["checkpoint", (c) => c.name, ""],
        ["size", (c) => bytes(c.bytes), "number"],
        ["saved", (c) => new Date(1000 * c.time).toISOString().slice(0, 19).replace("T", " "), ""],
        ["", (c) => [c.name === data.committed && badge("committed", "good"), " ", c.name === `iteration-${String(data.best).padStart(6, "0")}` && badge("best"), !c.healthy && badge("paused by a guard", "warn")], ""],
      ], data.checkpoints)
      : h("p", { class: "quiet" }, "None."),
    h("h2", {}, "Events"),
    data.left_out > 0 && h("p", { class: "note" }, `${data.left_out} older events are left out.`),
    h("form", {}, h("label", {}, "kind", select([["", "all"], ...kinds.map((kind) => [kind, kind])], "", show, { name: "kind" }))),
    body);
  return { page, shown: () => gantt(chart, drawn) };
}

function eventTable(events) {
  return table([
    ["time (UTC)", (e) => e.time.slice(0, 19).replace("T", " "), "time"],
    ["attempt", (e) => e.attempt, "number"],
    ["iteration", (e) => e.iteration, "number"],
    ["kind", (e) => badge(e.kind, { fault: "bad", warn: "warn", pause: "warn" }[e.kind]), ""],
    ["message", (e) => h("div", { class: "text" }, e.message, e.code ? ` (exit code ${e.code})` : ""), "wide"],
  ], [...events].reverse());
}

// One row per phase name, one bar per time it was entered.
function gantt(element, phases) {
  const order = [...new Set(phases.map((phase) => phase.name))];
  const traces = order.map((name, i) => {
    const own = phases.filter((phase) => phase.name === name);
    return {
      type: "bar",
      orientation: "h",
      base: own.map((phase) => phase.start),
      x: own.map((phase) => Math.max(1, new Date(phase.end) - new Date(phase.start))),
      y: own.map(() => plain(name)),
      text: own.map((phase) => `iteration ${phase.iteration}, attempt ${phase.attempt}, ${((new Date(phase.end) - new Date(phase.start)) / 1000).toFixed(1)} s`),
      hoverinfo: "text+y",
      textposition: "none",
      marker: { color: COLORS[i % COLORS.length] },
    };
  });
  return draw(element, traces, layout("", {
    showlegend: false, hovermode: "closest", bargap: 0.25, barmode: "overlay",
    margin: { l: 110, r: 8, t: 8, b: 36 },
    xaxis: { type: "date", gridcolor: "#eef1f4" }, yaxis: { autorange: "reversed", gridcolor: "#fff" },
  }));
}
