"""The style sheet and the script of a report's page.

One self-contained web page about a fusion: no file beside it, nothing asked of the network.

Every text that comes from models, files or callers is escaped. A content policy in the page itself
forbids whatever a browser might fetch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from .._files import write_text
from ..ir import SegmentAlignment
from ._shared import safe
from .alignment_picture import count_of, inserted, lay_out, render, shades, shortened
from .report import Accuracy, Report, SpaceReport

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


_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


_HINT = (
    "Drag to move, zoom with the buttons or with Ctrl and the wheel; "
    "point at a layer or a cost to see its name, width and cost."
)


def save_page(
    report: Report,
    path: str | os.PathLike[str],
    accuracy: Mapping[str, Accuracy],
    facts: Mapping[str, str],
) -> None:
    """Write the page of a report in one step.

    Args:
        report: What a fusion did.
        path: The file to write.
        accuracy: Accuracy in percent by the name of a network, or accuracy and loss.
        facts: What else is known, by name.
    """
    write_text(path, page_of(report, accuracy, facts))


def page_of(report: Report, accuracy: Mapping[str, Accuracy], facts: Mapping[str, str]) -> str:
    """Return the page of a report as HTML."""
    title = "Fusion of " + " and ".join(report.alignment.names)
    sections = [
        _summary(report),
        _section("Accuracy", _accuracy(accuracy)) if accuracy else "",
        _section("Alignment", _picture(report)),
        _section("Layer costs", _costs(report)),
        _section("Refit", _fits(report)) if report.layers else "",
        _section("Spaces and couplings", _spaces(report)),
        _section("Frozen", _frozen(report)),
        _section("Time and memory", _stages(report)),
        _section("Where it comes from", _facts(report, facts)),
    ]
    head = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}</style>\n</head>"
    )
    body = "\n".join(s for s in sections if s)
    tip = '<div id="tip" role="tooltip" hidden></div>'
    return (
        f"{head}\n<body>\n<main>\n<h1>{safe(title)}</h1>\n{body}\n</main>\n{tip}\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


# --- parts of HTML --------------------------------------------------------------------------------


def _section(title: str, inside: str) -> str:
    return f"<section>\n<h2>{safe(title)}</h2>\n{inside}\n</section>" if inside else ""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; heads that start with `#` are of numbers. Cells are HTML already."""
    numeric = [' class="n"' if h.startswith("#") else "" for h in heads]
    top = "".join(f"<th{c}>{safe(h.lstrip('#'))}</th>" for h, c in zip(heads, numeric))
    lines = [
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, numeric)) + "</tr>"
        for row in rows
    ]
    inside = f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>"
    return f'<div class="wide"><table>\n{inside}\n</table></div>'


def _folded(summary: str, inside: str, opened: bool) -> str:
    attribute = " open" if opened else ""
    return f"<details{attribute}><summary>{safe(summary)}</summary>\n{inside}\n</details>"


def _bar(share: float, kind: str = "") -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    return f'<span class="bar {kind}"><span style="width:{width:.1f}%"></span></span>'


def _number(value: float | None, form: str = ".4g") -> str:
    return "" if value is None else format(value, form)


# --- sections -------------------------------------------------------------------------------------


def _summary(report: Report) -> str:
    rows = []
    for k, name in enumerate(report.alignment.names):
        layers = [n for s in report.alignment.segments for n in s.slots[k] if n is not None]
        known = report.alignment.facts[k] if report.alignment.facts else {}
        size = count_of(sum(known[n].parameters for n in layers if n in known)) if known else ""
        lost = len(report.removed[k]) if report.removed else 0
        new = inserted(report.alignment, report.removed, k)
        added, merged = f"{new} neutral layers", f"{lost} layers merged away"
        error = f"relative error {report.errors[k]:.3g}" if report.errors[k] else ""
        note = ", ".join(filter(None, (added if new else "", merged if lost else "", error)))
        mark = "yes" if k == report.anchor else ""
        share = f"{report.weights[k]:.4g}"
        rows.append([safe(name), str(len(layers)), size, share, mark, safe(note)])
    heads = [
        "network",
        "#layers",
        "#parameters in them",
        "#weight",
        "anchor",
        "depth made equal by",
    ]
    told = "".join(f"<li>{safe(line)}</li>" for line in [*str(report).split("\n"), *report.heads])
    return f'{_table(heads, rows)}\n<ul class="told">{told}</ul>'


def _accuracy(accuracy: Mapping[str, Accuracy]) -> str:
    both = any(isinstance(v, tuple) for v in accuracy.values())
    rows = []
    for name, value in accuracy.items():
        correct, loss = value if isinstance(value, tuple) else (value, None)
        row = [safe(name), f"{correct:.2f} %", _bar(correct / 100)]
        rows.append([*row, _number(loss)] if both else row)
    return _table(["network", "#accuracy", "", *(["#loss"] if both else [])], rows)


def _picture(report: Report) -> str:
    label = "alignment of " + " and ".join(report.alignment.names)
    scene = lay_out(report.alignment, report.removed)
    buttons = "".join(
        f'<button type="button" data-zoom="{factor}" aria-label="{name}">{sign}</button>'
        for factor, name, sign in (
            ("0.8", "zoom in", "+"),
            ("1.25", "zoom out", "&minus;"),
            ("0", "show all", "whole"),
            ("1", "actual size", "1:1"),
        )
    )
    return (
        f'<p class="hint">{_HINT}</p>\n<div class="tools">{buttons}</div>\n'
        f'<div id="picture" style="--tall: {scene.height:g}px">{render(scene, label)}</div>'
    )


