// The cluster's state, as the coordinator tells it, on the page.

import { byId, bytes, keyed, make, plural, seconds, setBar, setFacts, setText } from "./dom.js";

const LAG_LIMIT_S = 5;
const SPARE_LEVELS = { spare: "good", loading: "busy" };

/** How the cluster is: a level for the colour, and the same in words. */
export function judge(status) {
  const spares = status.workers.filter((worker) => worker.state === "spare").length;
  if (status.state !== "serving") {
    const waits = status.state === "forming" && status.detail.startsWith("waiting");
    const what = status.recovering_since === null ? "Starting" : "Recovering";
    return { level: waits && what === "Recovering" ? "bad" : "busy", text: `${what}: ${status.detail}` };
  }
  if (status.protection === "none") return { level: "warn", text: "Serving, protection is off" };
  if (status.stores.length === 0) return { level: "bad", text: "Serving, unprotected: no parity store" };
  if (status.stripes_unprotected > 0) return { level: "bad", text: "Serving, partly unprotected" };
  if (status.protection_lag_s > LAG_LIMIT_S) return { level: "warn", text: "Serving, protection lags behind" };
  return spares ? { level: "good", text: "Serving" } : { level: "warn", text: "Serving, no spare" };
}

export function showProtection(status) {
  const { level } = judge(status);
  const card = byId("protection");
  const safe = status.state === "serving" && status.protection !== "none" && status.stores.length > 0
    && status.stripes_unprotected === 0;
  card.dataset.level = level;
  setText(byId("can-lose"), safe ? `Can lose ${plural(status.parity, "rank")} now` : "Can lose no rank now");
  setText(byId("can-lose-why"), why(status, safe));
  const stores = status.stores.length > 0; // without one, nothing is on its way
  const done = status.stripes_protected;
  const pending = stores ? status.stripes_pending : 0;
  const bare = status.stripes_unprotected + status.stripes_pending - pending;
  setBar(byId("stripes"), [["protected", done], ["pending", pending], ["unprotected", bare]],
    `pages of KV: ${done} protected, ${pending} on their way, ${bare} unprotected`);
  setFacts(byId("protection-facts"), [
    ["Pages protected", String(done)], ["on their way", String(pending)], ["unprotected", String(bare)],
    ["Lag", seconds(status.protection_lag_s)], ["Parity stored", bytes(status.parity_bytes_stored)],
  ]);
}

function why(status, safe) {
  if (status.state !== "serving") return "Requests wait and go on by themselves. " + sentence(status.detail);
  if (status.protection === "none") return "Protection is off: after a loss everything is recomputed.";
  if (!safe) return `After a loss what has no parity is recomputed: ${status.unprotected_reason || "no parity store"}.`;
  return `No request is lost; ${plural(status.unprotected_tokens, "token")} without parity would be recomputed.`;
}

const sentence = (text) => text && text[0].toUpperCase() + text.slice(1).replace(/\.?$/, ".");

let before = null;

export function showLoad(status) {
  const rate = before && status.now > before.now
    ? Math.max(0, status.generated_tokens - before.generated_tokens) / (status.now - before.now) : 0;
  if (!before || status.now - before.now > 0.9) before = { ...status, rate };
  setFacts(byId("load-facts"), [
    ["running", String(status.running)], ["waiting", String(status.waiting)],
    ["tokens/s", (before.rate || rate).toFixed(before.rate < 10 ? 1 : 0)],
  ]);
  const { pages_held: held, pages_cached: cached, pages_total: total } = status;
  const free = total - held - cached;
  const share = (pages) => `${((100 * pages) / Math.max(1, total)).toFixed(pages * 10 < total ? 1 : 0)}%`;
  setText(byId("kv-text"), `KV pool: ${share(held)} in use, ${share(cached)} cached for reuse`);
  setBar(byId("kv"), [["held", held], ["cached", cached], ["free", free]],
    `KV pool of ${total} pages: ${held} in use, ${cached} cached, ${free} free`);
}

/** Ranks, spares and stores. `kill` is called with a worker, where faults are allowed; else it is null. */
export function showTopology(status, kill) {
  setText(byId("group-title"), `Group ${status.group} · ${plural(status.size, "rank")} · epoch ${status.epoch}`);
  const holders = new Map(status.workers.filter((each) => each.rank !== null).map((each) => [each.rank, each]));
  const ranks = Array.from({ length: status.size }, (_, rank) => ({ rank, worker: holders.get(rank) ?? null }));
  keyed(byId("ranks"), ranks, (each) => each.rank, rankTile, (tile, each) => fillRank(tile, each, status, kill));
  const others = status.workers.filter((each) => each.rank === null);
  keyed(byId("spares"), others, (each) => each.name, tile, (element, worker) =>
    fill(element, SPARE_LEVELS[worker.state] ?? "warn", worker.name,
      `${worker.state === "spare" ? "ready" : worker.state} · ${worker.device}`, `${worker.host} · ${pid(worker)}`));
  byId("no-spares").hidden = others.length > 0;
  keyed(byId("stores"), status.stores, (each) => each.store_id, tile, (element, store) =>
    fill(element, "good", store.store_id, `connected · ${bytes(store.capacity_bytes)}`, store.bulk_address));
  byId("no-stores").hidden = status.stores.length > 0;
}

const pid = (worker) => `pid\u00a0${worker.pid}`;

function tile() {
  const head = make("span", "name", make("span", "dot"), make("span"));
  return make("li", "tile", head, make("small"), make("small"));
}

function rankTile() {
  const element = tile();
  const button = make("button", "kill");
  button.type = "button";
  button.hidden = true;
  element.append(button);
  return element;
}

function fill(element, level, name, first, second) {
  element.firstChild.dataset.level = level;
  setText(element.firstChild.lastChild, name);
  setText(element.children[1], first);
  setText(element.children[2], second);
}

function fillRank(element, { rank, worker }, status, kill) {
  const serving = status.state === "serving";
  const usual = worker?.state === "member"; // otherwise it is being moved, and its state says so
  const level = worker === null ? "bad" : worker.straggler ? "warn" : serving && usual ? "good" : "busy";
  const doing = worker === null ? "lost, vacant"
    : worker.straggler ? `straggler: ${seconds(worker.compute_s)} a step`
    : !usual ? worker.state : serving ? `serving · ${worker.device}` : status.state;
  fill(element, level, `Rank ${rank}`, doing, worker === null ? "waiting for a spare" : `${worker.name} (${pid(worker)})`);
  element.classList.toggle("vacant", worker === null);
  const button = element.lastChild;
  button.hidden = kill === null;
  button.disabled = worker === null;
  setText(button, `Kill rank ${rank}`);
  button.onclick = () => kill(worker);
}
