// One answer that is being written: its text by phase and sentence, colours, forced tokens, the moment of the switch.

import { element, fixed, share } from "./page.js";

const WHY = {
  forced: "asked for", policy: "the policy's only mode", budget: "within the budget", margin: "kept from the last turn",
  shadow: "shadow: only noted", fault: "the difficulty could not be read",
};

export const band = (confidence) => Math.min(4, Math.floor(confidence * 5));

/** What was decided before the first token, as a sentence. */
export function decisionText(decision) {
  const mode = decision.mode === "slow" ? "Thinks first" : decision.mode === "fast" ? "Answers at once" : decision.mode;
  if (decision.fault) return `${mode}: ${decision.fault}`;
  if (decision.difficulty === null || decision.why === "forced") return `${mode} (${WHY[decision.why] ?? decision.why}).`;
  const d = `difficulty ${fixed(decision.difficulty)}`;
  if (decision.why === "difficulty" && decision.threshold !== null) {
    const above = decision.difficulty > decision.threshold;
    const given = above && decision.mode === "fast" ? ": thinking is not likely to help" : "";
    return `${mode}: ${d} is ${above ? "above" : "not above"} ${fixed(decision.threshold)}${given}.`;
  }
  return `${mode}: ${d} (${WHY[decision.why] ?? decision.why}).`;
}

export function switchText(change) {
  const what = change.to === "fast" ? "thought closed" : "thought opened";
  const side = change.to === "fast" ? "below" : "above";
  const would = change.shadow ? "shadow, would be: " : "";
  return `⇄ ${would}${what} at token ${change.token}: difficulty ${fixed(change.difficulty)} is ${side} ${fixed(change.threshold)}`;
}

export class Lane {
  constructor(title) {
    this.tokens = 0;
    this.decision = null;
    this.change = null;
    this.checkpoints = [];
    this.end = null;
    this.sentences = new Map();
    this.segment = null;
    this.count = element("span", { class: "count" }, "0 tokens");
    this.said = element("p", { class: "said" });
    this.text = element("div", { class: "text" });
    this.root = element("section", { class: "card lane writing" }, element("h2", {}, element("span", {}, title), this.count), this.said, this.text);
  }

  decide(decision) {
    this.decision = decision;
    this.said.textContent = decisionText(decision);
  }

  write(piece) {
    if (piece.token !== null) {
      this.tokens = piece.token + 1;
      this.count.textContent = `${this.tokens} tokens`;
    }
    if (!piece.text) return;
    if (this.segment?.phase !== piece.phase) this.#begin(piece.phase);
    // Blank lines around marks and at the beginning say nothing to a reader.
    const text = this.segment.empty || piece.sentence === null ? piece.text.trim() : piece.text;
    const made = element("span", {}, text);
    made.dataset.token = piece.token ?? this.tokens;
    if (text !== piece.text) made.dataset.raw = piece.text;
    if (piece.sentence === null) {
      if (text) made.className = piece.forced ? "mark forced" : "mark";
      if (piece.forced) made.title = "put in by the router";
      this.segment.root.append(made);
      return;
    }
    if (text) this.segment.empty = false;
    let sentence = this.sentences.get(piece.sentence);
    if (sentence === undefined) {
      sentence = element("span", { class: "sentence" });
      this.segment.root.append(sentence);
      this.sentences.set(piece.sentence, sentence);
    }
    sentence.append(made);
  }

  #begin(phase) {
    const root = element("div", { class: `segment ${phase}` });
    if (phase === "thought") root.append(element("span", { class: "kind" }, "thought"));
    this.segment = { phase, root, empty: true };
    this.text.append(root);
  }

  /** The moment of the switch: before its first token, wherever that stands by now. */
  switch(change) {
    this.change = change;
    const mark = element("span", { class: "switch" }, switchText(change));
    const spans = [...this.text.querySelectorAll("[data-token]")];
    const first = spans.find((s) => Number(s.dataset.token) >= change.token);
    if (!first) {
      (this.segment?.root ?? this.text).append(mark);
      return;
    }
    first.before(mark);
    for (const span of spans) {
      const token = Number(span.dataset.token);
      if (token >= change.token && token < change.token + change.forced) span.classList.add("forced");
    }
  }

  colour({ sentence, confidence, reason }) {
    const root = this.sentences.get(sentence);
    if (!root || !root.textContent.trim()) return;
    root.querySelector(".conf")?.remove();
    if (confidence === null) {
      root.title = reason ?? "";
      return;
    }
    const last = root.lastElementChild;
    if (last && last.textContent !== last.textContent.trimEnd()) {
      last.dataset.raw ??= last.textContent;
      last.textContent = last.textContent.trimEnd();
    }
    root.classList.add(`c${band(confidence)}`);
    root.title = `confidence ${share(confidence)} by the end of this sentence`;
    root.append(element("span", { class: "conf" }, share(confidence)));
  }

  /** The text of a sentence, without its number. */
  sentenceText(sentence) {
    const root = this.sentences.get(sentence);
    return root ? [...root.querySelectorAll("[data-token]")].map((s) => s.textContent).join("").trim() : "";
  }

  finish(end) {
    this.end = end;
    this.tokens = end.tokens;
    this.root.classList.remove("writing");
    const why = { length: ", cut at the limit", cancelled: ", stopped" }[end.finish_reason] ?? "";
    const sure = end.confidence === null ? "" : ` · confidence ${share(end.confidence)}`;
    this.count.textContent = `${end.tokens} tokens${why}${sure}`;
  }

  still() {
    this.root.classList.remove("writing");
  }
}
