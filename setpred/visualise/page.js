"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const slider = document.getElementById("slider"), hint = document.getElementById("hint");
const marks = [];  // one for each element of each case, moved by the slider

function make(name, parent, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  return parent.appendChild(node);
}

function place(group, {at, dots}) {  // at: x, y, width, height, degrees; points have no width
  const [x, y, w, h, turn] = at, r = Math.min(...data.view) / 40;
  const ring = (a, b) => `M${-a},0a${a},${b} 0 1 0 ${2 * a},0a${a},${b} 0 1 0 ${-2 * a},0Z`;
  const point = group.classList.contains("real") ? ring(1.5 * r, 1.5 * r) : `M${-r},${-r}L${r},${r}M${-r},${r}L${r},${-r}`;
  const shape = data.boxes ? `M${-w / 2},${-h / 2}h${w}v${h}h${-w}Z` : w ? ring(w / 2, h / 2) : point;
  group.querySelector(".dots").setAttribute("d", dots.map(([x, y]) => `M${x},${y}h0.001`).join(""));
  for (const path of group.querySelectorAll(".outline")) {
    path.setAttribute("d", shape);
    path.setAttribute("transform", `translate(${x},${y}) rotate(${turn})`);
  }
}

function mark(svg, kind) {
  const group = make("g", svg, {class: kind});
  for (const part of ["edge outline", "line outline", "line dots"]) make("path", group, {class: part});
  return group;
}

function differs(item, real) {
  return data.fields.some((field, k) => field.classes && item.values[k] !== real.values[k]);
}

function text(field, value) {
  if (field.classes) return field.classes[value];
  if (!value) return "absent";
  return value.map(short).join(", ");
}

function short(number) {
  return String(Number(number.toPrecision(4)));
}

function distance(field, mine, other) {  // with a period the shortest way around
  const turned = (d, p) => p ? d - p * Math.round(d / p) : d;
  return Math.hypot(...mine.map((v, axis) => turned(v - other[axis], field.period)));
}

function describe(item, real, title) {
  const table = document.createElement("table");
  const row = (cells, off) => {
    const line = table.insertRow();
    for (const cell of cells) line.insertCell().textContent = cell;
    line.classList.toggle("off", off);
  };
  row(real ? [title, "predicted", "real", "error"] : [title, ""], false);
  data.fields.forEach((field, k) => {
    const [mine, other] = [item.values[k], real && real.values[k]];
    const cells = [field.name + (field.unit && ` (${field.unit})`), text(field, mine)];
    if (real) cells.push(text(field, other), field.classes || !mine || !other ? "" : short(distance(field, mine, other)));
    row(cells, Boolean(real && field.classes && mine !== other));
  });
  hint.replaceChildren(table);
}

function follow(event, item, real, title) {
  describe(item, real, title);
  hint.style.display = "block";
  const room = [innerWidth - hint.offsetWidth - 8, innerHeight - hint.offsetHeight - 8];
  hint.style.left = Math.max(0, Math.min(event.clientX + 14, room[0])) + "px";
  hint.style.top = Math.max(0, Math.min(event.clientY + 14, room[1])) + "px";
}

function hover(group, item, real, title) {
  group.onmousemove = event => follow(event, item(), real(), title());
  group.onmouseleave = () => { hint.style.display = "none"; };
}

data.cases.forEach((found, number) => {
  const svg = document.querySelectorAll("svg")[number];
  for (const item of found.real) {
    const group = mark(svg, "real");
    place(group, item);
    hover(group, () => item, () => null, () => "real object");
  }
  found.steps[0].forEach((_, k) => {
    const real = found.real[found.partner[k]];
    const group = mark(svg, "found"), line = make("line", group, {class: "line"});
    const item = () => found.steps[slider.value][k];
    hover(group, item, () => real, () => `${real ? "" : "extra, "}${Math.round(100 * item().confidence)} % sure`);
    marks.push({group, line, item, real});
  });
});

function update() {
  document.getElementById("step").textContent = `step ${data.numbers[slider.value]} of ${data.numbers.at(-1)}`;
  hint.style.display = "none";
  for (const {group, line, item, real} of marks) {
    const now = item();
    place(group, now);
    group.setAttribute("class", "found" + (!real || differs(now, real) ? " wrong" : ""));
    group.style.opacity = now.present ? 1 : 0.25 * now.confidence;
    group.style.pointerEvents = now.present ? "all" : "none";
    const end = real ? real.at : now.at;
    Object.entries({x1: now.at[0], y1: now.at[1], x2: end[0], y2: end[1]}).forEach(([key, value]) => line.setAttribute(key, value));
  }
}

if (slider) { slider.oninput = update; update(); }
