// Two charts: `xy` (points, lines and intervals on two axes) and `bars` (one bar a row). Both fill the width they get.
"use strict";

function ticksOf(low, high, log, most) {
  if (log) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const step = Math.max(1, Math.ceil((last - first + 1) / most));
    const found = [];
    for (let i = first; i <= last; i += step) found.push(10 ** i);
    return found.length > 1 ? found : [low, high];
  }
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-3 ? Number(value.toPrecision(3)).toExponential().replace("e+", "e") : String(+value.toPrecision(4));
}

function scaleOf({ low, high, log }, from, to) {
  const way = log ? Math.log10 : (v) => v;
  const a = way(low), b = way(high);
  return (value) => from + (to - from) * (b > a ? (way(value) - a) / (b - a) : 0.5);
}

function shape(parent, kind, x, y, size, classes) {
  if (kind === "dot") return make(parent, "circle", { cx: x, cy: y, r: size, class: classes });
  const s = size * 1.25;
  const path = {
    diamond: `M${x} ${y - s}L${x + s} ${y}L${x} ${y + s}L${x - s} ${y}Z`,
    square: `M${x - size} ${y - size}H${x + size}V${y + size}H${x - size}Z`,
    triangle: `M${x} ${y - s}L${x + s} ${y + size}L${x - s} ${y + size}Z`,
    star: starPath(x, y, size * 1.9),
  }[kind];
  return make(parent, "path", { d: path, class: classes });
}

function starPath(x, y, r) {
  const points = [...Array(10).keys()].map((i) => {
    const radius = i % 2 ? r * 0.45 : r, angle = -Math.PI / 2 + (i * Math.PI) / 5;
    return `${x + radius * Math.cos(angle)} ${y + radius * Math.sin(angle)}`;
  });
  return `M${points.join("L")}Z`;
}

function legendOf(place, entries) {
  const legend = document.createElement("div");
  legend.className = "legend";
  for (const { name, color, mark, open, line } of entries) {
    if (!name) continue;
    const item = document.createElement("span"), svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "0 0 14 12");
    svg.setAttribute("class", color);
    if (line) make(svg, "path", { d: "M0 6H14", class: "trace" });
    if (mark) shape(svg, mark, 7, 6, 4, `mark${open ? " open" : ""}`);
    item.append(svg, name);
    legend.append(item);
  }
  if (legend.children.length) place.append(legend);
}

