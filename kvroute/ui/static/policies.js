// What thresholds give on labelled rows: the browser's side of kvroute/candidates.py and kvroute/routing_curves.py.

/** Whether a row is thought about: above tau, and up to giveUp (100: never given up). */
const thinks = (d, tau, giveUp) => d > tau && (giveUp >= 100 || d <= giveUp);

/** What a row gets: [right, tokens, thought about]. A thought is closed at the first checkpoint below tauFast. */
function outcome(part, i, { tau, giveUp, tauFast }) {
  if (!thinks(part.difficulty[i], tau, giveUp)) return [part.fast_right[i], part.fast_tokens[i], 0];
  if (part.closings && tauFast > 0) {
    for (const [d, right, tokens] of part.closings[i]) if (d < tauFast) return [right, tokens, 1];
  }
  return [part.slow_right[i], part.slow_tokens[i], 1];
}

/** Accuracy, tokens a question and share thought about of a policy. */
export function evaluate(part, thresholds) {
  let [right, tokens, slow] = [0, 0, 0];
  for (let i = 0; i < part.rows; i += 1) {
    const [r, t, s] = outcome(part, i, thresholds);
    right += r;
    tokens += t;
    slow += s;
  }
  return { accuracy: right / part.rows, tokens: tokens / part.rows, slow: slow / part.rows };
}

const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;

/** One mode for all, and the oracle: for each row the cheapest mode that is right, else fast. */
export function references(part) {
  let [right, tokens] = [0, 0];
  for (let i = 0; i < part.rows; i += 1) {
    const [f, s] = [part.fast_right[i], part.slow_right[i]];
    const slow = s > f || (s === f && f > 0 && part.slow_tokens[i] < part.fast_tokens[i]);
    right += slow ? s : f;
    tokens += slow ? part.slow_tokens[i] : part.fast_tokens[i];
  }
  return {
    fast: { accuracy: mean(part.fast_right), tokens: mean(part.fast_tokens), slow: 0 },
    slow: { accuracy: mean(part.slow_right), tokens: mean(part.slow_tokens), slow: 1 },
    oracle: { accuracy: right / part.rows, tokens: tokens / part.rows, slow: null },
  };
}

/** The policy at every threshold of a grid of difficulties that occur, from the fewest thoughts to the most. */
export function curve(part, { giveUp, tauFast }, size = 60) {
  const sorted = [...new Set(part.difficulty)].sort((a, b) => b - a);
  const step = Math.max(1, Math.floor(sorted.length / size));
  const taus = sorted.filter((_, i) => i % step === 0);
  taus.push(Math.min(-1, sorted[sorted.length - 1] - 1));
  return taus.map((tau) => ({ tau, ...evaluate(part, { tau, giveUp, tauFast }) }));
}
