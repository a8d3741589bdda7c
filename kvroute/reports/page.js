"use strict";
// Tables sort by a column: first upwards, then downwards, then as they came. Cells without a value stay last.
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, place) => {
    const cell = row.cells[place];
    if (cell.hasAttribute("data-none")) return null;
    return cell.hasAttribute("data-number") ? Number(cell.dataset.number) : cell.textContent;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b, undefined, { numeric: true, sensitivity: "base" });
  };
  heads.forEach((head, place) => {
    head.querySelector("button").addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const keyed = original.map((row) => [key(row, place), row]);
      if (next !== "none") {
        keyed.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b)));
      }
      body.append(...keyed.map(([, row]) => row));
    });
  });
}
