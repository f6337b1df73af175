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
  const plain = (text) => text.toLowerCase().replaceAll(" ", "");
  const filter = () => {
    const name = plain(form.elements.name.value);
    const layer = form.elements.layer.value;
    let shown = 0;
    for (const row of rows()) {
      const fits = plain(row.dataset.name).includes(name) && (!layer || row.dataset.layer === layer)
        && (!form.elements.beyond.checked || row.dataset.beyond === "yes");
      row.hidden = !fits;
      shown += fits ? 1 : 0;
    }
    count.textContent = `${shown} of ${rows().length} neurons shown`;
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();

  // The card of a neuron: its examples are built when it is opened, as text nodes, so that no text becomes markup.
  const element = (name, className, ...children) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    node.append(...children);
    return node;
  };
  const MARKS = /([·⏎⇥▫])/;
  const token = (side, number, largest) => {
    const activation = side.activations[number];
    const strength = (0.8 * Math.abs(activation)) / largest;
    const classes = ["token"];
    if (side.first + number < side.response_start) classes.push("prompt");
    if (side.special.includes(number)) classes.push("special");
    if (number === side.peak) classes.push("peak");
    if (strength > 0.58) classes.push("strong");
    else if (strength > 0.1) classes.push("lit");
    const span = element("span", classes.join(" "));
    for (const part of side.tokens[number].split(MARKS)) {
      if (part) span.append(MARKS.test(part) ? element("span", "mark", part) : part);
    }
    span.style.backgroundColor = `rgba(var(${activation > 0 ? "--positive" : "--negative"}), ${strength})`;
    span.title = `activation ${activation}`;
    // A line may break before a space.
    return side.tokens[number].startsWith("·") ? [document.createElement("wbr"), span] : [span];
  };
  // Tokens outside the window around the most active token are folded; a button shows them.
  const folded = (side, start, end, further, where, largest) => {
    if (start === end && !further) return [];
    const more = further ? `, and ${further} that this page does not have` : "";
    const button = element("button", "unfold", `… ${end - start} tokens ${where}${more}`);
    button.type = "button";
    const rest = element("span", "");
    rest.hidden = true;
    for (let number = start; number < end; number += 1) rest.append(...token(side, number, largest));
    button.addEventListener("click", () => { rest.hidden = false; button.remove(); });
    return where === "before" ? [button, rest] : [rest, button];
  };
  const coloured = (side, largest) => {
    const [start, end] = side.window;
    const text = element("p", "text", ...folded(side, 0, start, side.first, "before", largest));
    for (let number = start; number < end; number += 1) text.append(...token(side, number, largest));
    const stored = side.tokens.length;
    text.append(...folded(side, end, stored, side.n_tokens - side.first - stored, "after", largest));
    return text;
  };
  const fill = (container) => {
    const ofNeuron = examples[container.dataset.neuron] ?? [];
    const sizes = ofNeuron.flatMap((one) => [...one.chosen.activations, ...one.rejected.activations].map(Math.abs));
    const largest = sizes.reduce((most, size) => Math.max(most, size), Number.MIN_VALUE);
    for (const example of ofNeuron) {
      const sides = ["chosen", "rejected"].map((side) => {
        const peak = example[side].activations[example[side].peak];
        return element("div", "", element("h5", "", `${side}, most active token: ${peak.toPrecision(3)}`),
          coloured(example[side], largest));
      });
      container.append(element("div", "example", element("p", "", `${example.group}: pair ${example.pair}`),
        element("div", "pair", ...sides)));
    }
    container.dataset.filled = "yes";
  };
  const articles = [...document.querySelectorAll(".neurons article")];
  const open = (wanted, { scroll = true } = {}) => {
    for (const article of articles) {
      article.hidden = article.id !== wanted;
      if (article.hidden) continue;
      const container = article.querySelector(".examples");
      if (container && !container.dataset.filled) fill(container);
      if (!scroll) continue;
      article.scrollIntoView();
      article.querySelector("h3").focus({ preventScroll: true });
    }
  };
  const here = () => decodeURIComponent(location.hash.slice(1));
  // Inside a frame of a notebook, a link to a place on this page would load the notebook: follow it here.
  document.addEventListener("click", (event) => {
    const link = event.target.closest?.("a[href^='#']");
    if (!link || location.protocol !== "about:") return;
    event.preventDefault();
    const wanted = link.getAttribute("href").slice(1);
    if (articles.some((article) => article.id === wanted)) open(wanted);
    else document.getElementById(wanted)?.scrollIntoView();
  });
  const follow = () => { if (articles.some((article) => article.id === here())) open(here()); };
  addEventListener("hashchange", follow);
  if (document.body.classList.contains("alone")) open(articles[0].id, { scroll: false });
  follow();
})();
