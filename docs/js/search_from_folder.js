// Search for pages that were opened from a folder, where browsers start no workers: the theme's worker runs in a hidden
// frame instead. Where that fails, the page says how to serve the site. docs/search_from_folder.py adds this script.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inside = frame.contentWindow;
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      this.ready = new Promise((resolve) => {
        const script = frame.contentDocument.createElement("script");
        script.src = url;
        script.onload = resolve;
        frame.contentDocument.body.append(script);
      });
    }
    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new this.inside.MessageEvent("message", { data })));
    }
  };

  // The theme hides the search box if it cannot search.
  const box = document.querySelector(".md-search");
  const explain = () => {
    if (!box.hidden || document.querySelector("#search-needs-server")) return;
    const note = document.createElement("small");
    note.id = "search-needs-server";
    note.style.padding = "0 0.6rem";
    note.textContent = "To search, run “python -m http.server” in this folder and open http://localhost:8000";
    box.after(note);
  };
  if (box) new MutationObserver(explain).observe(box, { attributes: true, attributeFilter: ["hidden"] });
}
