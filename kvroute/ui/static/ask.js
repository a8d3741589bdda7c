// Ask: a question, its answer as it is written, beside always slow.

import { Chart } from "./chart.js";
import { Lane, decisionText, switchText } from "./lane.js";
import { byId, element, fixed, lines, request, share, showFault, table } from "./page.js";

let about;
let running = null;
let lanes = [];

export function startAsk(found) {
  about = found;
  const limit = byId("max-tokens");
  limit.max = about.limits.tokens;
  limit.value = about.limits.default_tokens;
  byId("question").maxLength = about.limits.characters;
  if (!about.policy) {
    byId("mode").closest("label").hidden = true;
    byId("beside").closest("label").hidden = true;
    if (about.no_router) byId("ask-state").textContent = `Without routing: ${about.no_router}`;
  }
  startExamples();
  byId("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  byId("stop").addEventListener("click", stop);
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask-form").requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  addEventListener("resize", () => drawDifficulty());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawDifficulty());
}

function startExamples() {
  const list = byId("examples");
  for (const example of about.examples) list.append(element("option", { value: example.question }, example.name));
  byId("examples-row").hidden = about.examples.length === 0;
  list.addEventListener("change", () => {
    if (list.value) byId("question").value = list.value;
    list.value = "";
  });
  if (about.examples.length && !byId("question").value) byId("question").value = about.examples[0].question;
}

const say = (text) => {
  byId("live").textContent = text;
};

function stop() {
  running?.abort();
}

async function ask() {
  if (running) return;
  running = new AbortController();
  const wanted = {
    question: byId("question").value,
    mode: about.policy ? byId("mode").value : "policy",
    beside: byId("beside").checked,
    max_tokens: byId("max-tokens").valueAsNumber || about.limits.default_tokens,
    temperature: byId("temperature").valueAsNumber || 0,
  };
  begin(wanted);
  try {
    const response = await request("/api/ask", wanted, running.signal);
    for await (const event of lines(response)) take(event);
    byId("ask-state").textContent = "";
  } catch (fault) {
    const stopped = fault.name === "AbortError";
    byId("ask-state").textContent = stopped ? "Stopped." : "";
    say(stopped ? "Stopped." : "");
    if (!stopped) {
      showFault(byId("ask-fault"), fault);
      if (fault instanceof Error) throw fault;
    }
  } finally {
    running = null;
    for (const lane of lanes) lane.still();
    byId("send").disabled = false;
    byId("stop").hidden = true;
    drawTokens();
    drawDifficulty();
  }
}

function begin(wanted) {
  showFault(byId("ask-fault"), null);
  byId("send").disabled = true;
  byId("stop").hidden = false;
  byId("ask-state").textContent = "Reading the question…";
  byId("result").hidden = true;
  byId("legend").hidden = true;
  const title = { policy: about.policy ? "Routed" : "Answer", fast: "Fast", slow: "Slow" }[wanted.mode];
  lanes = [new Lane(title)];
  const always = wanted.mode === "policy" ? about.policy?.kind : wanted.mode;
  if (about.policy && wanted.beside && always !== "slow") lanes.push(new Lane("Always slow"));
  byId("lanes").replaceChildren(...lanes.map((l) => l.root));
  drawTokens();
  byId("difficulty-card").hidden = true;
}

function take(event) {
  if (event.type === "error") throw { message: event.message, hint: event.hint };
  if (event.type === "waiting") {
    byId("ask-state").textContent = `Waiting for ${event.ahead} other ${event.ahead === 1 ? "request" : "requests"}…`;
    say(byId("ask-state").textContent);
    return;
  }
  byId("result").hidden = false;
  byId("ask-state").textContent = "Writing…";
  const lane = lanes[event.lane];
  const first = event.lane === 0;
  switch (event.type) {
    case "decision":
      lane.decide(event);
      if (first) say(decisionText(event));
      break;
    case "piece":
      lane.write(event);
      drawTokens();
      break;
    case "checkpoint":
      lane.checkpoints.push([event.token, event.difficulty]);
      break;
    case "switch":
      lane.switch(event);
      if (first) say(switchText(event));
      break;
    case "sentence":
      lane.colour(event);
      if (event.confidence !== null) byId("legend").hidden = false;
      if (first) say(`${lane.sentenceText(event.sentence)} ${event.confidence === null ? "" : `Confidence ${share(event.confidence)}.`}`);
      break;
    case "end":
      lane.finish(event);
      drawTokens();
      if (first) say(`Done: ${event.answer || "no answer"}. ${event.tokens} tokens.`);
      if (event.fault) showFault(byId("ask-fault"), { message: event.fault, hint: null });
      break;
  }
  if (first && event.type !== "piece" && event.type !== "sentence") drawDifficulty();
}

// ---------------------------------------------------------------------- tokens

function drawTokens() {
  const most = Math.max(1, ...lanes.map((l) => l.tokens));
  const rows = lanes.map((lane, i) => {
    const fill = element("div", { class: i === 1 ? "fill slow" : "fill" });
    fill.style.setProperty("--share", lane.tokens / most);
    const name = lane.root.querySelector("h2 span").textContent;
    return element("div", { class: "bar" }, element("span", {}, name), element("div", { class: "track" }, fill), element("span", { class: "number" }, String(lane.tokens)));
  });
  const note = element("p", { class: "quiet" }, tokensText());
  byId("tokens").replaceChildren(...rows, note);
}

function tokensText() {
  const [routed, slow] = lanes;
  if (!routed?.end) return "";
  const took = `${fixed(routed.end.seconds, 2)} s, ${routed.end.prompt_tokens} prompt tokens.`;
  if (!slow?.end) return took;
  const saved = slow.tokens - routed.tokens;
  const same = routed.end.answer.trim() === slow.end.answer.trim() ? "with the same answer" : "with another answer";
  if (saved === 0) return `As many as always slow, ${same}. ${took}`;
  return `${Math.abs(saved)} ${saved > 0 ? "fewer" : "more"} than always slow (${Math.round((100 * Math.abs(saved)) / slow.tokens)} %), ${same}. ${took}`;
}

// ---------------------------------------------------------------------- difficulty

function drawDifficulty() {
  const lane = lanes[0];
  const decision = lane?.decision;
  const known = decision && decision.difficulty !== null && decision.why !== "forced";
  byId("difficulty-card").hidden = !known;
  if (!known) return;
  const last = Math.max(10, lane.tokens, ...lane.checkpoints.map(([t]) => t));
  const chart = new Chart(byId("difficulty"), {
    title: difficultyText(lane),
    x: { low: 0, high: last, label: "tokens written" },
    y: { low: 0, high: 100, label: "difficulty" },
    height: 230,
  });
  const policy = about.policy;
  chart.horizontal(decision.threshold ?? policy.tau, 0, last * 0.12, "threshold");
  if (policy.kind === "two-step") {
    for (const value of [policy.tau_slow, policy.tau_fast]) chart.horizontal(value, 0, last, "threshold");
  }
  if (lane.change) {
    chart.vertical(lane.change.token, "moment");
    chart.label(lane.change.token, 96, `⇄ token ${lane.change.token}`, { kind: "moment-text" });
  }
  const points = [[0, decision.difficulty], ...lane.checkpoints];
  chart.line(points, "routed");
  for (const [token, d] of points.slice(1)) chart.dot(token, d, "dot", { title: `token ${token}: ${fixed(d)}` });
  chart.dot(0, decision.difficulty, "dot", { title: `question: ${fixed(decision.difficulty)}`, radius: 6, square: true });
  chart.label(0, decision.difficulty, `question ${fixed(decision.difficulty)}`, { above: decision.difficulty < 85 });
  byId("difficulty-key").textContent = thresholdsText(decision, policy);
  const rows = [{ cells: ["question", fixed(decision.difficulty)] }, ...lane.checkpoints.map(([t, d]) => ({ cells: [`token ${t}`, fixed(d)] }))];
  byId("difficulty-table").replaceChildren(table(["read at", "difficulty"], rows, "Difficulties"));
}

function thresholdsText(decision, policy) {
  const question = decision.threshold === null ? [] : [`the question's threshold ${fixed(decision.threshold)}`];
  const more = policy.kind === "two-step" ? [`a thought closes below ${fixed(policy.tau_fast)} and opens above ${fixed(policy.tau_slow)}`] : [];
  return question.length + more.length ? `Dotted: ${[...question, ...more].join("; ")}.` : "";
}

function difficultyText(lane) {
  const at = lane.checkpoints.map(([t, d]) => `${fixed(d)} at token ${t}`).join(", ");
  const moment = lane.change ? ` ${switchText(lane.change)}.` : "";
  return `Difficulty of the question: ${fixed(lane.decision.difficulty)}.${at ? ` In mid-answer: ${at}.` : ""}${moment}`;
}
