// Navigation: the part of the address after # names the page and its parameters.
"use strict";

const PAGES = {
  overview: overviewPage, samples: samplesPage, group: groupPage, heldout: heldoutPage, pairs: pairsPage,
  wins: winsPage, judgments: judgmentsPage, trees: treesPage, tree: treePage, timeline: timelinePage,
};
const SECTIONS = { group: "samples", heldout: "samples", wins: "pairs", judgments: "pairs", tree: "trees" };
const REFRESH_MS = 5000;

const app = {
  source: null,
  all: [],
  selected: [],
  run: "",
  page: "",
  parameters: {},
  metric: "",
  tokenMode: "",

  href(page, parameters) {
    const search = new URLSearchParams();
    for (const run of this.selected) search.append("run", run);
    if (this.run !== this.selected[0]) search.append("one", this.run);
    for (const [name, value] of Object.entries(parameters)) if (value !== "" && value !== undefined) search.append(name, value);
    return `#${page}?${search}`;
  },

  go(page, parameters) {
    const target = this.href(page, parameters);
    if (location.hash === target) show();
    else location.hash = target;
  },
};

function readAddress() {
  const [page, search] = location.hash.slice(1).split("?");
  const parameters = new URLSearchParams(search || "");
  const known = new Set(app.all.map((run) => run.id));
  const asked = parameters.getAll("run").filter((run) => known.has(run));
  if (asked.length) app.selected = asked;
  const one = parameters.get("one");
  app.run = known.has(one) ? one : app.selected[0];
  app.page = PAGES[page] ? page : "overview";
  app.parameters = Object.fromEntries([...parameters].filter(([name]) => name !== "run" && name !== "one"));
}

let shows = 0;

async function show() {
  readAddress();
  const mine = ++shows;
  const main = document.getElementById("page");
  header();
  try {
    if (!app.selected.length) {
      replace(main, h("p", { class: "quiet" }, "There is no run here yet."));
      return;
    }
    const { page, shown } = await PAGES[app.page](app);
    if (mine !== shows) return;
    replace(main, oneRun(), page);
    if (shown) await shown();
    await Promise.all(pending.splice(0));
  } catch (error) {
    if (mine === shows) replace(main, h("p", { class: "note", role: "alert" }, error.message));
  }
  document.body.dataset.shown = `${app.page} ${mine}`;
}

function header() {
  for (const link of document.querySelectorAll("nav a")) {
    const name = link.getAttribute("href").slice(1).split("?")[0];
    link.href = app.href(name, {});
    if (name === (SECTIONS[app.page] || app.page)) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (app.all.length < 2) return;
  const open = document.querySelector("#runs details[open]") !== null;
  replace(document.getElementById("runs"), h("details", { open }, h("summary", {}, app.selected.join(", ")),
    h("div", { class: "menu" }, app.all.map((run) => h("label", {},
      h("input", { type: "checkbox", checked: app.selected.includes(run.id), onchange: (e) => choose(run.id, e.target.checked) }),
      run.id, h("span", { class: "quiet" }, run.error ? "damaged" : `${run.state} ${run.iteration}/${run.iterations}`))))));
}

function choose(run, on) {
  const chosen = on ? [...app.selected, run] : app.selected.filter((each) => each !== run);
  if (!chosen.length) return header();
  app.selected = chosen;
  app.run = chosen[0];
  app.go(app.page === "group" || app.page === "tree" ? "samples" : app.page, {});
}

// On pages about one run: which of the selected ones.
function oneRun() {
  if (app.page === "overview" || app.selected.length < 2) return null;
  return h("p", {}, "run ", select(app.selected.map((run) => [run, run]), app.run, (run) => {
    app.run = run;
    app.go(SECTIONS[app.page] || app.page, {});
  }, { "aria-label": "run" }));
}

// The overview of a live run is drawn again when its files have changed.
async function refresh() {
  if (document.hidden) return;
  const status = document.getElementById("live");
  try {
    const before = JSON.stringify(app.all.filter((run) => app.selected.includes(run.id)));
    app.all = await app.source.runs();
    status.textContent = `live, ${new Date().toTimeString().slice(0, 8)}`;
    if (!app.selected.length) app.selected = firstRun();
    const after = JSON.stringify(app.all.filter((run) => app.selected.includes(run.id)));
    if (before !== after && (app.page === "overview" || app.page === "timeline")) {
      const top = window.scrollY;
      await show();
      window.scrollTo(0, top);
    } else {
      header();
    }
  } catch (error) {
    status.textContent = `no connection (${error.message})`;
  }
}

function firstRun() {
  const active = app.all.find((run) => run.state === "running") || app.all.find((run) => !run.error);
  return active ? [active.id] : [];
}

async function start() {
  const data = document.getElementById("data");
  app.source = data ? new EmbeddedSource(await readEmbedded(data)) : new ServerSource();
  app.all = await app.source.runs();
  app.selected = data ? app.all.map((run) => run.id) : firstRun();
  window.addEventListener("hashchange", show);
  await show();
  if (app.source.live) setInterval(refresh, REFRESH_MS);
}

start().catch((error) => replace(document.getElementById("page"), h("p", { class: "note", role: "alert" }, error.message)));
