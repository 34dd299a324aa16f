// Runs that go on: asks every two seconds what has changed, and only then for that.
const list = $("#list"), pane = $("#pane"), pinned = $("#pinned"), more = $("#more"), count = $("#count");
const filters = $("#filters"), buttons = $$("button", filters), find = $("input", filters);
const wish = Object.fromEntries(new URLSearchParams(location.search)), versions = {};
let rows = [], total = 0, current = null, asked = 0;
watchCharts($("#curves"));

const ask = async path => { const reply = await fetch(path);
  if (!reply.ok && reply.status !== 404) throw new Error(`${path}: ${reply.status}`); return reply; };

// ---- The runs
const span = s => s < 90 ? `${Math.round(s)} s` : s < 5400 ? `${Math.round(s / 60)} min` : `${(s / 3600).toFixed(1)} h`;
const drawRuns = runs => $("#runs").replaceChildren(...runs.map(r => {
  const li = make("li", r.state), bar = make("progress"), far = make("span", "far"), latest = make("span", "latest");
  if (r.total) { bar.max = r.total; bar.value = r.step; }
  bar.setAttribute("aria-label", `${r.name}: step ${r.step ?? 0} of ${r.total ?? "?"}`);
  far.textContent = r.step === undefined ? r.state : (r.state === "done" ? `${r.step} steps` : `step ${r.step}${r.total ? " of " + r.total : ""}`)
    + (r.state === "done" ? " · done" : r.state === "quiet" ? " · nothing new for a while" : r.total ? ` · ${span(r.left)} left` : "")
    + ` · ${r.seconds.toFixed(r.seconds < 10 ? 2 : 0)} s a step · ${Math.round(100 * r.goodput)} % goodput`;
  for (const [name, value] of Object.entries(r.latest)) { const s = make("span", "", name + " ");
    s.append(make("b", "", value >= 1000 ? value.toFixed(0) : String(+value.toPrecision(3)))); latest.append(s); }
  li.append(make("b", "", r.name), bar, far, latest); return li; }));

// ---- The list
const address = () => { const q = new URLSearchParams(Object.entries(wish).filter(([, v]) => v));
  history.replaceState(null, "", (String(q) ? "?" + q : location.pathname) + (current ? "#" + current : "")); return q; };
const line = (r, i) => {
  const li = make("li", i && r.task === rows[i - 1].task && r.step === rows[i - 1].step ? "sibling" : "first"), a = make("a");
  a.href = "#" + r.number; a.title = r.question; if (r.number === current) a.setAttribute("aria-current", "true");
  const [mark, css] = { correct: ["✓", "ok"], wrong: ["✗", "ko"] }[r.verdict] || ["·", ""];
  const what = make("span", "what " + r.help, r.task + " "); what.append(make("span", "n", r.sample + 1),
    make("span", "looks", "▣".repeat(Math.min(r.ops - r.errors, 6)) + "!".repeat(Math.min(r.errors, 6))));
  a.append(make("span", "mark " + css, mark), what, make("span", "when", r.step >= 0 ? "step " + r.step : r.run));
  li.append(a); return li;
};
const load = async (from = 0) => {
  const mine = ++asked, q = address(); q.set("offset", from);
  const told = await (await ask("/list?" + q)).json();
  if (mine !== asked) return; // another was asked for meanwhile
  rows = from ? [...rows, ...told.rows] : told.rows; total = told.total;
  if (from) list.append(...told.rows.map((r, i) => line(r, from + i))); else list.replaceChildren(...rows.map(line));
  more.hidden = rows.length >= total;
  count.textContent = `${total.toLocaleString("en")} in ${(1000 * told.seconds).toFixed(0)} ms`;
};
const fresh = async () => { await load(); if (!rows.some(r => r.number === current)) await open(rows[0]?.number); };
more.onclick = () => load(rows.length);

