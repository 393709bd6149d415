"use strict";
(() => {
  const box = document.getElementById("map");
  const svg = box.querySelector("svg");
  const output = box.querySelector("output");
  // Of each building: id, area in m2, confidence in %, and its bounds in tenths of pixels of the picture.
  const facts = JSON.parse(document.getElementById("facts").textContent);
  const whole = svg.viewBox.baseVal.width;
  const tall = svg.viewBox.baseVal.height;
  let view = { x: 0, y: 0, zoom: 1 };
  let active = false;

  function show(next) {
    const zoom = Math.min(64, Math.max(1, next.zoom));
    const width = whole / zoom, height = tall / zoom;
    view = {
      zoom,
      x: Math.min(whole - width, Math.max(0, next.x)),
      y: Math.min(tall - height, Math.max(0, next.y)),
    };
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${width} ${height}`);
    box.classList.toggle("near", zoom > 1);
  }
  function place(event) {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return { x: point.x, y: point.y };
  }
  function zoomAbout(by, at) {
    const zoom = Math.min(64, Math.max(1, view.zoom * by));
    const share = view.zoom / zoom;
    show({ zoom, x: at.x - (at.x - view.x) * share, y: at.y - (at.y - view.y) * share });
  }
  function middle() {
    return { x: view.x + whole / view.zoom / 2, y: view.y + tall / view.zoom / 2 };
  }
  function tell(at) {
    let best = null, size = Infinity;
    const x = 10 * at.x, y = 10 * at.y;
    for (const fact of facts) {
      const [, , , left, top, right, bottom] = fact;
      const area = (right - left) * (bottom - top);
      if (x >= left && x <= right && y >= top && y <= bottom && area < size) { best = fact; size = area; }
    }
    output.textContent = best ? `${best[0]}: ${best[1]} m², confidence ${(best[2] / 100).toFixed(2)}` : "";
  }

  for (const button of box.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      const by = Number(button.dataset.zoom);
      if (by) zoomAbout(by, middle()); else show({ x: 0, y: 0, zoom: 1 });
    });
  }
  svg.addEventListener("keydown", (event) => {
    const step = 0.2 * whole / view.zoom;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key === "+" || event.key === "=") zoomAbout(2, middle());
    else if (event.key === "-") zoomAbout(0.5, middle());
    else if (moves[event.key] && view.zoom > 1) {
      show({ ...view, x: view.x + moves[event.key][0], y: view.y + moves[event.key][1] });
    } else return;
    event.preventDefault();
  });
  // The page scrolls over the map until somebody has clicked on it.
  svg.addEventListener("wheel", (event) => {
    if (!active && !event.ctrlKey) return;
    event.preventDefault();
    zoomAbout(Math.exp(-event.deltaY / 400), place(event));
  }, { passive: false });
  document.addEventListener("pointerdown", (event) => { active = box.contains(event.target); });

  const held = new Map();
  svg.addEventListener("pointerdown", (event) => {
    held.set(event.pointerId, { x: event.clientX, y: event.clientY });
    tell(place(event));
  });
  svg.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) { if (event.pointerType === "mouse") tell(place(event)); return; }
    if (!svg.hasPointerCapture(event.pointerId)) svg.setPointerCapture(event.pointerId);
    const scale = svg.getScreenCTM().a;
    const others = [...held].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    if (others.length) {
      const far = (at) => Math.hypot(at.x - others[0].x, at.y - others[0].y);
      zoomAbout(far({ x: event.clientX, y: event.clientY }) / Math.max(1, far(before)), place(event));
    } else if (view.zoom > 1) {
      show({ ...view, x: view.x - (event.clientX - before.x) / scale, y: view.y - (event.clientY - before.y) / scale });
    }
    held.set(event.pointerId, { x: event.clientX, y: event.clientY });
  });
  for (const end of ["pointerup", "pointercancel"]) {
    svg.addEventListener(end, (event) => held.delete(event.pointerId));
  }
  // On paper there is all of it, and what is folded is unfolded.
  addEventListener("beforeprint", () => {
    show({ x: 0, y: 0, zoom: 1 });
    for (const it of document.querySelectorAll("details")) it.open = true;
  });
})();
