"use strict";
(() => {
  const data = document.getElementById("neuron-texts");
  const table = document.getElementById("neurons");
  if (!data || !table) return;
  const examples = JSON.parse(data.textContent);
  const rows = () => [...table.tBodies[0].rows];

  // Sorting: the button of a heading sorts by its column, and reverses the order when it is pressed again.
  for (const heading of table.tHead.rows[0].cells) {
    heading.querySelector("button")?.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => Number(row.cells[heading.cellIndex].dataset.value);
      const sorted = rows().sort((first, second) => (up ? 1 : -1) * (value(first) - value(second)));
      table.tBodies[0].append(...sorted);
    });
  }

  // Filtering: hide the rows that do not fit the form.
  const form = document.getElementById("filter");
  const count = document.getElementById("count");
  const filter = () => {
    const name = form.elements.name.value.trim();
    const layer = form.elements.layer.value;
    let shown = 0;
    for (const row of rows()) {
      const fits = row.dataset.name.startsWith(name) && (!layer || row.dataset.layer === layer)
        && (!form.elements.beyond.checked || row.dataset.beyond === "yes");
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    count.textContent = `${shown} of ${rows().length} neurons shown`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();

  // The page of a neuron: its examples are built when it is opened, as text nodes, so that no text becomes markup.
  const element = (name, className, ...children) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    node.append(...children);
    return node;
  };
  const coloured = (side, largest) => {
    const text = element("p", "text");
    if (side.first > 0) text.append("… ");
    side.tokens.forEach((token, number) => {
      const activation = side.activations[number];
      const span = element("span", side.first + number < side.response_start ? "prompt" : "", token);
      const colour = activation > 0 ? "--positive" : "--negative";
      span.style.backgroundColor = `rgba(var(${colour}), ${(0.7 * Math.abs(activation)) / largest})`;
      span.title = `${activation}`;
      text.append(span);
    });
    if (side.first + side.tokens.length < side.n_tokens) text.append(" …");
    return text;
  };
  const fill = (container) => {
    for (const example of examples[container.dataset.neuron] ?? []) {
      const all = [...example.chosen.activations, ...example.rejected.activations].map(Math.abs);
      const largest = Math.max(...all, Number.MIN_VALUE);
      const sides = ["chosen", "rejected"].map((side) =>
        element("div", "", element("h4", "", side), coloured(example[side], largest)));
      const summary = element("summary", "", `${example.objective} pair ${example.pair}, largest activation ${largest.toPrecision(3)}`);
      container.append(element("details", "", summary, element("div", "pair", ...sides)));
    }
    container.dataset.filled = "yes";
  };
  const open = () => {
    const wanted = decodeURIComponent(location.hash.slice(1));
    for (const article of document.querySelectorAll("article")) {
      article.hidden = article.id !== wanted;
      if (article.hidden) continue;
      const container = article.querySelector(".examples");
      if (!container.dataset.filled) fill(container);
      article.scrollIntoView();
      article.querySelector("h3").focus({ preventScroll: true });
    }
  };
  addEventListener("hashchange", open);
  open();
})();