def _costs(report: Report) -> str:
    found = []
    for at, s in enumerate(report.alignment.segments):
        for k, matrix in enumerate(s.costs):
            if matrix is not None and k != s.reference and len(matrix) > 1:
                names = report.alignment.names[s.reference], report.alignment.names[k]
                title = f"{at + 1}. {s.label}: {names[0]} (rows), {names[1]} (columns)"
                found.append(_folded(title, _heat_map(s, k), len(matrix) <= 12))
    hint = (
        '<p class="hint">Blue is the most alike within a segment, orange the least; frames are '
        "around what was chosen, and layers of different kinds, which never match, are blank.</p>"
    )
    return "\n".join([hint, *found]) if found else ""


def _heat_map(segment: SegmentAlignment, k: int) -> str:
    matrix = segment.costs[k] or ()
    finite = [c for row in matrix for c in row if abs(c) != float("inf")]
    rows = shortened(segment.slots[segment.reference])[1]
    own = [i for i, name in enumerate(segment.slots[k]) if name is not None]
    columns = shortened([segment.slots[k][i] for i in own])[1]
    heads = "".join(f"<th><span>{safe(c)}</span></th>" for c in columns)
    lines = []
    for i, (name, row) in enumerate(zip(rows, matrix)):
        cells = "".join(_cost_cell(c, finite, own[j] == i) for j, c in enumerate(row))
        lines.append(f"<tr><th>{safe(name)}</th>{cells}</tr>")
    inside = f"<thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n" + "\n".join(lines)
    return f'<div class="wide"><table class="heat">\n{inside}\n</tbody></table></div>'


def _cost_cell(cost: float, all_costs: Sequence[float], chosen: bool) -> str:
    mark = ' class="chosen"' if chosen else ""
    if abs(cost) == float("inf"):
        return f"<td{mark}></td>"
    low, high = min(all_costs), max(all_costs)
    fill = shades((cost - low) / (high - low or 1.0))[0]
    text = f"{cost:.2f}" if high >= 0.1 else f"{cost:.2g}"
    return f'<td{mark} title="{cost:.6g}" style="background:{fill}">{text}</td>'


def _fits(report: Report) -> str:
    poor = {layer.node for layer in report.poor}
    rows = []
    for layer in report.layers:
        kind = "poor" if layer.node in poor else ""
        shown = [safe(layer.node), f"{layer.explained:.3f}", _bar(layer.explained, kind)]
        rows.append([*shown, f"{layer.ridge:.3g}"])
    table = _table(["layer", "#R squared", "", "#ridge"], rows)
    worst = min(report.layers, key=lambda layer: layer.explained)
    summary = f"{len(rows)} layers, the least explained {worst.node} with {worst.explained:.3f}"
    return _folded(summary, table, len(rows) <= 40)


def _spaces(report: Report) -> str:
    heads = ["space", "#units"]
    for name in report.alignment.names:
        heads += [name, "#mass", "#in place", "#cost", "#confidence"]
    table = _table(heads, ([*_space(s)] for s in report.spaces))
    total = sum(s.size for s in report.spaces)
    summary = f"{len(report.spaces)} spaces of {total:,} units"
    hint = (
        '<p class="hint">Of each network: its units and how they meet the fused ones; mass is what '
        "a fused unit is given on average, in place the share of it that keeps its index.</p>"
    )
    return hint + _folded(summary, table, len(report.spaces) <= 40)


def _space(space: SpaceReport) -> Iterable[str]:
    yield safe(space.name)
    yield str(space.size)
    facts = zip(space.sizes, space.couplings, space.costs, space.confidences)
    for size, coupling, cost, confidence in facts:
        yield f"{size} &middot; {safe(coupling.kind)}"
        yield f"{coupling.mass:.3g}"
        yield "" if coupling.kind == "absent" else f"{100 * coupling.identity:.0f} %"
        yield _number(cost)
        yield _number(confidence, ".3f")


def _frozen(report: Report) -> str:
    if not report.frozen:
        return "<p>Nothing: every unit could be matched.</p>"
    rows = [
        [safe(f.tensor), str(f.dim), str(f.count), safe(f.node), safe(f.reason)]
        for f in report.frozen
    ]
    table = _table(["tensor", "#axis", "#units", "at", "reason"], rows)
    return _folded(f"{len(rows)} axes stay in place", table, len(rows) <= 12)


def _stages(report: Report) -> str:
    if not report.seconds:
        return ""
    total = max(sum(report.seconds.values()), 1e-9)
    rows = []
    for stage, seconds in report.seconds.items():
        peak = report.memory.get(stage)
        memory = "" if peak is None else f"{peak / 2**20:,.0f} MiB"
        rows.append([safe(stage), f"{seconds:.2f} s", _bar(seconds / total), memory])
    rows.append(["<b>all</b>", f"<b>{total:.2f} s</b>", "", ""])
    return _table(["stage", "#time", "", "#peak memory by its end"], rows)


def _facts(report: Report, facts: Mapping[str, str]) -> str:
    known = dict(facts)
    known |= {f"seed of {name}": str(seed) for name, seed in report.seeds.items()}
    known |= {f"SHA-256 of {path}": digest for path, digest in report.files.items()}
    known |= report.versions
    rows = [[safe(name), f"<code>{safe(value)}</code>"] for name, value in known.items()]
    return _table(["", ""], rows)
