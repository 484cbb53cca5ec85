// Drives a headless Chromium over its debugging protocol: node --experimental-websocket page.js CHROMIUM URL SHOT STEPS
// STEPS is a JSON list of [what, expression]: each is evaluated again and again until it is true. Prints what failed.
"use strict";
const { spawn } = require("child_process");
const fs = require("fs"), os = require("os"), path = require("path");
const [chromium, url, shot, steps] = process.argv.slice(2);
const profile = fs.mkdtempSync(path.join(os.tmpdir(), "h5push-page-"));
const browser = spawn(chromium, ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
  "--remote-debugging-port=0", "--user-data-dir=" + profile, "--window-size=1200,800", "--lang=en", "about:blank"], { stdio: ["ignore", "ignore", "pipe"] });
const sleep = ms => new Promise(done => setTimeout(done, ms));
const problems = [];
async function main() {
  const endpoint = await new Promise((done, fail) => {
    let said = "";
    browser.stderr.on("data", data => { said += data; const found = /DevTools listening on (ws:\S+)/.exec(said); if (found) done(found[1]); });
    browser.on("exit", () => fail(new Error("chromium ended: " + said)));
    setTimeout(() => fail(new Error("chromium does not start: " + said)), 30000);
  });
  const port = new URL(endpoint).port;
  const page = (await (await fetch(`http://127.0.0.1:${port}/json/list`)).json()).find(target => target.type === "page");
  const socket = new WebSocket(page.webSocketDebuggerUrl);
  await new Promise(done => socket.addEventListener("open", done));
  // A 401 is how the page learns that it has to ask for the token; the browser notes it as an error.
  const waiting = new Map();
  let next = 1;
  socket.addEventListener("message", event => {
    const message = JSON.parse(event.data);
    if (message.id) return waiting.get(message.id)(message);
    if (message.method === "Runtime.exceptionThrown") problems.push("exception: " + JSON.stringify(message.params.exceptionDetails));
    if (message.method === "Runtime.consoleAPICalled" && ["error", "warning"].includes(message.params.type)) problems.push("console: " + JSON.stringify(message.params.args));
    if (message.method === "Log.entryAdded" && message.params.entry.level === "error" && !/status of 401/.test(message.params.entry.text)) problems.push("log: " + message.params.entry.text + " " + (message.params.entry.url || ""));
    if (message.method === "Network.requestWillBeSent" && !message.params.request.url.startsWith(new URL(url).origin) && !message.params.request.url.startsWith("data:")) problems.push("a request elsewhere: " + message.params.request.url);
  });
  const send = (method, params = {}) => new Promise(done => { waiting.set(next, done); socket.send(JSON.stringify({ id: next++, method, params })); });
  for (const domain of ["Runtime", "Log", "Network", "Page"]) await send(domain + ".enable");
  await send("Page.navigate", { url });
  for (const [what, expression] of JSON.parse(steps)) {
    const until = Date.now() + 25000;
    for (;;) {
      const answer = await send("Runtime.evaluate", { expression, returnByValue: true });
      if (answer.result.result && answer.result.result.value === true) break;
      if (Date.now() > until) {
        const text = await send("Runtime.evaluate", { expression: "document.body.innerText", returnByValue: true });
        throw new Error("waited in vain: " + what + "\n" + text.result.result.value);
      }
      await sleep(100);
    }
    console.log("ok " + what);
    if (what.includes("screenshot")) {
      const image = await send("Page.captureScreenshot", { format: "png" });
      fs.writeFileSync(shot, Buffer.from(image.result.data, "base64"));
    }
  }
  if (problems.length) throw new Error(problems.join("\n"));
}
main().then(() => 0, error => { console.error(error.message); return 1; }).then(code => { browser.once("exit", () => { try { fs.rmSync(profile, { recursive: true, force: true, maxRetries: 5 }); } catch {} process.exit(code); }); browser.kill("SIGKILL"); });
