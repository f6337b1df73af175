// Opens a report in Chromium, uses it as a reader would, and prints the result of every check.
//
//     npm install playwright-core
//     node tests/programs/look_at_report.mjs report.html pictures/ /usr/bin/chromium
//
// It checks, at desktop and phone width, light and dark: the answer on the first screen, errors in the console, requests
// to a network, first paint, folded tables, cards on a phone, sorting, filtering, opening a neuron by pointer and by
// keyboard, and that texts of the data do not become markup. It exits with 1 if a check fails. The examples of a neuron
// must contain a pair with "<script>" in it.
import { chromium } from "playwright-core";
import { mkdirSync, statSync } from "node:fs";
import { resolve } from "node:path";

const [report, pictures, browserPath] = process.argv.slice(2);
const url = `file://${resolve(report)}`;
mkdirSync(pictures, { recursive: true });
const failed = [];
const require = (passed, what, seen) => {
  console.log(`${passed ? "ok  " : "FAIL"} ${what}: ${seen}`);
  if (!passed) failed.push(what);
};

const browser = await chromium.launch({ executablePath: browserPath });
require(statSync(report).size <= 5e6, "size", `${(statSync(report).size / 1e6).toFixed(2)} MB`);
for (const [device, width, height] of [["desktop", 1280, 800], ["phone", 390, 844]]) {
  for (const colorScheme of ["light", "dark"]) {
    const name = `${device}, ${colorScheme}`;
    const page = await browser.newPage({ viewport: { width, height }, colorScheme });
    const errors = [];
    const requests = [];
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    page.on("pageerror", (error) => errors.push(String(error)));
    page.on("dialog", (dialog) => { errors.push(`dialog ${dialog.message()}`); dialog.dismiss(); });
    page.on("request", (request) => { if (!/^(file|data):/.test(request.url())) requests.push(request.url()); });
    await page.goto(url, { waitUntil: "load" });
    const painted = () => performance.getEntriesByName("first-contentful-paint")[0]?.startTime;
    const paint = await (await page.waitForFunction(painted)).jsonValue();
    require(paint <= 2000, `${name}: first paint`, `${paint?.toFixed(0)} ms`);
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    require(wide <= width, `${name}: nothing wider than the window`, `${wide} of ${width} pixels`);
    const alts = await page.evaluate(() => [...document.images].filter((image) => image.alt.length < 10).length);
    require(alts === 0, `${name}: pictures without a text`, alts);
    await page.screenshot({ path: `${pictures}/${device}-${colorScheme}-top.png` });

    // The answer is read without scrolling: its sentences on a phone, and its figure too on a desktop.
    const last = device === "desktop" ? ".answer img" : ".sentences";
    const bottom = await page.$eval(last, (one) => one.getBoundingClientRect().bottom);
    require(bottom <= height, `${name}: the answer without scrolling`, `ends at ${bottom.toFixed(0)} of ${height} pixels`);
    const isOpen = await page.$eval("#contents", (one) => one.open);
    require(isOpen === (device === "desktop"), `${name}: contents`, isOpen ? "at the side" : "folded");
    require((await page.$$eval("details.fold[open]", (found) => found.length)) === 0, `${name}: tables`, "folded");
    // The keyboard opens a table; on a phone its rows are cards that fit.
    await page.locator("details.fold > summary").first().focus();
    await page.keyboard.press("Enter");
    const tables = await page.$$eval("details.fold", (folds) => {
      for (const fold of folds) fold.open = true;
      return folds.length;
    });
    const shown = await page.$eval("table.cards td", (one) => getComputedStyle(one).display);
    require((shown === "grid") === (device === "phone"), `${name}: rows of ${tables} folded parts`, shown);
    const widest = await page.evaluate(() => document.documentElement.scrollWidth);
    require(widest <= width, `${name}: nothing wider with all tables open`, `${widest} of ${width} pixels`);
    await page.screenshot({ path: `${pictures}/${device}-${colorScheme}-tables.png`, fullPage: true });
    await page.$$eval("details.fold", (folds) => { for (const fold of folds) fold.open = false; });

    const column = (at) => page.$$eval("#neurons tbody tr:not([hidden])", (rows, at) =>
      rows.map((row) => Number(row.cells[at].dataset.value)), at);
    for (const at of [1, 3]) {
      await page.locator("#neurons thead button").nth(at).click();
      const down = await column(at);
      await page.locator("#neurons thead button").nth(at).click();
      const up = await column(at);
      const sorted = [...up].sort((a, b) => a - b);
      require(up.length > 1 && String(up) === String(sorted) && String(down) === String([...sorted].reverse()),
        `${name}: sorts column ${at}`, `${up.length} rows, both ways`);
    }
    const all = (await column(0)).length;
    const names = () => page.$$eval("#neurons tbody tr:not([hidden])", (rows) => rows.map((row) => row.dataset.name));
    const name0 = (await names())[0];
    await page.fill("#filter input[name=name]", name0);
    const left = await names();
    require(left.length < all && left.every((name) => name.startsWith(name0)), `${name}: filters by name`,
      `${left.length} of ${all} begin with ${name0}`);
    await page.fill("#filter input[name=name]", "");
    await page.check("#filter input[name=beyond]");
    const beyond = await page.$$eval("#neurons tbody tr:not([hidden])", (rows) => rows.map((row) => row.dataset.beyond));
    require(beyond.every((value) => value === "yes"), `${name}: filters by interval`, `${beyond.length} of ${all}`);
    await page.uncheck("#filter input[name=beyond]");

    // A point is chosen with the pointer; the page of its neuron opens.
    const point = page.locator("svg a").first();
    const wanted = (await point.getAttribute("href")).slice(1);
    await point.click();
    await page.waitForSelector("article:not([hidden])");
    const opened = () => page.$$eval("article:not([hidden])", (articles) => articles.map((article) => article.id));
    require(String(await opened()) === wanted, `${name}: a click on a point`, `opens ${await opened()}`);
    const other = page.locator("svg a").nth(1);
    await other.focus();
    await page.keyboard.press("Enter");
    const next = (await other.getAttribute("href")).slice(1);
    await page.waitForSelector(`article[id="${next}"]:not([hidden])`, { timeout: 5000 }).catch(() => {});
    require(String(await opened()) === next, `${name}: Enter on a point`, `opens ${await opened()}`);
    const folds = () => page.$$eval("article:not([hidden]) .unfold", (found) => found.length);
    const before = await folds();
    if (before) await page.locator("article:not([hidden]) .unfold").first().click();
    require(!before || (await folds()) === before - 1, `${name}: a click on a fold`, `${before} folds`);
    await page.screenshot({ path: `${pictures}/${device}-${colorScheme}-neuron.png` });

    // Every neuron is opened once; the data must appear as text.
    for (const id of await page.$$eval("article", (articles) => articles.map((article) => article.id)))
      await page.evaluate((id) => { location.hash = id; }, id);
    await page.waitForTimeout(200);
    // In every example of every card, the most active token of both texts takes room on the screen.
    let seen = 0, listed = 0;
    for (const id of await page.$$eval("article", (found) => found.map((one) => one.id))) {
      await page.evaluate((id) => { location.hash = id; }, id);
      await page.waitForSelector(`#${id}:not([hidden])`);
      const peaks = await page.$$eval(`#${id} .example`, (found) => found.map((one) => [...one.querySelectorAll(".peak")]
        .filter((peak) => peak.checkVisibility() && peak.getBoundingClientRect().width > 2 && peak.textContent.trim()).length));
      listed += peaks.length;
      seen += peaks.filter((number) => number === 2).length;
    }
    require(seen === listed, `${name}: the most active tokens are visible`, `in ${seen} of ${listed} examples`);
    const hostile = await page.evaluate(() => ({
      shown: [...document.querySelectorAll(".text")].filter((text) => text.textContent.includes("<script>")).length,
      markup: document.querySelectorAll(".text script, .text img, summary script").length,
    }));
    require(hostile.shown > 0 && hostile.markup === 0, `${name}: <script> in a pair`, JSON.stringify(hostile));
    require(errors.length === 0, `${name}: errors in the console`, errors.length ? errors.join("; ") : "none");
    require(requests.length === 0, `${name}: requests`, requests.length ? requests.join("; ") : "none");
    await page.close();
  }
}
const page = await browser.newPage({ viewport: { width: 1280, height: 900 } });
await page.goto(url);
await page.screenshot({ path: `${pictures}/whole.png`, fullPage: true });
await browser.close();
console.log(failed.length ? `${failed.length} checks failed` : "all checks passed");
process.exit(failed.length ? 1 : 0);
