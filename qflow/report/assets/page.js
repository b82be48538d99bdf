// The page: tooltips, copy buttons, the contents list, and which chart draws what. No library, no network.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function make(parent, name, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text) node.textContent = text;
  parent.append(node);
  return node;
}

const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
tip.setAttribute("role", "status");
document.body.append(tip);

function showTip(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const { offsetWidth: w, offsetHeight: h } = tip;
  tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - w - 8))}px`;
  tip.style.top = `${y + 16 + h > innerHeight ? Math.max(4, y - h - 12) : y + 16}px`;
}

function hideTip() {
  tip.hidden = true;
}

// Marks of a chart are one stop of the Tab key; the arrow keys move among them, Enter follows a link.
function explained(svg, marks) {
  let at = -1;
  const go = (to) => {
    if (!marks.length) return;
    if (marks[at]) marks[at].node.classList.remove("here");
    at = (to + marks.length) % marks.length;
    const { node, text } = marks[at], box = node.getBoundingClientRect();
    node.classList.add("here");
    showTip(text, box.right, box.top);
  };
  for (const { node, text } of marks) {
    node.addEventListener("pointerenter", (event) => showTip(text, event.clientX, event.clientY));
    node.addEventListener("pointerleave", hideTip);
  }
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step) { go(at < 0 ? (step > 0 ? 0 : -1) : at + step); event.preventDefault(); }
    if (event.key === "Enter" && marks[at] && marks[at].href) open(marks[at].href, "_blank", "noopener");
    if (event.key === "Escape") hideTip();
  });
  svg.addEventListener("blur", () => { hideTip(); if (marks[at]) marks[at].node.classList.remove("here"); });
}

function linked(parent, href) {
  if (!href) return parent;
  return make(parent, "a", { href, target: "_blank", rel: "noopener", tabindex: "-1" });
}

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  let done = true;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
  } catch {  // a page from a file or inside a frame may not have the clipboard
    const area = document.createElement("textarea");
    area.value = button.dataset.copy;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  button.textContent = done ? "copied" : "not allowed here";
  setTimeout(() => { button.textContent = "copy"; }, 1500);
});

function watchContents() {
  const links = [...document.querySelectorAll("nav a")];
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const link = links.find((a) => a.hash === `#${entry.target.id}`);
      if (link) link.classList.toggle("here", entry.isIntersecting);
    }
  }, { rootMargin: "-10% 0px -70% 0px" });
  document.querySelectorAll("main > section").forEach((section) => seen.observe(section));
}

function drawAll() {
  const draw = { xy: drawXY, bars: drawBars, network: drawNetwork };
  for (const place of document.querySelectorAll(".chart")) {
    const data = JSON.parse(place.querySelector("script").textContent);
    let width = 0;
    const redraw = () => {
      const now = Math.round(place.clientWidth);
      if (!now || now === width) return;
      width = now;
      place.querySelectorAll(":scope > :not(script)").forEach((old) => old.remove());
      draw[data.kind](place, data, width);
    };
    new ResizeObserver(redraw).observe(place);
    redraw();
  }
}

function noteFrame() {
  if (window === window.top) return;
  const note = document.createElement("p");
  note.textContent = "Links cannot leave this frame. Open or download the file itself to follow them.";
  document.querySelector("header").append(note);
}

drawAll();
noteFrame();
watchContents();
