"use strict";
/* One explorer in each .bizzaro-explorer that has none yet. Its data is in the script element after it. Nothing is computed
   here: numbers are looked up, and drawn. Text goes into the page as text, never as markup. */
(() => {
const NAMES = { A: "A: top %n by TotalSwing", B: "B: best of each category (%n)", C: "C: all %n" };
const FIELDS = ["mode", "pair", "experiment", "site", "head", "value", "controls", "layer", "series"];
const UNITS = { effect: "effect (logits)", fraction: "fraction of TotalSwing" };

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) if (v !== null) node.setAttribute(k, v);
  node.append(...children);
  return node;
}

const holder = document.createElement("div");
holder.innerHTML = "<svg></svg>";
const SVG = holder.firstChild.namespaceURI;
function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v);
  node.append(...children);
  return node;
}

function nameOf(cell) { return `${cell.layer}|${cell.key}`; }

function text(x, digits, plus = false) {
  if (x === null || x === undefined) return "not defined";
  const shown = x.toFixed(digits).replace(/^-(?=[0.]*$)/, "");
  return plus && x > 0 && /[1-9]/.test(shown) ? "+" + shown : shown;
}

/* ---- marks and colors ---- */

function mark(look, x, y, r = 4.5) {
  const corners = { s: "-1,-1 1,-1 1,1 -1,1", "^": "0,-1.3 1.2,1 -1.2,1", v: "0,1.3 1.2,-1 -1.2,-1", D: "0,-1.35 1.35,0 0,1.35 -1.35,0",
    P: "-.45,-1.3 .45,-1.3 .45,-.45 1.3,-.45 1.3,.45 .45,.45 .45,1.3 -.45,1.3 -.45,.45 -1.3,.45 -1.3,-.45 -.45,-.45" }[look.mark];
  const hollow = look.fill !== look.color;
  const style = { fill: look.fill, stroke: hollow ? look.color : "#111", "stroke-width": hollow ? 2 : 0.8 };
  if (!corners) return draw("circle", { cx: x, cy: y, r, ...style });
  const points = corners.split(" ").map(c => c.split(",")).map(([dx, dy]) => `${x + dx * r},${y + dy * r}`).join(" ");
  return draw("polygon", { points, ...style });
}

function channels(color) { return [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16)); }

function colorAt(stops, share) {
  const place = Math.max(0, Math.min(1, share)) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2);
  const [a, b] = [channels(stops[i]), channels(stops[i + 1])];
  return a.map((c, k) => Math.round(c + (place - i) * (b[k] - c)));
}

