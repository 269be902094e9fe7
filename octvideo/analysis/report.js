"use strict";

// The class table sorts by the column whose head is pressed; a second press turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const compare = (a, b) =>
        a.dataset.value === undefined
          ? a.textContent.localeCompare(b.textContent, undefined, { numeric: true })
          : a.dataset.value - b.dataset.value;
      body.append(...[...body.rows].sort((a, b) => sign * compare(a.cells[column], b.cells[column])));
    });
  });
}

// The picture of a large confusion matrix names the cell that is pointed at, or the nearest one that holds videos.
const heat = document.querySelector(".heat");
if (heat) {
  const classes = Number(heat.dataset.classes);
  const cells = heat.dataset.cells.split(";").map(
    (row) => new Map(row ? row.split(",").map((cell) => cell.split(":").map(Number)) : []),
  );
  const rows = [];
  for (const row of document.querySelectorAll("tr[data-class]")) rows[row.dataset.class] = row;
  // Isolated, so that a name that runs from right to left does not turn round the line.
  const name = (k) => `\u2068${rows[k].cells[0].textContent}\u2069`;
  const mark = heat.querySelector(".mark");
  const readout = document.querySelector(".readout");
  readout.textContent = "Point at a cell to read it.";

  const nearest = (label, predicted, reach) => {
    let best = [label, predicted];
    let least = Infinity;
    for (let i = Math.max(0, label - reach); i <= Math.min(classes - 1, label + reach); i++) {
      for (let j = Math.max(0, predicted - reach); j <= Math.min(classes - 1, predicted + reach); j++) {
        const distance = Math.hypot(i - label, j - predicted);
        if (cells[i].has(j) && distance < least) [best, least] = [[i, j], distance];
      }
    }
    return best;
  };

  const show = (event) => {
    const box = heat.getBoundingClientRect();
    const size = box.width / classes;
    const at = (place) => Math.min(classes - 1, Math.max(0, Math.floor(place / size)));
    const [i, j] = nearest(at(event.clientY - box.top), at(event.clientX - box.left), Math.floor(4 / size));
    const count = cells[i].get(j) || 0;
    const videos = Number(rows[i].dataset.videos);
    const share = videos ? ` (${((100 * count) / videos).toFixed(1)} %)` : "";
    readout.textContent = `${name(i)} → ${name(j)}: ${count} of ${videos}${share}`;
    mark.hidden = false;
    mark.style.left = `${(100 * j) / classes}%`;
    mark.style.top = `${(100 * i) / classes}%`;
    mark.style.width = mark.style.height = `${100 / classes}%`;
  };
  heat.addEventListener("pointermove", show);
  heat.addEventListener("pointerdown", show);
}
