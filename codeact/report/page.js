"use strict";
// Search and sort of lists, and what is under the pointer in a plot. The page says all it has to say without.
const number = text => Number(text.replace(/[,%\s]/g, "") || NaN);
const none = text => text === "\u2013";
const inOrder = new Intl.Collator("en", {numeric: true}).compare;

for (const table of document.querySelectorAll("table.list")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const texts = new Map(rows.map(row => [row, row.textContent.toLowerCase()]));
  const tools = document.createElement("p"), search = document.createElement("input"), count = document.createElement("output");
  const find = () => {
    const words = search.value.toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !words.every(word => texts.get(row).includes(word));
    count.value = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
  };
  tools.className = "tools";
  search.type = "search";
  search.placeholder = "Search";
  search.setAttribute("aria-label", "Search this list");
  search.addEventListener("input", find);
  tools.append(search, count);
  if (rows.length > 8) table.parentElement.before(tools);
  find();
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.ariaSort === "ascending" ? -1 : 1;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const cells = new Map(rows.map(row => [row, row.cells[column].textContent.trim()]));
      rows.sort((one, other) => {
        const [a, b] = [cells.get(one), cells.get(other)], [x, y] = [number(a), number(b)];
        return none(a) - none(b) || sign * (isNaN(x) || isNaN(y) ? inOrder(a, b) : x - y);
      });
      body.append(...rows);
    });
  });
  table.classList.add("sortable");
}

for (const data of document.querySelectorAll("figure > script")) {
  const figure = data.parentElement, svg = figure.querySelector("svg"), {flat, points} = JSON.parse(data.textContent);
  const tip = document.createElement("p");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(tip);
  const show = event => {
    const frame = svg.getBoundingClientRect(), scale = svg.viewBox.baseVal.width / frame.width;
    const [x, y] = [(event.clientX - frame.left) * scale, (event.clientY - frame.top) * scale];
    let best = null, least = 14;  // units of the plot, from the pointer
    for (const point of points) {
      const far = flat ? Math.abs(point[0] - x) : Math.hypot(point[0] - x, point[1] - y);
      if (far < least) [best, least] = [point, far];
    }
    tip.hidden = !best;
    if (!best) return;
    tip.textContent = best[2];
    tip.style.left = `${Math.max(0, Math.min(best[0] / scale, figure.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${best[1] / scale + 14}px`;
  };
  for (const kind of ["pointermove", "pointerdown"]) svg.addEventListener(kind, show);
  svg.addEventListener("pointerleave", () => { tip.hidden = true; });
}