function canvas(place, width, height, label) {
  const svg = make(place, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  return svg;
}

function drawXY(place, data, width) {
  legendOf(place, data.series);
  const narrow = width < 560, height = Math.min(data.height, Math.max(260, width * 0.75));
  const named = data.x.names || null, below = named && !narrow ? data.x.room : 44;
  const left = 58, right = width - 16, top = 18, bottom = height - below;
  const svg = canvas(place, width, height, data.label), axes = make(svg, "g", { class: "axis" });
  const sx = scaleOf(data.x, left, right), sy = scaleOf(data.y, bottom, top);
  for (const v of ticksOf(data.y.low, data.y.high, data.y.log, 6)) {
    make(axes, "path", { d: `M${left} ${sy(v)}H${right}`, class: "grid" });
    make(axes, "text", { x: left - 6, y: sy(v) + 4, "text-anchor": "end" }, number(v));
  }
  if (named) nameColumns(axes, named, sx, bottom, narrow);
  else for (const v of ticksOf(data.x.low, data.x.high, data.x.log, narrow ? 4 : 8)) {
    make(axes, "path", { d: `M${sx(v)} ${bottom}v5`, class: "grid" });
    make(axes, "text", { x: sx(v), y: bottom + 18, "text-anchor": "middle" }, number(v));
  }
  make(axes, "path", { d: `M${left} ${top}V${bottom}H${right}`, class: "grid", fill: "none" });
  make(axes, "text", { x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, data.x.title);
  make(axes, "text", { x: 14, y: (top + bottom) / 2, "text-anchor": "middle",
    transform: `rotate(-90 14 ${(top + bottom) / 2})` }, data.y.title);
  for (const rule of data.rules || []) drawRule(svg, rule, { sx, sy, left, right, top, bottom });
  const marks = [];
  for (const series of data.series) {
    const group = make(svg, "g", { class: series.color });
    const points = series.points.map(([x, y, text, href, low, high]) => ({
      x: sx(x), y: sy(y), text, href, low: low == null ? null : sx(low), high: high == null ? null : sx(high),
    }));
    if (series.line) {
      const path = points.map((p, i) => (i ? (series.line === "step" ? `H${p.x}V${p.y}` : `L${p.x} ${p.y}`) : `M${p.x} ${p.y}`));
      make(group, "path", { d: path.join("") || "M0 0", class: "trace" });
    }
    for (const p of points) if (p.low != null) {
      const [a, b] = [Math.max(p.low, left), Math.min(p.high, right)];
      const ends = [a, b].filter((x) => x > left && x < right).map((x) => `M${x} ${p.y - 4}v8`);  // not where it goes on
      make(group, "path", { d: `M${a} ${p.y}H${b}${ends.join("")}`, class: "whisker" });
    }
    if (series.mark) for (const p of points) {
      const classes = `mark${series.open ? " open" : ""}${series.pale ? " pale" : ""}`;
      const node = shape(linked(group, p.href), series.mark, p.x, p.y, series.size || 5, classes);
      marks.push({ node, text: p.text, href: p.href });
    }
    if (series.label) for (const p of points) {
      const end = p.x > (left + right) / 2;
      make(group, "text", { x: p.x + (end ? -10 : 10), y: p.y - 9, "text-anchor": end ? "end" : "start", class: "own" }, series.label);
    }
  }
  explained(svg, marks);
}

function nameColumns(axes, names, sx, bottom, narrow) {
  const apart = Math.max(1, Math.ceil(14 / Math.max(sx(1) - sx(0), 0.1)));
  names.forEach((name, i) => {
    if (i % apart || narrow) return;
    const x = sx(i) + 4;
    make(axes, "text", { x, y: bottom + 8, "text-anchor": "end", transform: `rotate(-90 ${x} ${bottom + 8})` }, name);
  });
}

function drawRule(svg, { axis, at, text, color }, { sx, sy, left, right, top, bottom }) {
  const group = make(svg, "g", { class: color });
  if (axis === "y") {
    make(group, "path", { d: `M${left} ${sy(at)}H${right}`, class: "rule" });
    make(group, "text", { x: right, y: sy(at) - 5, "text-anchor": "end", class: "own" }, text);
  } else {
    const end = sx(at) > (left + right) / 2;
    make(group, "path", { d: `M${sx(at)} ${top}V${bottom}`, class: "rule" });
    make(group, "text", { x: sx(at) + (end ? -5 : 5), y: top - 5, "text-anchor": end ? "end" : "start", class: "own" }, text);
  }
}

function drawBars(place, data, width) {
  legendOf(place, data.legend);
  const row = 20, names = Math.min(data.names, Math.round(width * 0.42)), top = 26;
  const height = top + row * data.rows.length + 8, left = names + 8, letters = Math.max(6, ...data.rows.map((r) => r.label.length));
  const right = width - Math.min(14 + 6.3 * letters, width * 0.34);
  const svg = canvas(place, width, height, data.label), axes = make(svg, "g", { class: "axis" });
  const sx = scaleOf({ low: 0, high: data.high || 1 }, left, Math.max(right, left + 40));
  for (const v of ticksOf(0, data.high || 1, false, width < 560 ? 2 : 6)) {
    make(axes, "path", { d: `M${sx(v)} ${top}V${height - 6}`, class: "grid" });
    make(axes, "text", { x: sx(v), y: top - 7, "text-anchor": "middle" }, number(v));
  }
  const most = Math.max(6, Math.floor(names / 6.6)), marks = [];
  data.rows.forEach(({ name, value, spread, color, open, label, text }, i) => {
    const y = top + row * i, short = name.length > most ? `\u2026${name.slice(1 - most)}` : name;
    const group = make(svg, "g", { class: color });
    make(group, "text", { x: left - 6, y: y + 14, "text-anchor": "end" }, short);
    const end = value == null ? left : sx(Math.min(Math.max(value, 0), data.high || 1));
    const node = make(group, "rect", { x: left, y: y + 3, width: Math.max(end - left, 1.5), height: row - 6,
      class: `mark${open ? " open" : ""}` });
    if (spread) {
      const [a, b] = [sx(Math.max(value - spread, 0)), Math.min(sx(value + spread), right)];
      make(group, "path", { d: `M${a} ${y + row / 2}H${b}M${a} ${y + 6}v8M${b} ${y + 6}v8`, class: "rule" });
    }
    const after = spread ? Math.max(end, Math.min(sx(value + spread), right)) : end;
    make(group, "text", { x: after + 5, y: y + 14, class: "quiet" }, label);
    marks.push({ node, text });
  });
  explained(svg, marks);
}
