// Draws the grid of readings (thousands of cells are too many for Dash components). All text goes in as text, never as markup.
// Images are drawn by explore_image.js, with what this file puts into window.explore.
(() => {
  const element = (name, text, attributes = {}) => {
    const made = document.createElement(name);
    made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  const select = (hook, pos) => dash_clientside.set_props("cell", { data: { hook, pos } });
  const choose = (td) => {
    if (td) select(td.dataset.hook, Number(td.dataset.pos));
  };
  const legend = (grid) => {
    const line = element("p", "", { class: "legend" });
    line.append(
      element("span", `${grid.unit} ${grid.low.toFixed(2)}`), element("i", ""),
      element("span", grid.high.toFixed(2)), element("span", grid.kind, { class: "kind" }),
    );
    return line;
  };
  const table = (grid) => {
    const made = element("table", "", { tabindex: 0, "aria-label": "readings by layer and token; arrow keys move" });
    const head = made.createTHead().insertRow();
    head.append(element("th", "layer"));
    for (const column of grid.columns) head.append(element("th", column.token, { title: `position ${column.pos}` }));
    const body = made.createTBody();
    const span = grid.high - grid.low || 1;
    for (const row of grid.rows) {
      const line = body.insertRow();
      line.append(element("th", row.label, { title: row.hook }));
      grid.columns.forEach((column, i) => {
        const [lead, token, tail, score, isFaint] = row.cells[i] || ["", "·", "", null, false];
        const td = element("td", "", { class: isFaint ? "faint" : "", "data-hook": row.hook, "data-pos": column.pos });
        td.append(element("i", lead), element("b", token), element("i", tail));
        if (score !== null) td.title = `${lead}${token}${tail}  ${score.toFixed(3)}`;
        td.style.setProperty("--s", score === null ? 0 : ((score - grid.low) / span).toFixed(3));
        line.append(td);
      });
    }
    made.addEventListener("click", (event) => choose(event.target.closest("td")));
    made.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const td = made.querySelector("td.chosen");
      if (!move || !td) return;
      event.preventDefault();
      const next = body.rows[td.parentNode.rowIndex - 1 + move[0]]?.cells[td.cellIndex + move[1]];
      choose(next?.tagName === "TD" ? next : null);
    });
    return made;
  };
  let drawn = null;
  let image = null;
  const draw = (grid, cell, picture) => {
    const place = document.getElementById("grid");
    if (grid !== drawn) {
      const scrolled = place.querySelector(".scroll")?.scrollLeft || 0;
      place.replaceChildren();
      drawn = grid;
      document.documentElement.dataset.lens = grid?.lens || "";
      image = grid?.image ? window.explore.drawImage(grid, place, cell) : null;
      if (grid && !image) {
        const scroll = element("div", "", { class: "scroll" });
        scroll.append(table(grid));
        place.append(scroll, legend(grid));
        watchEdges(scroll);
        scroll.scrollLeft = scrolled;
      }
    }
    if (image) {
      image.show(cell, picture);
      return;
    }
    for (const td of place.querySelectorAll("td.chosen")) td.classList.remove("chosen");
    const td = cell && place.querySelector(`td[data-hook=${JSON.stringify(cell.hook)}][data-pos="${cell.pos}"]`);
    if (!td) return;
    td.classList.add("chosen");
    td.scrollIntoView({ block: "nearest", inline: "nearest" });
  };
  window.explore = { element, select, legend };
  window.dash_clientside = Object.assign({}, window.dash_clientside, { explore: { draw } });

  // Enter reads; Shift+Enter makes a new line.
  document.addEventListener("keydown", (event) => {
    const button = { prompt: "read", direction: "decode" }[event.target.id];
    if (!button || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    document.getElementById(button).click();
  });
})();
