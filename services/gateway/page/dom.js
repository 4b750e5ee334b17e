// Small helpers around the DOM. Text is always set as text, never as HTML.

export const byId = (id) => document.getElementById(id);

/** A new element with a class and children (elements or strings). */
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

/** Set text only where it differs, so that readers and selections are left alone. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Make the children of `parent` those of `items`: kept by key, so that focus stays where it is. */
export function keyed(parent, items, keyOf, create, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  items.forEach((item, index) => {
    const key = String(keyOf(item));
    let child = old.get(key);
    if (child) old.delete(key);
    else {
      child = create(item);
      child.dataset.key = key;
    }
    update(child, item);
    if (parent.children[index] !== child) parent.insertBefore(child, parent.children[index] ?? null);
  });
  for (const child of old.values()) child.remove();
}

/** Fill a <dl> with [term, value] pairs. */
export function setFacts(list, facts) {
  keyed(list, facts, ([term]) => term, ([term]) => make("div", "", make("dt", "", term), make("dd")),
    (row, [, value]) => setText(row.lastChild, value));
}

/** Fill a bar with [class, amount] parts, told to screen readers as `label`. */
export function setBar(bar, parts, label) {
  keyed(bar, parts.filter(([, amount]) => amount > 0), ([name]) => name, ([name]) => make("span", name),
    (part, [, amount]) => { part.style.flexGrow = amount; });
  if (bar.getAttribute("aria-label") !== label) bar.setAttribute("aria-label", label);
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

export function bytes(count) {
  const unit = count >= 1e9 ? [1e9, "GB"] : count >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(count / unit[0]).toFixed(count >= 1e6 ? 1 : 0)} ${unit[1]}`;
}

export function seconds(count) {
  return count < 1 ? `${Math.round(count * 1000)} ms` : `${count.toFixed(count < 10 ? 2 : 1)} s`;
}

export function ago(count) {
  if (count < 60) return `${Math.max(0, Math.round(count))} s ago`;
  return count < 3600 ? `${Math.round(count / 60)} min ago` : `${Math.round(count / 3600)} h ago`;
}
