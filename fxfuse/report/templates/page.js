"use strict";
// The titles, which show without a script too, become the tips; the view box is what moves.
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
  const box = svg.getBoundingClientRect();  // all of it on a narrow page, a part of a tall picture
  if (box.height < 0.9 * size[1] * Math.min(1, box.width / size[0])) actual();
})();
