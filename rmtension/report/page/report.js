"use strict";
(() => {
  const data = document.getElementById("neuron-texts");
  const table = document.getElementById("neurons");
  if (!data || !table) return;
  const examples = JSON.parse(data.textContent);
  const rows = () => [...table.tBodies[0].rows];

  // Sorting: a heading's button sorts its column, and turns it round when pressed again.
  for (const heading of table.tHead.rows[0].cells) {
    heading.querySelector("button")?.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") === "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => Number(row.cells[heading.cellIndex].dataset.value);
      const sorted = rows().sort((one, other) => (up ? 1 : -1) * (value(one) - value(other)));
      table.tBodies[0].append(...sorted);
    });
  }

  // Filtering.
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

  // The page of a neuron: its examples are built when it is opened, from text and never from markup.
  const element = (name, className, ...children) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    made.append(...children);
    return made;
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
  const fill = (place) => {
    for (const example of examples[place.dataset.neuron] ?? []) {
      const all = [...example.chosen.activations, ...example.rejected.activations].map(Math.abs);
      const largest = Math.max(...all, Number.MIN_VALUE);
      const sides = ["chosen", "rejected"].map((side) =>
        element("div", "", element("h4", "", side), coloured(example[side], largest)));
      const summary = element("summary", "", `${example.objective} pair ${example.pair}, up to ${largest.toPrecision(3)}`);
      place.append(element("details", "", summary, element("div", "pair", ...sides)));
    }
    place.dataset.filled = "yes";
  };
  const open = () => {
    const wanted = decodeURIComponent(location.hash.slice(1));
    for (const article of document.querySelectorAll("article")) {
      article.hidden = article.id !== wanted;
      if (article.hidden) continue;
      const place = article.querySelector(".examples");
      if (!place.dataset.filled) fill(place);
      article.scrollIntoView();
      article.querySelector("h3").focus({ preventScroll: true });
    }
  };
  addEventListener("hashchange", open);
  open();
})();
