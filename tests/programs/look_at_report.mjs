// Opens a report, or a page of neuron dashboards, in Chromium, uses it as a reader would, and says what happened.
//
//     npm install playwright-core
//     node tests/programs/look_at_report.mjs report.html pictures/ /usr/bin/chromium
//
// At desktop and phone width, light and dark: errors in the console, requests to a network, first paint, sorting,
// filtering, opening a neuron by the pointer and by the keyboard, text of the data that would be markup. Exits with 1
// if anything is not as it should be. The neurons of the report need a pair with "<script>" in it.
import { chromium } from "playwright-core";
import { mkdirSync, statSync } from "node:fs";
import { resolve } from "node:path";

const [report, pictures, browserPath] = process.argv.slice(2);
const url = `file://${resolve(report)}`;
mkdirSync(pictures, { recursive: true });
const failed = [];
const require = (fits, what, seen) => {
  console.log(`${fits ? "ok  " : "FAIL"} ${what}: ${seen}`);
  if (!fits) failed.push(what);
};

const browser = await chromium.launch({ executablePath: browserPath });
require(statSync(report).size <= 5e6, "size", `${(statSync(report).size / 1e6).toFixed(2)} MB`);
for (const [device, width, height] of [["desktop", 1280, 900], ["phone", 390, 844]]) {
  for (const colorScheme of ["light", "dark"]) {
    const name = `${device}, ${colorScheme}`;
    const page = await browser.newPage({ viewport: { width, height }, colorScheme });
    const errors = [];
    const requests = [];
    page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
    page.on("pageerror", (error) => errors.push(String(error)));
    page.on("dialog", (dialog) => { errors.push(`dialog ${dialog.message()}`); dialog.dismiss(); });
    page.on("request", (one) => { if (!/^(file|data):/.test(one.url())) requests.push(one.url()); });
    await page.goto(url, { waitUntil: "load" });
    const painted = () => performance.getEntriesByName("first-contentful-paint")[0]?.startTime;
    const paint = await (await page.waitForFunction(painted)).jsonValue();
    require(paint <= 2000, `${name}: first paint`, `${paint?.toFixed(0)} ms`);
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    require(wide <= width, `${name}: nothing wider than the window`, `${wide} of ${width} pixels`);
    const alts = await page.evaluate(() => [...document.images].filter((one) => one.alt.length < 10).length);
    require(alts === 0, `${name}: pictures without a text`, alts);
    await page.screenshot({ path: `${pictures}/${device}-${colorScheme}-top.png` });

    const column = (at) => page.$$eval("#neurons tbody tr:not([hidden])", (rows, at) =>
      rows.map((row) => Number(row.cells[at].dataset.value)), at);
    for (const at of [1, 3]) {
      await page.locator("#neurons thead button").nth(at).click();
      const down = await column(at);
      await page.locator("#neurons thead button").nth(at).click();
      const up = await column(at);
      const sorted = [...up].sort((one, other) => one - other);
      require(up.length > 1 && String(up) === String(sorted) && String(down) === String([...sorted].reverse()),
        `${name}: sorts column ${at}`, `${up.length} rows, both ways`);
    }
    const all = (await column(0)).length;
    const names = () => page.$$eval("#neurons tbody tr:not([hidden])", (rows) => rows.map((row) => row.dataset.name));
    const name0 = (await names())[0];
    await page.fill("#filter input[name=name]", name0);
    const left = await names();
    require(left.length < all && left.every((one) => one.startsWith(name0)), `${name}: filters by name`,
      `${left.length} of ${all} begin with ${name0}`);
    await page.fill("#filter input[name=name]", "");
    await page.check("#filter input[name=beyond]");
    const beyond = await page.$$eval("#neurons tbody tr:not([hidden])", (rows) => rows.map((row) => row.dataset.beyond));
    require(beyond.every((one) => one === "yes"), `${name}: filters by interval`, `${beyond.length} of ${all}`);
    await page.uncheck("#filter input[name=beyond]");

    // A point is chosen with the pointer; the page of its neuron opens.
    const point = page.locator("svg a").first();
    const wanted = (await point.getAttribute("href")).slice(1);
    await point.click();
    const opened = () => page.$$eval("article:not([hidden])", (found) => found.map((one) => one.id));
    require(String(await opened()) === wanted, `${name}: a click on a point`, `opens ${await opened()}`);
    const other = page.locator("svg a").nth(1);
    await other.focus();
    await page.keyboard.press("Enter");
    const next = (await other.getAttribute("href")).slice(1);
    require(String(await opened()) === next, `${name}: Enter on a point`, `opens ${await opened()}`);
    const folds = () => page.$$eval("article:not([hidden]) .fold", (found) => found.length);
    const before = await folds();
    if (before) await page.locator("article:not([hidden]) .fold").first().click();
    require(!before || (await folds()) === before - 1, `${name}: a click on a fold`, `${before} folds`);
    await page.screenshot({ path: `${pictures}/${device}-${colorScheme}-neuron.png` });

    // Every page is opened once; what the data says is text.
    for (const id of await page.$$eval("article", (found) => found.map((one) => one.id)))
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
      shown: [...document.querySelectorAll(".text")].filter((one) => one.textContent.includes("<script>")).length,
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
console.log(failed.length ? `${failed.length} not as they should be` : "all as it should be");
process.exit(failed.length ? 1 : 0);
