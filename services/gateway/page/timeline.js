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
  keyed(byId("timeline"), records, (each) => each.started, row, (element, each) => fill(element, each, status.now));
}

function row() {
  const bar = make("div", "bar");
  bar.setAttribute("role", "img");
  return make("li", "", make("div", "recovery", make("b"), make("small")), bar, make("small"));
}

function fill(element, record, now) {
  const [head, bar, text] = element.children;
  const lost = record.lost_ranks.length ? `Rank ${record.lost_ranks.join(", ")} lost` : "Epoch broken";
  const parts = PHASES.map(([name, field]) => [name, Math.max(0, record[field] ?? 0)]);
  const total = parts.reduce((sum, [, each]) => sum + each, 0);
  setText(head.firstChild, `${lost}, whole again after ${seconds(total)}`);
  setText(head.lastChild, `${ago(now - record.ended)} · epoch ${record.epoch}`);
  setBar(bar, parts.map(([name, each]) => [`phase-${name}`, each]),
    parts.map(([name, each]) => `${name} ${seconds(each)}`).join(", "));
  const pages = `${plural(record.restored_pages, "page")} (${bytes(record.kv_bytes_restored)}) restored`;
  setText(text, `${pages}, ${plural(record.recomputed_tokens, "token")} recomputed, `
    + `${plural(record.sequences, "stream")} resumed · ${record.reason}`);
}
