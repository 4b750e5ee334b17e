// The last recoveries, each as a bar of its phases.

import { ago, byId, bytes, keyed, make, plural, seconds, setBar, setText } from "./dom.js";

const PHASES = [
  ["detect", "detect_s", "last sign of life to suspicion"],
  ["regroup", "regroup_s", "fence, new epoch, communicators"],
  ["weights", "weights_s", "the spare takes the slice"],
  ["restore", "restore_s", "lost pages decoded from parity"],
  ["recompute", "recompute_s", "what had no parity, as a prefill"],
];
const SHOWN = 8;

export function showTimeline(status) {
  const records = [...status.recoveries].reverse().slice(0, SHOWN);
  byId("no-recoveries").hidden = records.length > 0;
  byId("legend").hidden = records.length === 0;
  keyed(byId("legend"), PHASES, ([name]) => name, ([name, , what]) =>
    make("li", "", make("i", `phase-${name}`), `${name}: ${what}`), () => {});
  const longest = Math.max(...records.map(totalOf));
  keyed(byId("timeline"), records, (each) => each.started, row,
    (element, each) => fill(element, each, status.now, longest));
  const underWay = underWayText(status);
  byId("under-way").hidden = underWay === "";
  setText(byId("under-way-text"), underWay);
}

function underWayText({ recovering_since: since, now, detail, handover: move }) {
  if (since !== null) return `Under way for ${seconds(now - since)}: ${detail}`;
  return move ? `Rank ${move.rank} moves to ${move.successor}: ${move.phase}, ${plural(move.pages_left, "page")} left` : "";
}

const partsOf = (record) => PHASES.map(([name, field]) => [name, Math.max(0, record[field] ?? 0)]);
const totalOf = (record) => partsOf(record).reduce((sum, [, each]) => sum + each, 0);

function row() {
  const bar = make("div", "bar");
  bar.setAttribute("role", "img");
  return make("li", "", make("div", "recovery", make("b"), make("small")), bar, make("small"));
}

/** All bars have one scale: the longest recovery shown takes the whole width. */
function fill(element, record, now, longest) {
  const [head, bar, text] = element.children;
  const what = record.lost_ranks.length ? `Rank ${record.lost_ranks.join(", ")} lost`
    : record.planned ? "A rank moved" : "Epoch broken";
  const parts = partsOf(record);
  const total = totalOf(record);
  setText(head.firstChild, record.planned ? `${what}, requests waited ${seconds(total)}` : `${what}, whole again after ${seconds(total)}`);
  setText(head.lastChild, `${ago(now - record.ended)} · epoch ${record.epoch}`);
  setBar(bar, [...parts, ["rest", longest - total]].map(([name, each]) => [`phase-${name}`, each * 1000]),
    parts.map(([name, each]) => `${name} ${seconds(each)}`).join(", "));
  const pages = `${plural(record.restored_pages, "page")} (${bytes(record.kv_bytes_restored)}) restored`;
  setText(text, `${pages}, ${plural(record.recomputed_tokens, "token")} recomputed, `
    + `${plural(record.sequences, "stream")} resumed · ${record.reason}`);
}
