const svg = (cursor, tag, at) => { const e = document.createElementNS(cursor.namespaceURI, tag);
  for (const k in at) e.setAttribute(k, at[k]); cursor.append(e); };

// ---- Charts: the nearest step of every line under the pointer or the arrow keys
const watchCharts = root => { for (const fig of $$(".chart", root)) {
  const { frame: f, lines } = JSON.parse(fig.dataset.chart);
  const plot = $(":scope > svg", fig), cursor = $(".cursor", plot), box = make("div", "hover");
  box.hidden = true; fig.append(box); plot.tabIndex = 0;
  const place = (x, y) => { y = f.log ? Math.log10(Math.max(y, 1e-300)) : y;
    const up = Math.min(Math.max((y - f.y[0]) / ((f.y[1] - f.y[0]) || 1), -.02), 1.02);
    return [f.left + (x - f.x[0]) / ((f.x[1] - f.x[0]) || 1) * f.width, f.top + (1 - up) * f.height]; };
  let at = f.x[1];
  const draw = x => {
    at = Math.min(Math.max(x, f.x[0]), f.x[1]);
    cursor.replaceChildren(); box.replaceChildren(); box.hidden = false;
    let step = null;
    const near = (f.x[1] - f.x[0]) / 40; // a line that has ended says nothing
    const here = lines.filter(l => at >= l.x[0] - near && at <= l.x[l.x.length - 1] + near);
    if (!here.length) { box.hidden = true; return; }
    const rows = here.map(l => { let i = 0;
      l.x.forEach((v, j) => { if (Math.abs(v - at) < Math.abs(l.x[i] - at)) i = j; });
      if (step === null || Math.abs(l.x[i] - at) < Math.abs(step - at)) step = l.x[i];
      return [l, i]; });
    const [px] = place(step, 1);
    svg(cursor, "line", { x1: px, x2: px, y1: f.top, y2: f.top + f.height });
    box.append(make("div", "", "step " + show(step)));
    for (const [l, i] of rows) {
      const [cx, cy] = place(l.x[i], l.y[i]);
      svg(cursor, "circle", { cx, cy, r: 3.6, class: "c" + l.slot });
      const row = make("div", "", l.name); row.append(make("b", "", show(l.y[i]))); box.append(row);
    }
    const scale = plot.clientWidth / 356, left = px * scale;
    const top = plot.getBoundingClientRect().top - fig.getBoundingClientRect().top;
    box.style.top = top + f.top * scale + "px";
    if (left > plot.clientWidth / 2) { box.style.left = "auto"; box.style.right = plot.clientWidth - left + 10 + "px"; }
    else { box.style.right = "auto"; box.style.left = left + 10 + "px"; }
  };
  const hide = () => { box.hidden = true; cursor.replaceChildren(); };
  plot.addEventListener("pointermove", e => { const r = plot.getBoundingClientRect();
    draw(f.x[0] + ((e.clientX - r.left) / r.width * 356 - f.left) / f.width * (f.x[1] - f.x[0])); });
  plot.addEventListener("pointerleave", hide); plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", e => { const d = { ArrowLeft: -1, ArrowRight: 1 }[e.key];
    if (d) { draw(at + d * (f.x[1] - f.x[0]) / 60); e.preventDefault(); e.stopPropagation(); } });
} };
