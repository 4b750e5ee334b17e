// A conversation with the model over the streaming API. What the client notices of a recovery is the longest pause.

import { call, events } from "./api.js";
import { byId, make, plural, seconds, setText } from "./dom.js";

const SAMPLING = { temperature: 0.3, top_p: 0.9 }; // small models ramble at 1
const turns = [];
let controller = null;
let model = "";

export function setModel(name) {
  model = name;
}

export function startChat() {
  const prompt = byId("prompt");
  byId("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = prompt.value.trim();
    if (text && controller === null) {
      prompt.value = "";
      ask(text, Number(byId("max-tokens").value) || 256);
    }
  });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      byId("chat-form").requestSubmit();
    }
  });
  byId("stop").addEventListener("click", () => controller?.abort());
  byId("clear").addEventListener("click", () => {
    controller?.abort();
    turns.length = 0;
    byId("talk").replaceChildren(byId("talk-empty"));
    byId("talk-empty").hidden = false;
  });
}

async function ask(text, maxTokens) {
  turns.push({ role: "user", content: text });
  show("user", text);
  const turn = show("assistant", "");
  const answer = { role: "assistant", content: "" };
  turns.push(answer);
  busy(true);
  controller = new AbortController();
  const body = { model, messages: turns.slice(0, -1), max_tokens: maxTokens, stream: true, ...SAMPLING };
  const pace = { pieces: 0, longest: 0, started: performance.now(), last: null };
  try {
    const response = await call("v1/chat/completions", { body, signal: controller.signal });
    for await (const { data } of events(response)) {
      if (data === "[DONE]") break;
      const piece = JSON.parse(data);
      if (piece.error) throw new Error(piece.error.message);
      const added = piece.choices[0]?.delta.content;
      if (added) take(turn, answer, added, pace);
    }
    close(turn, summary(pace), "done");
  } catch (error) {
    const stopped = error.name === "AbortError";
    close(turn, stopped ? "stopped" : `ended unfinished: ${error.message}`, stopped ? "stopped" : "failed");
    if (!answer.content) turns.splice(-2);
  } finally {
    controller = null;
    busy(false);
  }
}

function take(turn, answer, added, pace) {
  const now = performance.now();
  if (pace.last !== null) pace.longest = Math.max(pace.longest, now - pace.last);
  pace.last = now;
  pace.pieces += 1;
  answer.content += added;
  setText(turn.firstChild, answer.content);
  const talk = byId("talk");
  if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) talk.scrollTop = talk.scrollHeight;
}

function summary(pace) {
  const took = (performance.now() - pace.started) / 1000;
  return `${plural(pace.pieces, "piece")} in ${seconds(took)}, longest pause ${seconds(pace.longest / 1000)}`;
}

function show(who, text) {
  byId("talk-empty").hidden = true;
  const turn = make("div", `turn ${who}`, make("span", "text", text), make("small"));
  if (who === "assistant") {
    turn.classList.add("streaming");
    turn.setAttribute("aria-busy", "true");
  } else turn.lastChild.remove();
  byId("talk").append(turn);
  byId("talk").scrollTop = byId("talk").scrollHeight;
  return turn;
}

function close(turn, note, outcome) {
  turn.classList.remove("streaming");
  turn.removeAttribute("aria-busy");
  turn.dataset.outcome = outcome;
  setText(turn.lastChild, note);
}

function busy(is) {
  byId("send").hidden = is;
  byId("stop").hidden = !is;
}
