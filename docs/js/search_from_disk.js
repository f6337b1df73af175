// Browsers do not let a page that was opened from a folder load the search index: the search box then says what to do.
if (location.protocol === "file:") {
  const remedy = "Search needs a web server. Run: python -m http.server";
  const explanation =
    "Search does not work in pages that are opened from a folder. In the folder of this site, run " +
    "“python -m http.server”, and open http://localhost:8000.";
  const say = () => {
    const input = document.querySelector(".md-search__input");
    const result = document.querySelector(".md-search-result__meta");
    if (!input || !result) return;
    input.placeholder = remedy;
    input.setAttribute("aria-label", remedy);
    input.title = explanation;
    // The theme writes its own text there when it begins to load the index.
    if (result.textContent !== explanation) result.textContent = explanation;
  };
  const result = document.querySelector(".md-search-result__meta");
  if (result) new MutationObserver(say).observe(result, { childList: true, characterData: true, subtree: true });
  say();
}
