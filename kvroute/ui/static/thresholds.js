// Thresholds: sliders that redraw the accuracy-token curve of a labelled file.

import { Chart } from "./chart.js";
import { byId, element, fixed, request, showFault, table } from "./page.js";
import { curve, evaluate, references } from "./policies.js";

let about;
let labelled = null;
let asked = false;

const SLIDERS = ["tau", "give-up", "tau-fast"];
const chosen = {}; // a policy's own thresholds may lie between a slider's steps

const NAMES = { test: "test", calibration: "calibration", validation: "validation" };

export function startThresholds(found) {
  about = found;
  byId("no-labels").hidden = about.labels !== null;
  for (const id of SLIDERS) {
    byId(id).addEventListener("input", () => {
      chosen[id] = byId(id).valueAsNumber;
      draw();
    });
  }
  byId("part").addEventListener("change", draw);
  byId("reset").addEventListener("click", () => {
    reset();
    draw();
  });
  byId("sliders").addEventListener("submit", (event) => event.preventDefault());
  addEventListener("resize", draw);
  return load;
}

function reset() {
  const policy = about.policy ?? {};
  const own = policy.kind === "one-step" || policy.kind === "two-step";
  chosen.tau = own ? policy.tau : 50;
  chosen["give-up"] = own ? (policy.give_up ?? 100) : 100;
  chosen["tau-fast"] = policy.kind === "two-step" ? policy.tau_fast : 0;
  for (const id of SLIDERS) byId(id).value = chosen[id];
}

async function load() {
  if (labelled) draw();
  if (asked || about.labels === null) return;
  asked = true;
  byId("curve-state").textContent = `Reading the difficulties of ${about.labels}…`;
  showFault(byId("curve-fault"), null);
  try {
    labelled = await (await request("/api/curve")).json();
  } catch (fault) {
    asked = false;
    showFault(byId("curve-fault"), fault);
    if (fault instanceof Error) throw fault;
    return;
  } finally {
    byId("curve-state").textContent = "";
  }
  for (const [name, part] of Object.entries(labelled.parts)) {
    byId("part").append(element("option", { value: name }, `${NAMES[name]} (${part.rows})`));
  }
  byId("close-row").hidden = labelled.every === null;
  byId("curve-body").hidden = false;
  reset();
  draw();
}

function thresholds() {
  return {
    tau: chosen.tau,
    giveUp: chosen["give-up"],
    tauFast: labelled.every === null ? 0 : chosen["tau-fast"],
  };
}

function draw() {
  if (!labelled || byId("view-thresholds").hidden) return;
  const part = labelled.parts[byId("part").value];
  const set = thresholds();
  byId("tau-out").value = fixed(set.tau);
  byId("give-up-out").value = set.giveUp >= 100 ? "never" : fixed(set.giveUp);
  byId("tau-fast-out").value = set.tauFast <= 0 ? "never" : fixed(set.tauFast);
  const known = references(part);
  const here = evaluate(part, set);
  drawReadout(known, here);
  drawCurve(part, known, here, set);
  const cut = part.rows < part.of ? ` The first ${part.rows} of ${part.of} rows.` : "";
  byId("curve-note").textContent =
    `${labelled.file}, rows that ${labelled.head} was not trained on.${cut} A point on these rows promises nothing about others: ` +
    "kvroute calibrate gives thresholds with a guarantee." +
    (labelled.every === null ? "" : ` Thoughts can be closed every ${labelled.every} tokens; one that opens in a fast answer can't be told from labels.`);
}

function drawReadout(known, here) {
  const lost = 100 * (known.slow.accuracy - here.accuracy);
  const saved = 1 - here.tokens / known.slow.tokens;
  const lossText = Math.abs(lost) < 0.05 ? "as accurate as always slow" : `${fixed(Math.abs(lost))} points ${lost > 0 ? "below" : "above"} always slow`;
  const savedText = saved >= 0 ? `${Math.round(100 * saved)} % of the tokens saved` : `${Math.round(-100 * saved)} % more tokens`;
  const row = (name, x, now = false) => ({
    cells: [name, fixed(x.accuracy, 3), fixed(x.tokens), x.slow === null ? "–" : `${Math.round(100 * x.slow)} %`], now,
  });
  byId("readout").replaceChildren(
    element("p", {}, element("strong", {}, savedText), `, ${lossText}.`),
    table(
      ["", "right", "tokens", "thought about"],
      [row("these thresholds", here, true), row("always slow", known.slow), row("always fast", known.fast), row("oracle", known.oracle)],
      "What the thresholds give",
    ),
  );
}

function drawCurve(part, known, here, set) {
  const plain = curve(part, { giveUp: set.giveUp, tauFast: 0 });
  const closing = set.tauFast > 0 ? curve(part, set) : [];
  const every = [...plain, ...closing, known.fast, known.slow, known.oracle, here];
  const [left, right] = [Math.min(...every.map((p) => p.tokens)), Math.max(...every.map((p) => p.tokens))];
  const [low, high] = [Math.min(...every.map((p) => p.accuracy)), Math.max(...every.map((p) => p.accuracy))];
  const [wide, tall] = [(right - left) * 0.06 || 1, (high - low) * 0.1 || 0.05];
  const chart = new Chart(byId("curve"), {
    title: `Accuracy over tokens a question. These thresholds: ${fixed(here.accuracy, 3)} at ${fixed(here.tokens)} tokens.`,
    x: { low: left - wide, high: right + wide, label: "tokens a question" },
    y: { low: low - tall, high: Math.min(1, high + tall), label: "right", text: (v) => v.toFixed(2) },
    height: 320,
  });
  const points = (curvePoints) => curvePoints.map((p) => [p.tokens, p.accuracy]);
  chart.line(points([known.fast, known.slow]), "threshold");
  chart.line(points(plain), closing.length ? "routed dashed" : "routed");
  if (closing.length) chart.line(points(closing), "routed");
  const mark = (name, x, above) => {
    chart.dot(x.tokens, x.accuracy, "mark", { title: `${name}: ${fixed(x.accuracy, 3)} at ${fixed(x.tokens)}` });
    chart.label(x.tokens, x.accuracy, name, { above });
  };
  mark("always fast", known.fast, false);
  mark("always slow", known.slow, true);
  mark("oracle", known.oracle, true);
  chart.dot(here.tokens, here.accuracy, "here", { radius: 7, title: "these thresholds" });
  chart.label(here.tokens, here.accuracy, "here", { kind: "moment-text", above: false });
  byId("curve-key").textContent = closing.length
    ? "Line: any “think above”, the others as set. Dashed: without closing. Dotted: thinking by chance."
    : "Line: any “think above”, the other as set. Dotted: thinking by chance.";
}
