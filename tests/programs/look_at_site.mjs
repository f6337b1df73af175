// Uses the search of the built site in Chromium, as a reader would, and prints the result of every check.
//
//     npm install playwright-core
//     python -m http.server --directory site 8000 &
//     node tests/programs/look_at_site.mjs site http://localhost:8000 /usr/bin/chromium pictures/
//
// Every word must have results, from a server and from a folder (file://). Where the worker cannot run in a frame, the
// page must say how to serve the site. Exits with 1 if a check fails.
import { chromium } from "playwright-core";
import { resolve } from "node:path";

const [site, served, browserPath, pictures] = process.argv.slice(2);
const words = ["category", "caption", "CSV", "ablate", "notebook", "caching", "resume", "LoRA", "GPU", "figure", "install"];
const failed = [];
const require = (fits, what, seen) => {
  console.log(`${fits ? "ok  " : "FAIL"} ${what}: ${seen}`);
  if (!fits) failed.push(what);
};

const browser = await chromium.launch({ executablePath: browserPath, args: ["--no-sandbox"] });
for (const [device, width, height] of [["desktop", 1280, 900], ["phone", 390, 844]]) {
  for (const [from, url] of [["server", served], ["folder", `file://${resolve(site)}`]]) {
    const page = await browser.newPage({ viewport: { width, height } });
    const errors = [];
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    page.on("pageerror", (error) => errors.push(String(error)));
    await page.goto(`${url}/index.html`, { waitUntil: "load" });
    await page.waitForTimeout(500);
    await page.click(width < 960 ? "label[for=__search].md-header__button" : ".md-search__input");
    for (const word of words) {
      // The theme searches when a key is released.
      await page.fill(".md-search__input", "");
      await page.keyboard.press("Backspace");
      await page.waitForFunction(() => /Type to start/.test(document.querySelector(".md-search-result__meta").textContent));
      await page.keyboard.type(word);
      await page.waitForFunction(() => /document|No match/.test(document.querySelector(".md-search-result__meta").textContent));
      const told = (await page.textContent(".md-search-result__meta")).trim();
      const links = await page.$$eval(".md-search-result__link", (found) => found.map((link) => link.href));
      const first = links[0]?.replace(/\?.*/, "").slice(url.length) ?? "nothing";
      require(/\d+ matching/.test(told), `${device}, ${from}: ${word}`, `${told}, first ${first}`);
    }
    require(errors.length === 0, `${device}, ${from}: errors in the console`, errors.length ? errors.join("; ") : "none");
    if (pictures) await page.screenshot({ path: `${pictures}/search-${device}-${from}.png` });
    await page.close();
  }
}
// Without frames: what the reader is told.
const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
await page.addInitScript(() => Object.defineProperty(HTMLIFrameElement.prototype, "contentWindow", { get: () => null }));
await page.goto(`file://${resolve(site)}/index.html`, { waitUntil: "load" });
await page.waitForTimeout(500);
const told = await page.evaluate(() => document.querySelector("#search-needs-server")?.textContent ?? "nothing");
require(told.includes("python -m http.server"), "a folder where no worker runs", told);
if (pictures) await page.screenshot({ path: `${pictures}/search-none.png` });
await browser.close();
console.log(failed.length ? `${failed.length} checks failed` : "all checks passed");
process.exit(failed.length ? 1 : 0);
