"use strict";
// Sortable tables: a click on a column's head sorts by it, a second click the other way round.
// A cell's value is its data-sort, else its text; cells without a value stay last.

function valueOf(row, column) {
  const cell = row.cells[column];
  const text = cell.dataset.sort ?? cell.textContent.trim();
  const number = Number(text.replace(/[,%\s]/g, ""));
  if (text === "" || text === "–") return null;
  return Number.isNaN(number) ? text : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

function sort(table, heads, column) {
  const falling = heads[column].getAttribute("aria-sort") === "descending";
  const numeric = table.tBodies[0].rows[0]?.cells[column].dataset.sort !== undefined;
  const sorted = heads[column].hasAttribute("aria-sort");
  // Numbers start with the largest, names with A.
  const way = (sorted ? !falling : numeric) ? -1 : 1;
  const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row, column), row]);
  const known = rows.filter(([value]) => value !== null);
  known.sort(([a], [b]) => way * compare(a, b));
  const unknown = rows.filter(([value]) => value === null);
  table.tBodies[0].append(...[...known, ...unknown].map(([, row]) => row));
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", way === -1 ? "descending" : "ascending");
}

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => sort(table, heads, column));
  });
}
