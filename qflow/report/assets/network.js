// The network from its inputs to its outputs: boxes at places that the page states, with zoom by wheel, keys and buttons.
"use strict";

function drawNetwork(place, data, width) {
  keyOf(place, data.legend);
  const tools = document.createElement("div");
  tools.className = "tools";
  place.append(tools);
  const height = Math.round(Math.min(720, Math.max(260, (width * data.height) / data.width)));
  const svg = make(place, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": data.label });
  const world = make(svg, "g");
  data.edges.forEach(([path, far]) => make(world, "path", { d: path, class: `edge${far ? " far" : ""}` }));
  const marks = data.ops.map((op) => {
    const node = make(world, "g", { class: "op", transform: `translate(${op.x} ${op.y})` });
    make(node, "rect", { width: data.box[0], height: data.box[1], rx: 4, class: `box ${op.dtype}` });
    make(node, "text", { x: 6, y: 14 }, op.short);
    if (op.sensitive) make(node, "rect", { x: 6, y: 19, width: op.sensitive, height: 4, class: "sensitive" });
    if (op.time) make(node, "rect", { x: 6, y: 25, width: op.time, height: 4, class: "time" });
    return { node, text: op.text };
  });
  const view = { x: 0, y: 0, k: 1 };
  const apply = () => world.setAttribute("transform", `translate(${view.x} ${view.y}) scale(${view.k})`);
  const fit = () => {
    view.k = Math.min(width / data.width, height / data.height);
    view.x = (width - view.k * data.width) / 2;
    view.y = (height - view.k * data.height) / 2;
    apply();
  };
  const zoom = (by, x = width / 2, y = height / 2) => {
    const k = Math.min(6, Math.max(0.03, view.k * by));
    view.x = x - ((x - view.x) * k) / view.k;
    view.y = y - ((y - view.y) * k) / view.k;
    view.k = k;
    apply();
  };
  const pan = (dx, dy) => { view.x += dx; view.y += dy; apply(); };
  for (const [text, act] of [["+", () => zoom(1.4)], ["\u2212", () => zoom(1 / 1.4)], ["fit", fit]]) {
    const button = document.createElement("button");
    button.textContent = text;
    button.setAttribute("aria-label", { "+": "larger", "\u2212": "smaller", fit: "the whole network" }[text]);
    button.addEventListener("click", act);
    tools.append(button);
  }
  place.classList.add("zoom");
  svg.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && document.activeElement !== svg) return;  // the page scrolls unless the picture was clicked
    event.preventDefault();
    const box = svg.getBoundingClientRect(), unit = width / box.width;
    zoom(event.deltaY < 0 ? 1.15 : 1 / 1.15, (event.clientX - box.left) * unit, (event.clientY - box.top) * unit);
  }, { passive: false });
  drag(svg, width, pan, zoom);
  explained(svg, marks);
  svg.addEventListener("keydown", (event) => {
    if (event.key === "+" || event.key === "=") zoom(1.4);
    if (event.key === "-") zoom(1 / 1.4);
    if (event.key === "0") fit();
  });
  fit();
}

function drag(svg, width, pan, zoom) {
  const held = new Map();
  svg.addEventListener("pointerdown", (event) => { held.set(event.pointerId, event); svg.focus({ preventScroll: true }); });
  svg.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId), unit = width / svg.getBoundingClientRect().width;
    if (!before) return;
    if (held.size === 1) pan((event.clientX - before.clientX) * unit, (event.clientY - before.clientY) * unit);
    if (held.size === 2) {
      const other = [...held.values()].find((e) => e.pointerId !== event.pointerId);
      const far = (e) => Math.hypot(e.clientX - other.clientX, e.clientY - other.clientY) || 1;
      zoom(far(event) / far(before));
    }
    held.set(event.pointerId, event);
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
    svg.addEventListener(name, (event) => held.delete(event.pointerId));
  }
}

function keyOf(place, entries) {
  const legend = document.createElement("div");
  legend.className = "legend";
  for (const [name, kind] of entries) {
    const item = document.createElement("span"), svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 14 12");
    const group = make(svg, "g", { class: "op" });
    if (kind === "sensitive" || kind === "time") make(group, "rect", { y: 4, width: 14, height: 4, class: kind });
    else make(group, "rect", { y: 1, width: 14, height: 10, rx: 2, class: `box ${kind}` });
    item.append(svg, name);
    legend.append(item);
  }
  place.append(legend);
}
