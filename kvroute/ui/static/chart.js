// A small plot in SVG: axes, lines, dots and labels, drawn with elements and classes alone.

const SPACE = "http://www.w3.org/2000/svg";

function svg(name, attributes, text) {
  const made = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Even steps of 1, 2 or 5 times a power of ten that cover a range in about `count` steps. */
export function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(Number(at.toPrecision(12)));
  return found;
}

export class Chart {
  /**
   * @param place the figure that holds it
   * @param title said to who can't see it
   * @param x, y {low, high, label, text(value)}
   */
  constructor(place, { title, x, y, height = 260 }) {
    const width = Math.max(280, Math.round(place.clientWidth || 560));
    this.x = x;
    this.y = y;
    this.box = { left: 46, right: width - 14, top: 26, bottom: height - 40 };
    this.root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title });
    place.replaceChildren(this.root);
    this.#axes(width, height);
  }

  px(value) {
    const { low, high } = this.x;
    return this.box.left + ((value - low) / (high - low || 1)) * (this.box.right - this.box.left);
  }

  py(value) {
    const { low, high } = this.y;
    return this.box.bottom - ((value - low) / (high - low || 1)) * (this.box.bottom - this.box.top);
  }

  #axes(width, height) {
    const { left, right, top, bottom } = this.box;
    const text = (axis, value) => (axis.text ? axis.text(value) : String(value));
    for (const value of ticks(this.y.low, this.y.high, 5)) {
      this.add("line", { x1: left, x2: right, y1: this.py(value), y2: this.py(value), class: "grid" });
      this.add("text", { x: left - 6, y: this.py(value) + 4, "text-anchor": "end", class: "soft" }, text(this.y, value));
    }
    for (const value of ticks(this.x.low, this.x.high, width < 420 ? 4 : 8)) {
      this.add("text", { x: this.px(value), y: bottom + 16, "text-anchor": "middle", class: "soft" }, text(this.x, value));
    }
    this.add("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "axis" });
    this.add("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle", class: "soft" }, this.x.label);
    this.add("text", { x: 2, y: 12, class: "soft" }, this.y.label);
  }

  add(name, attributes, text) {
    const made = svg(name, attributes, text);
    this.root.append(made);
    return made;
  }

  line(points, kind) {
    const said = points.map(([a, b]) => `${this.px(a).toFixed(1)},${this.py(b).toFixed(1)}`).join(" ");
    return this.add("polyline", { points: said, class: `line ${kind}` });
  }

  dot(a, b, kind, { title, radius = 4.5, square = false } = {}) {
    const [x, y] = [this.px(a), this.py(b)];
    const made = square
      ? this.add("rect", { x: x - radius, y: y - radius, width: 2 * radius, height: 2 * radius, class: kind })
      : this.add("circle", { cx: x, cy: y, r: radius, class: kind });
    if (title) made.append(svg("title", {}, title));
    return made;
  }

  /** A label beside a point, turned to the side that has room. */
  label(a, b, text, { kind = "", above = true, side } = {}) {
    const x = this.px(a);
    const room = this.box.right - x;
    const end = side === "left" || (side === undefined && room < text.length * 6.6 + 8);
    const y = Math.min(Math.max(this.py(b) + (above ? -9 : 17), this.box.top + 4), this.box.bottom - 4);
    return this.add("text", { x: x + (end ? -7 : 7), y, "text-anchor": end ? "end" : "start", class: kind }, text);
  }

  vertical(a, kind) {
    return this.add("line", { x1: this.px(a), x2: this.px(a), y1: this.box.top, y2: this.box.bottom, class: kind });
  }

  horizontal(b, from, to, kind) {
    return this.add("line", { x1: this.px(from), x2: this.px(to), y1: this.py(b), y2: this.py(b), class: kind });
  }
}
