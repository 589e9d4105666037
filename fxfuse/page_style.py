"""The style sheet and the script of a report's page."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b2733; --muted: #5d6873; --paper: #ffffff;
  --panel: #f7f7f4; --rule: #d9dcdf; --good: #2668ac; --poor: #c85c20; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7ea; --muted: #9aa5af; --paper: #14181c; --panel: #1c2126; --rule: #363d44;
    --good: #6aa5dd; --poor: #e58a52; }
  #picture text { fill: var(--ink); }
  #picture .fx-note, #picture .fx-inserted text { fill: var(--muted); }
  #picture .fx-chip text { fill: #1b2733; }
  #picture .fx-band rect { fill: #20262c; }
  #picture .fx-layer rect { fill: #24394e; stroke: #6d94bb; }
  #picture .fx-inserted rect { fill: #14181c; stroke: #7a858f; }
  #picture .fx-merged rect { fill: #40284a; stroke: #b07fc0; }
  #picture .fx-chain { stroke: #56616b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; line-height: 1.25; margin: 0 0 18px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 10px; padding-bottom: 5px;
  border-bottom: 1px solid var(--rule); }
.hint { color: var(--muted); margin: 0 0 10px; }
.told { margin: 14px 0 0; padding-left: 20px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
thead th { color: var(--muted); font-weight: 600; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
code { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: 13px;
  overflow-wrap: anywhere; }
summary { cursor: pointer; margin: 6px 0; }
.bar { display: inline-block; width: 150px; height: 9px; background: var(--rule);
  border-radius: 2px; }
.bar span { display: block; height: 100%; background: var(--good); border-radius: 2px; }
.bar.poor span { background: var(--poor); }
.heat { font-size: 11px; }
.heat td { padding: 3px 5px; text-align: right; border: 1px solid var(--paper); color: #1b2733; }
.heat thead td { border: 0; }
.heat td.chosen { font-weight: 700; outline: 2px solid #c8281e; outline-offset: -2px; }
.heat th { border: 0; padding: 2px 8px 2px 0; font-weight: 400; color: var(--muted);
  white-space: nowrap; }
.heat thead th { vertical-align: bottom; padding: 2px 4px; }
.heat thead span { writing-mode: vertical-rl; transform: rotate(180deg); }
.tools { margin: 0 0 8px; display: flex; gap: 6px; }
button { font: inherit; min-width: 38px; padding: 2px 10px; color: var(--ink); cursor: pointer;
  background: var(--panel); border: 1px solid var(--rule); border-radius: 5px; }
#picture { border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; cursor: grab;
  touch-action: pan-y; }
#picture.held { cursor: grabbing; }
#picture svg { display: block; width: 100%; height: min(86vh, var(--tall)); }
#picture g:hover rect { stroke-width: 2; }
#tip { position: fixed; z-index: 2; max-width: 460px; padding: 7px 10px; font-size: 13px;
  white-space: pre-line; overflow-wrap: anywhere; pointer-events: none; color: var(--ink);
  background: var(--panel); border: 1px solid var(--rule); border-radius: 5px;
  box-shadow: 0 2px 10px rgba(0, 0, 0, .25); }
#tip[hidden] { display: none; }
@media print { .tools, .hint { display: none; } #picture svg { height: auto; } }
"""

# The titles, which show without a script too, become the tips; the view box is what moves.
SCRIPT = """
"use strict";
(function () {
  const frame = document.getElementById("picture"), tip = document.getElementById("tip");
  const svg = frame && frame.querySelector("svg");
  if (!svg) return;
  const whole = svg.viewBox.baseVal, size = [whole.width, whole.height];
  let view = [0, 0, size[0], size[1]], held = null;
  function show() { svg.setAttribute("viewBox", view.map((v) => v.toFixed(2)).join(" ")); }
  function place(event) {
    const at = new DOMPoint(event.clientX, event.clientY);
    return at.matrixTransform(svg.getScreenCTM().inverse());
  }
  function zoom(factor, x, y) {
    const wide = Math.min(Math.max(view[2] * factor, 80), size[0] * 4), by = wide / view[2];
    view = [x - (x - view[0]) * by, y - (y - view[1]) * by, wide, view[3] * by];
    show();
  }
  function actual() {
    const box = svg.getBoundingClientRect();
    view = [(size[0] - box.width) / 2, 0, box.width, box.height];
    show();
  }
  document.querySelectorAll("[data-zoom]").forEach((button) => {
    button.addEventListener("click", () => {
      const factor = Number(button.dataset.zoom);
      if (factor === 0) { view = [0, 0, size[0], size[1]]; show(); }
      else if (factor === 1) actual();
      else zoom(factor, view[0] + view[2] / 2, view[1] + view[3] / 2);
    });
  });
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    const at = place(event);
    zoom(event.deltaY > 0 ? 1.15 : 1 / 1.15, at.x, at.y);
  }, { passive: false });
  svg.addEventListener("pointerdown", (event) => {
    held = place(event);
    svg.setPointerCapture(event.pointerId);
    frame.classList.add("held");
    event.preventDefault();
  });
  svg.addEventListener("pointermove", (event) => {
    if (!held) return;
    const at = place(event);
    view[0] += held.x - at.x;
    view[1] += held.y - at.y;
    show();
  });
  function release() { held = null; frame.classList.remove("held"); }
  svg.addEventListener("pointerup", release);
  svg.addEventListener("pointercancel", release);
  svg.querySelectorAll("g").forEach((group) => {
    const title = group.querySelector("title");
    if (!title) return;
    const text = title.textContent;
    title.remove();
    group.setAttribute("aria-label", text);
    group.addEventListener("pointermove", (event) => {
      tip.textContent = text;
      tip.hidden = held !== null;
      const box = tip.getBoundingClientRect();
      const x = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
      const y = event.clientY + 18 + box.height > window.innerHeight
        ? event.clientY - box.height - 12 : event.clientY + 18;
      tip.style.left = Math.max(x, 4) + "px";
      tip.style.top = Math.max(y, 4) + "px";
    });
    group.addEventListener("pointerleave", () => { tip.hidden = true; });
  });
  if (svg.getBoundingClientRect().height < 0.9 * size[1]) actual();
})();
"""
