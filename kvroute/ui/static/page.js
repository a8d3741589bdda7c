// What all views share: elements, numbers, requests.

export const byId = (id) => document.getElementById(id);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** A number in [0, 1] as .87, or a dash where there is none. */
export function share(value) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(2);
  return text.startsWith("0") ? text.slice(1) : text;
}

export const fixed = (value, places = 1) => (value === null || value === undefined ? "–" : value.toFixed(places));

export function table(columns, rows, caption) {
  const made = element("table");
  if (caption) made.append(element("caption", { class: "unseen" }, caption));
  made.append(element("thead", {}, element("tr", {}, ...columns.map((c) => element("th", { scope: "col" }, c)))));
  const body = element("tbody");
  for (const row of rows) {
    const [first, ...rest] = row.cells;
    const line = element("tr", row.now ? { class: "now" } : {});
    line.append(element("th", { scope: "row" }, String(first)), ...rest.map((c) => element("td", {}, String(c))));
    body.append(line);
  }
  made.append(body);
  return made;
}

export function showFault(place, fault) {
  place.textContent = fault ? [fault.message, fault.hint].filter(Boolean).join(" ") : "";
  place.hidden = !fault;
}

const GONE = { message: "The server of this page does not answer.", hint: "Is kvroute ui still running?" };

/** A response, or a fault as {message, hint}. */
export async function request(path, body, signal) {
  const how = body === undefined
    ? { signal }
    : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
  let response;
  try {
    response = await fetch(path, how);
  } catch (error) {
    throw error.name === "AbortError" ? error : GONE;
  }
  if (response.ok) return response;
  let fault;
  try {
    fault = await response.json();
  } catch {
    fault = { message: `The server answered with status ${response.status}.`, hint: null };
  }
  throw fault;
}

/** The JSON objects of a response, one a line, as they come. */
export async function* lines(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let read;
    try {
      read = await reader.read();
    } catch (error) {
      throw error.name === "AbortError" ? error : GONE;
    }
    if (read.done) break;
    const parts = (rest + read.value).split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
  }
}
