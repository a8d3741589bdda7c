// The page: what the server runs, and its three views.

import { startAsk } from "./ask.js";
import { startCompare } from "./compare.js";
import { byId, request, showFault } from "./page.js";
import { startThresholds } from "./thresholds.js";

const VIEWS = ["ask", "thresholds", "compare"];
const shown = {};

function show(name, { focus = false } = {}) {
  for (const view of VIEWS) {
    const chosen = view === name;
    const tab = byId(`tab-${view}`);
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    byId(`view-${view}`).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  shown[name]?.();
}

function startTabs() {
  for (const [i, view] of VIEWS.entries()) {
    const tab = byId(`tab-${view}`);
    tab.addEventListener("click", () => show(view));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: VIEWS.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      show(VIEWS[(to + VIEWS.length) % VIEWS.length], { focus: true });
    });
  }
  addEventListener("hashchange", () => {
    const name = location.hash.slice(1);
    if (VIEWS.includes(name)) show(name);
  });
}

const KINDS = { "two-step": "two steps", "one-step": "one step", budget: "a budget", fast: "always fast", slow: "always slow" };

function describe(about) {
  const said = [`${about.model.name}, ${about.model.layers} layers, ${about.engine === "vllm" ? "in vLLM" : "in transformers"}`];
  if (about.policy) said.push(`policy: ${KINDS[about.policy.kind] ?? about.policy.kind}`);
  else said.push("no routing");
  said.push(about.confidence ? "with a trained confidence" : "without a confidence head");
  return said.join(" · ");
}

try {
  startTabs();
  const about = await (await request("/api/about")).json();
  byId("about").textContent = describe(about);
  byId("version").textContent = `kvroute ${about.version}.`;
  startAsk(about);
  shown.thresholds = startThresholds(about);
  startCompare(about);
  const wanted = location.hash.slice(1);
  show(VIEWS.includes(wanted) ? wanted : "ask");
} catch (fault) {
  if (!fault.message) throw fault;
  byId("about").textContent = "";
  showFault(byId("ask-fault"), fault);
  if (fault instanceof Error) throw fault;
}