// ---- One trajectory
const open = async (number, asked_for) => {
  current = number ?? null; address();
  for (const a of $$("a", list)) a.toggleAttribute("aria-current", false);
  if (current === null) { pane.replaceChildren(make("p", "empty", "Nothing fits these filters.")); return; }
  const a = $(`a[href="#${current}"]`, list);
  if (a) { a.setAttribute("aria-current", "true"); const box = a.parentElement;
    if (box.offsetTop < list.scrollTop || box.offsetTop + box.offsetHeight > list.scrollTop + list.clientHeight)
      list.scrollTop = box.offsetTop - list.clientHeight / 2; }
  const html = await (await ask("/trajectory/" + current)).text();
  if (number !== current) return;
  pane.innerHTML = html; // of view/live.py, which escapes all that it was told
  for (const i of $$("img[data-picture]", pane)) { i.loading = "lazy"; i.src = `/picture/${number}/${i.dataset.picture}`; }
  if (asked_for && pane.getBoundingClientRect().top < 0) pane.scrollIntoView();
};
const pin = () => {
  const kept = $("[data-number]", pane), same = kept && $("[data-number]", pinned)?.dataset.number === kept.dataset.number;
  pinned.replaceChildren(...(kept && !same ? [kept.cloneNode(true)] : []));
  pinned.hidden = !pinned.children.length; $(".panes").classList.toggle("two", !pinned.hidden);
};
document.addEventListener("toggle", async e => { const d = e.target; // what is computed only when it is asked for
  if (!d.open || !d.dataset.tokens || d.dataset.asked) return;
  d.dataset.asked = "1"; const html = await (await ask("/tokens/" + d.dataset.tokens)).text();
  d.innerHTML = d.querySelector("summary").outerHTML + html; }, true);
document.addEventListener("click", e => { const a = e.target.closest(".list a, .group a");
  if (a) { e.preventDefault(); open(+a.hash.slice(1), true); } });

// ---- Filters and keys
const drawFilters = () => { for (const b of buttons) if (b.dataset.key !== "tokens") b.setAttribute("aria-pressed", wish[b.dataset.key] === b.dataset.value);
  for (const s of $$("select", filters)) s.value = wish[s.dataset.key] || (s.dataset.key === "sort" ? "newest" : ""); };
const press = b => { const { key, value } = b.dataset;
  if (key === "tokens") { b.setAttribute("aria-pressed", document.body.classList.toggle("show-tokens")); return; }
  wish[key] = wish[key] === value ? "" : value; drawFilters(); fresh(); };
buttons.forEach(b => b.addEventListener("click", () => press(b)));
for (const s of $$("select", filters)) s.addEventListener("change", () => { wish[s.dataset.key] = s.value; fresh(); });
let typing; find.value = wish.text || "";
find.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(() => { wish.text = find.value; fresh(); }, 120); });
document.addEventListener("keydown", async e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.target.matches("input, select")) { if (e.key === "Escape") e.target.blur(); return; }
  const move = async d => { e.preventDefault(); let i = rows.findIndex(r => r.number === current) + d;
    if (i >= rows.length && rows.length < total) await load(rows.length);
    i = Math.min(Math.max(i, 0), rows.length - 1); if (rows[i]) open(rows[i].number, true); };
  const k = e.key;
  if (k === "j" || k === "ArrowRight") move(1); else if (k === "k" || k === "ArrowLeft") move(-1);
  else if (k === "p") pin(); else if (k === "/") { find.focus(); e.preventDefault(); }
  else { const b = buttons.find(b => b.dataset.press === k); if (b) press(b); }
});
const drawChoices = choices => { for (const s of $$("select", filters)) {
  const known = choices[s.dataset.key]; if (!known || s.options.length === known.length + 1) continue;
  const name = v => s.dataset.key === "step" ? (v >= 0 ? "step " + v : "synthesized") : v || "(none)";
  s.replaceChildren(s.options[0], ...known.map(v => new Option(name(v), v))); s.hidden = known.length < 2; } drawFilters(); };

// ---- What has changed
const look = async () => {
  if (!document.hidden) try {
    const state = await (await ask("/state")).json();
    drawRuns(state.runs);
    if (versions.curves !== undefined && versions.curves !== state.curves) {
      const curves = $("#curves"); curves.innerHTML = await (await ask("/curves")).text(); watchCharts(curves); }
    if (versions.trajectories !== state.trajectories) { drawChoices(state.choices);
      if (versions.trajectories === undefined) { await load(); await open(+location.hash.slice(1) || rows[0]?.number); }
      else if (rows.length <= 100) await (current === null ? fresh() : load()); }
    Object.assign(versions, { curves: state.curves, trajectories: state.trajectories });
    document.body.classList.remove("lost");
  } catch { document.body.classList.add("lost"); $("#count").textContent = "the server does not answer"; }
  setTimeout(look, 2000);
};
look();
