// The status page: follows the cluster's events and shows each state as it comes.

import { NeedsKey, call, events, forgetKey, hasKey, rememberKey } from "./api.js";
import { setModel, startChat } from "./chat.js";
import { judge, showLoad, showProtection, showTopology } from "./cluster.js";
import { byId, setText } from "./dom.js";
import { showTimeline } from "./timeline.js";

const RETRY_MS = 1000;
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));
let announced = "";
let wake = () => {};

function say(level, text) {
  byId("state").dataset.level = level;
  setText(byId("state-text"), text);
  if (text !== announced) {
    announced = text;
    setText(byId("announcer"), `Cluster: ${text}`);
  }
  document.title = level === "good" ? "GhostServe" : `${text} · GhostServe`;
}

function show(status) {
  const { level, text } = judge(status);
  say(level, text);
  const shape = status.model ? ` · ${status.model.dtype} · ${status.max_model_len} tokens` : "";
  const hosted = status.engine !== "embedded"; // its requests go to its own API, not through this gateway
  setText(byId("model"), `${status.served_name}${shape}${hosted ? ` · ${status.engine}` : ""}`);
  byId("chat").hidden = hosted;
  setText(byId("version"), `GhostServe ${status.gateway.version}`);
  setModel(status.served_name);
  showProtection(status);
  showLoad(status);
  showTopology(status, status.gateway.allow_faults ? kill : null);
  showTimeline(status);
}

async function kill(worker) {
  setText(byId("fault-problem"), "");
  try {
    await call("v1/fault_tolerance/faults", { body: { fault: "kill", worker: worker.name } });
  } catch (error) {
    setText(byId("fault-problem"), error.message);
  }
}

async function follow() {
  const response = await call("v1/fault_tolerance/events");
  byId("key-form").hidden = true;
  for await (const { event, data } of events(response)) {
    const content = JSON.parse(data);
    if (event === "status") show(content);
    else say("bad", `No coordinator: ${content.detail}`);
  }
}

function askForKey() {
  const form = byId("key-form");
  say("warn", "The operators' token is needed");
  setText(byId("key-problem"), hasKey() ? "This token is not accepted." : "");
  forgetKey();
  form.hidden = false;
  byId("key").focus();
  return new Promise((done) => { wake = done; });
}

async function run() {
  for (;;) {
    try {
      await follow();
      say("bad", "The gateway closed the connection");
    } catch (error) {
      if (error instanceof NeedsKey) {
        await askForKey();
        continue;
      }
      say("bad", `No gateway: ${error.message}`);
    }
    await sleep(RETRY_MS);
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  rememberKey(byId("key").value);
  byId("key").value = "";
  wake();
});
startChat();
run();
