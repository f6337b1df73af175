"use strict";
(() => {
  // On a narrow window the contents are folded, so that the answer comes first.
  const contents = document.getElementById("contents");
  const wide = matchMedia("(min-width: 64rem)");
  const fold = () => { contents.open = wide.matches; };
  wide.addEventListener("change", fold);
  fold();

  // The entry of the section that is being read is marked.
  const entries = new Map([...contents.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]));
  const headings = [...entries.keys()].map((id) => document.getElementById(id)).filter(Boolean);
  const mark = () => {
    const past = headings.filter((heading) => heading.getBoundingClientRect().top < innerHeight / 3);
    const current = (past.at(-1) ?? headings[0])?.id;
    for (const [id, link] of entries) {
      if (id === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  addEventListener("scroll", mark, { passive: true });
  mark();

  // A figure that is wider than the window scrolls, also by the keyboard.
  const reach = () => {
    for (const box of document.querySelectorAll(".picture > div")) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  addEventListener("resize", reach);
  reach();

  // Printing shows the folded tables too, and folds them again.
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details.fold:not([open])")];
    for (const one of folded) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of folded) one.open = false; });
})();
