// Compare: how alike two texts are, by layer, in keys and in values.

import { Chart } from "./chart.js";
import { byId, fixed, request, showFault, table } from "./page.js";

let found = null;

export function startCompare(about) {
  for (const [i, id] of ["first", "second"].entries()) {
    byId(id).maxLength = about.limits.characters;
    byId(id).value = about.pair[i];
  }
  byId("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    compare();
  });
  byId("free").addEventListener("change", draw);
  addEventListener("resize", draw);
}

async function compare() {
  const button = byId("compare-send");
  button.disabled = true;
  byId("compare-state").textContent = "Reading both texts…";
  showFault(byId("compare-fault"), null);
  try {
    found = await (await request("/api/compare", { first: byId("first").value, second: byId("second").value })).json();
    draw();
  } catch (fault) {
    showFault(byId("compare-fault"), fault);
    if (fault instanceof Error) throw fault;
  } finally {
    button.disabled = false;
    byId("compare-state").textContent = "";
  }
}

function draw() {
  if (!found) return;
  byId("compare-result").hidden = false;
  const free = byId("free").checked;
  const [k, v] = free ? [found.k_free, found.v_free] : [found.k, found.v];
  const all = [...k, ...v].filter((x) => x !== null);
  const low = Math.min(0, ...all);
  const last = Math.max(1, found.layers.length - 1);
  const chart = new Chart(byId("layers"), {
    title: `Cosine by layer. Keys: ${k.map((x) => fixed(x, 2)).join(", ")}. Values: ${v.map((x) => fixed(x, 2)).join(", ")}.`,
    x: { low: 0, high: last, label: "layer", text: (x) => (Number.isInteger(x) ? String(x) : "") },
    y: { low: low < 0 ? Math.max(-1, low - 0.05) : 0, high: 1, label: "cosine" },
    height: 280,
  });
  if (low < 0) chart.horizontal(0, 0, last, "zero");
  for (const [values, kind, square, name] of [[k, "keys", false, "keys"], [v, "values", true, "values"]]) {
    const points = values.map((x, i) => [i, x]).filter(([, x]) => x !== null);
    chart.line(points, square ? `${kind} dashed` : kind);
    for (const [i, x] of points) chart.dot(i, x, `dot ${kind}`, { radius: 3.5, square, title: `layer ${i}, ${name}: ${fixed(x, 3)}` });
  }
  label(chart, k, v);
  byId("compare-summary").textContent = summary(k, v, free);
  const rows = found.layers.map((l, i) => ({ cells: [l, ...[found.k, found.v, found.k_free, found.v_free].map((x) => fixed(x[i], 3))] }));
  byId("layers-table").replaceChildren(table(["layer", "keys", "values", "keys, mean off", "values, mean off"], rows, "Cosines by layer"));
}

function label(chart, k, v) {
  const at = Math.floor(k.length / 2);
  if (k[at] === null || v[at] === null) return;
  chart.label(at, k[at], "● keys", { kind: "keys-text", above: k[at] >= v[at] });
  chart.label(at, v[at], "■ values", { kind: "values-text", above: k[at] < v[at] });
}

function summary(k, v, free) {
  const mean = (values) => {
    const known = values.filter((x) => x !== null);
    return known.length ? known.reduce((a, b) => a + b, 0) / known.length : null;
  };
  const embedding = found.embedding.cosine === null ? `no embedding (${found.embedding.reason})` : `${fixed(found.embedding.cosine, 3)} by the preset “${found.embedding.preset}”`;
  const of = free ? "mean over layers, mean of plain sentences taken off" : "mean over layers, raw";
  return `${found.tokens[0]} and ${found.tokens[1]} tokens. Keys ${fixed(mean(k), 3)}, values ${fixed(mean(v), 3)} (${of}); as embeddings ${embedding}.`;
}
