// What every page of ours has: a few short names.  Scripts are joined and wrapped by page.py.
const $ = (s, e = document) => e.querySelector(s), $$ = (s, e = document) => [...e.querySelectorAll(s)];
const make = (tag, css, text) => { const e = document.createElement(tag);
  if (css) e.className = css; if (text !== undefined) e.textContent = text; return e; };
const show = v => v === 0 ? "0" : Math.abs(v) >= 1e4 || Math.abs(v) < 1e-3
  ? v.toPrecision(3) : String(+v.toPrecision(4));
