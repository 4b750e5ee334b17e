// Calls of the REST API. The operators' token, where it is asked for, lives in this tab's session storage.

const KEY = "ghostserve-key";

export class NeedsKey extends Error {}

export const rememberKey = (key) => sessionStorage.setItem(KEY, key);
export const forgetKey = () => sessionStorage.removeItem(KEY);
export const hasKey = () => sessionStorage.getItem(KEY) !== null;

/** fetch() with the key; throws NeedsKey for 401, and an Error with the server's own words for what is not OK. */
export async function call(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store",
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (response.status === 401) throw new NeedsKey("this needs the operators' token");
  if (!response.ok) {
    const answer = await response.json().catch(() => null);
    throw new Error(answer?.error?.message ?? `${response.status} ${response.statusText}`);
  }
  return response;
}

/** The server-sent events of a response, as {event, data}; comments are skipped. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      let end;
      while ((end = held.indexOf("\n\n")) >= 0) {
        const event = parse(held.slice(0, end));
        held = held.slice(end + 2);
        if (event.data) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const event = { event: "message", data: "" };
  for (const line of block.split("\n")) {
    const [name, ...rest] = line.split(": ");
    if (name === "event") event.event = rest.join(": ");
    else if (name === "data") event.data += rest.join(": ");
  }
  return event;
}