function ink(rgb) {
  const [r, g, b] = rgb.map(c => c / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function ticks(low, high, most = 6) {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(k => k * power).find(s => s >= rough);
  const out = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) out.push(i * step);
  return { places: out, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

/* ---- one explorer ---- */

class Explorer {
  constructor(place, data) {
    this.place = place;
    this.data = data;
    this.linked = "linked" in place.dataset && location.protocol !== "about:";
    this.state = { mode: "", pair: "", experiment: "", site: "", head: "", value: "effect", controls: "", layer: "", series: "" };
    this.build();
    if (this.linked) window.addEventListener("hashchange", () => { this.read(); this.show(); });
    this.read();
    this.show();
    let width = this.plot.clientWidth;
    new ResizeObserver(() => {
      if (this.plot.clientWidth === width) return;
      width = this.plot.clientWidth;
      if (!this.plot.contains(document.activeElement)) this.drawPlot();
    }).observe(this.plot);
  }

  /* Where things are. */
  build() {
    const d = this.data, noising = d.direction === "noising";
    this.place.replaceChildren();
    this.menus = {};
    const choices = make("div", { class: "choices", role: "group", "aria-label": "Choices" });
    for (const field of ["mode", "pair", "experiment", "site", "head", "value"]) {
      const name = field[0].toUpperCase() + field.slice(1), menu = this.menus[field] = make("select", { name: field, "aria-label": name });
      menu.addEventListener("change", () => this.change({ [field]: menu.value }));
      choices.append(make("label", {}, name, menu));
    }
    this.check = make("input", { type: "checkbox", name: "controls" });
    this.check.addEventListener("change", () => this.change({ controls: this.check.checked ? "1" : "" }));
    choices.append(this.checkLabel = make("label", { class: "check" }, this.check, "Controls"));
    const what = noising ? "noising: an activation of the corrupted run replaces the clean run's. A negative effect is damage to the clean answer"
      : "denoising: an activation of the clean run replaces the corrupted run's. A positive effect restores the clean answer";
    const about = `${d.model}${d.embedded ? ", an embedded model: what is seen here is about this model alone" : ""}. Direction ${what}. ` +
      "Effect: logit difference after the patch minus before it. As a fraction of TotalSwing, 0 is nothing and 1 the whole way to the other run.";
    this.prompts = make("div", { class: "prompts" });
    this.heading = make("h3");
    this.caption = make("p", { class: "small" });
    this.plot = make("div", { class: "plot" });
    this.detail = make("div", { class: "detail", role: "status", "aria-live": "polite" });
    this.numbers = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Numbers" });
    const fold = make("details", { class: "numbers" }, make("summary", {}, "Numbers"), this.numbers);
    this.place.append(make("p", { class: "small" }, about), choices, this.prompts, this.heading, this.caption, this.plot, this.detail, fold,
      make("p", { class: "small" }, `Means over pairs; intervals: ${d.method}.`));
  }

  read() {
    if (!this.linked) return;
    const found = new URLSearchParams(location.hash.slice(1));
    for (const field of FIELDS) this.state[field] = found.get(field) ?? "";
  }

  write() {
    if (!this.linked) return;
    const kept = FIELDS.filter(f => this.state[f] !== "").map(f => [f, this.state[f]]);
    history.replaceState(null, "", "#" + new URLSearchParams(kept));
  }

  /* The choices: what each may be, given those before it. */
  options(field) {
    const { data: d, state: s } = this;
    const experiment = d.experiments[s.experiment];
    if (field === "mode") return ["C", "A", "B"].filter(m => m in d.modes).map(m => [m, NAMES[m].replace("%n", d.modes[m].length)]);
    if (field === "pair") return [["", "all pairs: mean with interval"], ...d.modes[s.mode].map(i => [d.pairs[i].id, d.pairs[i].id])];
    if (field === "experiment") return Object.entries(d.experiments).map(([name, e]) => {
      const sites = Object.keys(e.sites);
      return [name, `${name}: ${sites.length > 1 ? "sublayers" : sites[0] === "z" ? "heads" : sites[0]} at the ${e.position} token`];
    });
    if (field === "site") {
      const sites = Object.keys(experiment.sites);
      const together = sites.length > 1 && sites.every(x => !experiment.sites[x].heads.length);
      return [...(together ? [["", "all sites"]] : []), ...sites.map(x => [x, x])];
    }
    if (field === "head") return [["", this.heads().length ? "all heads" : "none"], ...this.heads().map(h => [String(h), "H" + h])];
    return Object.entries(UNITS);
  }

  heads() {
    const { experiment, site } = this.state, sites = this.data.experiments[experiment].sites;
    return site ? sites[site].heads : [];
  }

  settle() {
    for (const field of ["mode", "pair", "experiment", "site", "head", "value"]) {
      const possible = this.options(field);
      if (!possible.some(([v]) => v === this.state[field])) this.state[field] = possible[0][0];
    }
  }

  change(fields) {
    if ("experiment" in fields) Object.assign(this.state, { site: "", layer: "", series: "" });  // begin with all of its sites
    Object.assign(this.state, fields);
    this.show();
  }

  show() {
    this.settle();
    for (const [field, menu] of Object.entries(this.menus)) {
      const options = this.options(field), key = JSON.stringify(options);
      if (menu.dataset.key !== key) menu.replaceChildren(...options.map(([value, label]) => make("option", { value }, label)));
      menu.dataset.key = key;
      menu.value = this.state[field];
      menu.disabled = options.length < 2;
    }
    this.check.checked = this.state.controls === "1";
    this.checkLabel.hidden = !this.hasControls();
    this.checkLabel.style.display = this.hasControls() ? "" : "none";
    this.showPrompts();
    this.cells = this.look();
    this.drawPlot();
    this.showNumbers();
  }

  hasControls() {
    const { experiment, site, pair, head } = this.state;
    const found = site && this.data.experiments[experiment].sites[site];
    return Boolean(found && pair === "" && Object.keys(found.controls).length && (!found.heads.length || head !== ""));
  }

  /* The numbers of what is chosen: a list of series, each with a cell for each layer. */
  cellsOf(source, site, head, key, label, look, single) {
    const width = site.heads.length || 1, offset = head === "" ? 0 : site.heads.indexOf(Number(head));
    return { key, label, look, cells: site.layers.map((layer, i) => {
      const at = i * width + offset;
      return single ? { layer, key, label, value: single[at], low: null, high: null, n: 1 }
        : { layer, key, label, value: source.mean[at], low: source.low[at], high: source.high[at], n: source.n };
    }) };
  }

  look() {
    const { data: d, state: s } = this, sites = d.experiments[s.experiment].sites;
    const pair = s.pair === "" ? -1 : d.pairs.findIndex(p => p.id === s.pair);
    const one = (name, head, key, label) => {
      const site = sites[name];
      return this.cellsOf(site.means[s.mode][s.value], site, head, key, label, d.looks[name] || d.looks.resid_pre, pair < 0 ? null : site[s.value][pair]);
    };
    if (s.site === "") return Object.keys(sites).map(name => one(name, "", name, name));
    const site = sites[s.site];
    if (site.heads.length && s.head === "") return site.heads.map(h => one(s.site, String(h), "H" + h, `${s.site} of H${h}`));
    const key = s.head === "" ? s.site : "H" + s.head, label = s.head === "" ? s.site : `${s.site} of H${s.head}`;
    const out = [one(s.site, s.head, key, label)];
    if (s.controls === "1" && this.hasControls()) for (const [name, means] of Object.entries(site.controls)) {
      const look = d.control_looks[name];
      out.push(this.cellsOf(means[s.mode][s.value], site, s.head, name, look.label, look, null));
    }
    if (pair >= 0) this.backdrop = this.cellsOf(site.means[s.mode][s.value], site, s.head, "mean", "", null, null);
    return out;
  }

  isHeat() { return this.heads().length > 0 && this.state.head === ""; }

  /* In words. */
  sentence(cell) {
    const s = this.state, position = this.data.experiments[s.experiment].position;
    const unit = s.value === "effect" ? " logits" : " of TotalSwing";
    const where = `Layer ${cell.layer}, ${cell.label} at the ${position} token`;
    if (cell.value === null) return `${where}: not defined${s.pair ? `, TotalSwing is below ${this.data.min_swing} logit` : ""}`;
    const range = cell.low === null ? "" : `, interval ${text(cell.low, this.data.digits)} to ${text(cell.high, this.data.digits)}`;
    return `${where}: ${text(cell.value, this.data.digits, true)}${unit}${range}`;
  }

  alt(known) {
    const kind = this.isHeat() ? "Heat map" : this.cells.length > 1 ? `${this.cells.length} curves by layer` : "Curve by layer";
    return `${kind}. ${this.caption.textContent} Largest: ${this.sentence(this.largest(known))}.`;
  }

  showPrompts() {
    const { data: d, state: s } = this, at = d.experiments[s.experiment].position;
    this.prompts.replaceChildren();
    const pair = d.pairs.find(p => p.id === s.pair);
    if (!pair) return this.prompts.append(make("p", { class: "small" }, `${d.modes[s.mode].length} pairs. Choose one to see its prompts.`));
    for (const side of pair.prompts || []) {
      const line = make("p", {}, make("span", { class: "side" }, side.name));
      for (const [words, name] of side.pieces) {
        const patched = name.split(" and ").includes(at);
        line.append(name ? make("mark", { class: patched ? "patched" : null }, words, make("small", {}, name + (patched ? ", patched" : ""))) : words);
      }
      line.append(" \u2192 ", make("b", {}, side.target));
      this.prompts.append(line);
    }
    this.prompts.append(make("p", { class: "small" }, `${pair.category}. Logit difference ${text(pair.clean, 2)} clean, ${text(pair.corrupt, 2)} corrupted; TotalSwing ${text(pair.swing, 2)} logits.`));
  }

  /* The picture: a heat map of heads, or curves. */
  drawPlot() {
    const { data: d, state: s } = this, experiment = d.experiments[s.experiment];
    const who = s.pair || `mean of ${this.cells[0].cells[0].n} pairs of mode ${s.mode}`;
    this.heading.textContent = experiment.question || `Experiment ${s.experiment}`;
    this.caption.textContent = `Experiment ${s.experiment}, ${who}, ${UNITS[s.value]}, at the ${experiment.position} token`
      + (this.cells.some(x => x.cells.some(c => c.low !== null)) ? ", with 95% interval." : ".") + " Arrow keys move between the numbers.";
    this.nodes = new Map();
    const known = this.cells.flatMap(x => x.cells).filter(c => c.value !== null);
    if (!known.length) this.plot.replaceChildren(make("p", {}, `Not defined: no pair here has a TotalSwing of ${d.min_swing} logit or more.`));
    else if (this.isHeat()) this.drawHeat(known);
    else this.drawCurves(known);
    const near = known.length && (known.find(c => String(c.layer) === s.layer) || this.largest(known));
    const chosen = this.nodes.get(`${s.layer}|${s.series}`) || near && this.nodes.get(nameOf(near));
    if (chosen) this.pick(chosen.cell); else { this.detail.replaceChildren(); this.write(); }
  }

  largest(known) {
    return known.filter(c => !(c.key in this.data.control_looks)).reduce((a, b) => Math.abs(b.value) > Math.abs(a.value) ? b : a);
  }

  /* A number to click or to reach with the arrow keys. */
  live(node, cell, across, up) {
    node.addEventListener("click", () => { node.focus(); this.pick(cell); });
    node.addEventListener("focus", () => this.pick(cell));
    node.addEventListener("keydown", event => {
      const steps = { ArrowRight: [across, 1], ArrowLeft: [across, -1], ArrowUp: [up, 1], ArrowDown: [up, -1], Home: [across, -1e6], End: [across, 1e6] }[event.key];
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); this.pick(cell); }
      if (!steps) return;
      event.preventDefault();
      const next = this.beside(cell, ...steps);
      if (next) next.node.focus();
    });
    this.nodes.set(nameOf(cell), { node, cell });
    return node;
  }

  beside(cell, along, step) {
    const keys = this.cells.map(x => x.key), layers = this.cells[0].cells.map(c => c.layer);
    const [list, at] = along === "layer" ? [layers, layers.indexOf(cell.layer)] : [keys, keys.indexOf(cell.key)];
    const to = list[Math.max(0, Math.min(list.length - 1, at + step))];
    return this.nodes.get(along === "layer" ? `${to}|${cell.key}` : `${cell.layer}|${to}`);
  }

  drawHeat(known) {
    const { data: d, state: s } = this, most = Math.max(...known.map(c => Math.abs(c.value))) || 1, digits = s.value === "effect" ? 1 : 2;
    const table = make("table", { class: "heat", "aria-label": this.alt(known) }, make("caption", {}, `Heat map, layer by head; layer ${this.cells[0].cells[0].layer} at the bottom`));
    const rows = this.cells[0].cells.map((_, i) => {
      const row = make("tr", {}, make("th", { scope: "row" }, "L" + this.cells[0].cells[i].layer));
      for (const series of this.cells) {
        const cell = series.cells[i], rgb = cell.value === null ? [255, 255, 255] : colorAt(d.stops, 0.5 + cell.value / most / 2);
        const button = make("button", { type: "button", tabindex: "-1", "aria-label": this.sentence(cell), style: `background:rgb(${rgb});color:${ink(rgb)}` },
          cell.value === null ? "\u2013" : text(cell.value, digits, true));
        row.append(make("td", {}, this.live(button, cell, "key", "layer")));
      }
      return row;
    });
    const head = make("tr", {}, make("th", { class: "corner", scope: "col" }, ""), ...this.cells.map(x => make("th", { scope: "col" }, x.key)));
    table.append(make("thead", {}, head), make("tbody", {}, ...rows.reverse()));
    table.style.minWidth = `${2.4 + 2.9 * this.cells.length}rem`;
    const bar = make("span", { class: "bar", style: `background:linear-gradient(90deg,${d.stops.join(",")})` });
    this.plot.replaceChildren(make("div", { class: "scroll" }, table),
      make("div", { class: "scale" }, text(-most, digits), bar, "+" + text(most, digits), ` ${UNITS[s.value]}`));
  }

  drawCurves(known) {
    const s = this.state, single = s.pair !== "" && s.site !== "", back = single ? this.backdrop.cells : [];
    const W = Math.max(260, this.plot.clientWidth), H = W < 500 ? 260 : 330, m = { left: 56, right: 14, top: 14, bottom: 44 };
    const seen = [...known, ...back].flatMap(c => [c.value, c.low, c.high]).filter(v => v !== null).concat(0);
    let [low, high] = [Math.min(...seen), Math.max(...seen)];
    if (high - low < 1e-9) [low, high] = [-1, 1];
    const pad = 0.06 * (high - low), layers = this.cells[0].cells.map(c => c.layer), last = layers.length - 1;
    const y = v => m.top + (H - m.top - m.bottom) * (high + pad - v) / (high - low + 2 * pad);
    const x = layer => m.left + 8 + (W - m.left - m.right - 16) * (last ? layers.indexOf(layer) / last : 0.5);
    const svg = draw("svg", { width: W, height: H, viewBox: `0 0 ${W} ${H}`, role: "group", "aria-label": this.alt(known) });
    const scale = ticks(low - pad, high + pad);
    for (const v of scale.places) {
      svg.append(draw("line", { x1: m.left, x2: W - m.right, y1: y(v), y2: y(v), stroke: Math.abs(v) < 1e-9 ? "#555" : "#ddd" }));
      svg.append(draw("text", { x: m.left - 8, y: y(v) + 4, "text-anchor": "end" }, text(v, scale.digits)));
    }
    const every = Math.ceil(layers.length * 26 / (W - m.left - m.right));
    layers.forEach((layer, i) => i % every || svg.append(draw("text", { x: x(layer), y: H - m.bottom + 18, "text-anchor": "middle" }, String(layer))));
    svg.append(draw("text", { x: (m.left + W - m.right) / 2, y: H - 6, "text-anchor": "middle" }, "Layer"));
    svg.append(draw("text", { x: 14, y: (H - m.bottom + m.top) / 2, "text-anchor": "middle", transform: `rotate(-90 14 ${(H - m.bottom + m.top) / 2})` }, UNITS[s.value].replace(/^./, c => c.toUpperCase())));
    const line = (cells, value) => cells.filter(c => c[value] !== null).map(c => `${x(c.layer)},${y(c[value])}`);
    const band = (cells, color) => draw("polygon", { points: [...line(cells, "high"), ...line(cells, "low").reverse()].join(" "), fill: color, opacity: 0.18 });
    if (back.length) svg.append(band(back, "#555"), draw("polyline", { points: line(back, "value").join(" "), fill: "none", stroke: "#767676", "stroke-width": 2, "stroke-dasharray": "2 4" }));
    for (const { cells, look } of this.cells) svg.append(band(cells, look.color),
      draw("polyline", { points: line(cells, "value").join(" "), fill: "none", stroke: look.color, "stroke-width": 2, "stroke-dasharray": look.dash }));
    for (const { cells, look } of this.cells) for (const cell of cells.filter(c => c.value !== null)) {
      const [px, py] = [x(cell.layer), y(cell.value)];
      const point = draw("g", { class: "point", role: "button", tabindex: "-1", "aria-label": this.sentence(cell) },
        draw("circle", { cx: px, cy: py, r: 12, fill: "transparent" }), draw("circle", { class: "ring", cx: px, cy: py, r: 9 }), mark(look, px, py));
      svg.append(this.live(point, cell, "layer", "key"));
    }
    this.plot.replaceChildren(this.legend(back), svg);
  }

  legend(back) {
    const list = make("ul", { class: "legend", "aria-label": "Legend" });
    const entry = (look, label) => {
      const svg = draw("svg", { width: 40, height: 16, "aria-hidden": "true" }, draw("line", { x1: 0, x2: 40, y1: 8, y2: 8, stroke: look.color, "stroke-width": 2, "stroke-dasharray": look.dash }));
      if (look.mark) svg.append(mark(look, 20, 8));
      list.append(make("li", {}, svg, label));
    };
    for (const { look, label } of this.cells) entry(look, back.length ? `${label}, this pair` : label);
    if (back.length) entry({ color: "#767676", dash: "2 4" }, `mean of ${back[0].n} pairs of mode ${this.state.mode}`);
    return list;
  }

  /* The chosen number. */
  pick(cell) {
    const s = this.state;
    for (const other of this.nodes.values()) {
      const here = other.cell === cell;
      other.node.setAttribute("aria-pressed", here);
      other.node.setAttribute("tabindex", here ? "0" : "-1");
    }
    s.layer = String(cell.layer);
    s.series = cell.key;
    const range = cell.low === null ? "none" : `${text(cell.low, this.data.digits)} to ${text(cell.high, this.data.digits)}`;
    const rows = [["value", UNITS[s.value], text(cell.value, this.data.digits, true)], ["interval", "95% interval", range], ["n", "n", String(cell.n)],
      ["pair", "pair", s.pair || "all: mean"]];
    this.detail.replaceChildren(make("b", {}, this.sentence(cell).split(":")[0]),
      make("dl", {}, ...rows.map(([name, label, value]) => make("div", {}, make("dt", {}, label), make("dd", { class: name }, value)))));
    this.write();
  }

  showNumbers() {
    const s = this.state, digits = this.data.digits, mean = s.pair === "";
    const columns = ["layer", this.isHeat() ? "head" : "site", mean ? "mean" : "value", ...(mean ? ["low", "high", "n"] : [])];
    const rows = this.cells.flatMap(x => x.cells).map(c => [c.layer, this.isHeat() ? c.key : c.label, text(c.value, digits, true),
      ...(mean ? [text(c.low, digits), text(c.high, digits), c.n] : [])]);
    const head = make("tr", {}, ...columns.map(c => make("th", { scope: "col" }, c)));
    const body = rows.map(r => make("tr", {}, ...r.map(c => make("td", {}, String(c)))));
    this.numbers.replaceChildren(make("table", {}, make("caption", {}, this.caption.textContent.split(" Arrow")[0]), make("thead", {}, head), make("tbody", {}, ...body)));
  }
}

for (const place of document.querySelectorAll(".bizzaro-explorer:not([data-live])")) {
  const source = place.nextElementSibling;
  if (!source || source.type !== "application/json") continue;
  place.dataset.live = "";
  place.explorer = new Explorer(place, JSON.parse(source.textContent));
}
})();
