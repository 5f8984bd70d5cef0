// The shell of the page: views by the URL's hash, the API client, the login.

import { h } from "./dom.js";

const base = new URL("../", document.baseURI);
const KEY = "argus-key"; // in sessionStorage
const VIEWS = ["playground", "live"];
const COLOURS = 16; // --v0 and so on in style.css
const READY_S = 15;
const LOADING_S = 2;

// An answer that is not 2xx, in the server's words; or no answer, with status 0.
export class ApiError extends Error {
  constructor(status, message, retryAfter = null, code = null) {
    super(message);
    Object.assign(this, { name: "ApiError", status, retryAfter, code });
  }
}

export const api = {
  get key() {
    return sessionStorage.getItem(KEY);
  },
  set key(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  },
  get: (path, options = {}) => json("GET", path, options),
  post: (path, body, options = {}) => json("POST", path, { ...options, body }),
  delete: (path, options = {}) => json("DELETE", path, options),

  // Reads server-sent events until their end. `onEvent(name, data)` gets each with its JSON; a
  // comment such as ": queued {…}" is the event of that name.
  async events(path, { method = "GET", body, onEvent, signal } = {}) {
    const answer = await send(method, path, { body, signal, accept: "text/event-stream" });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value;
      const parts = text.split(/\r?\n\r?\n/);
      text = parts.pop();
      for (const part of parts) {
        const event = parsed(part);
        if (event) onEvent(event.name, event.data);
      }
    }
  },

  // What the server serves (`GET /v1/argus/served`), as last read.
  served: null,

  // Shows in the header which policy decides, where that is known before it is read again.
  decides(policy) {
    if (!this.served || this.served.policy === policy) return;
    this.served.policy = policy;
    showFacts();
  },
};

// The colour of a variant, as CSS; the same in every view.
export function colourOf(variant) {
  const names = api.served ? api.served.variants.map((one) => one.name) : [];
  const index = names.indexOf(variant);
  const name = index < 0 ? "--muted" : `--v${index % COLOURS}`;
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

async function json(method, path, options) {
  const answer = await send(method, path, options);
  return answer.status === 204 ? null : answer.json();
}

async function send(method, path, { body, signal, accept = "application/json" } = {}) {
  while (true) {
    const key = api.key;
    const headers = { accept };
    if (key) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    let answer;
    try {
      answer = await fetch(new URL(path.replace(/^\//, ""), base), {
        method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server does not answer.");
    }
    if (answer.ok) return answer;
    const failed = await failure(answer);
    if (failed.status !== 401) throw failed;
    if (api.key !== key) continue; // logged in while this was on its way
    if (!(await login(key ? failed.message : ""))) throw failed;
  }
}

async function failure(answer) {
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // a proxy's page, for instance
  }
  const retryAfter = Number(answer.headers.get("retry-after")) || null;
  const message = error.message ?? `The server answers ${answer.status}.`;
  return new ApiError(answer.status, message, retryAfter, error.code ?? null);
}

function parsed(part) {
  let name = "message";
  const data = [];
  for (const line of part.split(/\r?\n/)) {
    const comment = /^: ?([\w.-]+) (\{.*)$/.exec(line);
    if (comment) return { name: comment[1], data: JSON.parse(comment[2]) };
    if (line.startsWith("event:")) name = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).trim());
  }
  return data.length ? { name, data: JSON.parse(data.join("\n")) } : null;
}

// --- login

const dialog = document.getElementById("login");
const keyInput = document.getElementById("login-key");
const keyError = document.getElementById("login-error");
const keyButton = document.getElementById("key");
let asking = null;

// Asks for a key until the server takes it; resolves to whether it did. One dialog serves all who
// ask meanwhile.
function login(why) {
  asking ??= new Promise((resolve) => {
    const say = (message) => {
      keyError.textContent = message;
      keyError.hidden = !message;
    };
    const end = (ok) => {
      asking = null;
      dialog.onclose = dialog.onsubmit = null;
      if (dialog.open) dialog.close();
      resolve(ok);
    };
    say(why);
    keyInput.value = "";
    dialog.onclose = () => end(false);
    dialog.onsubmit = async (event) => {
      event.preventDefault();
      const key = keyInput.value.trim();
      let answer;
      try {
        const headers = { authorization: `Bearer ${key}` };
        answer = await fetch(new URL("v1/argus/served", base), { headers });
      } catch {
        say("The key cannot be sent: it has characters that no key has, or the server is away.");
        return;
      }
      if (!answer.ok) {
        say((await failure(answer)).message);
        keyInput.select();
        return;
      }
      api.key = key;
      api.served = await answer.json();
      showServed();
      end(true);
    };
    if (!dialog.open) dialog.showModal();
    keyInput.focus();
  });
  return asking;
}

document.getElementById("login-cancel").addEventListener("click", () => dialog.close());
keyButton.addEventListener("click", () => login(""));

// --- header

const state = document.getElementById("state");
const facts = document.getElementById("facts");

function showServed() {
  const served = api.served;
  const [word, title] = served.problem
    ? ["unusable", served.problem]
    : !served.ready
      ? ["loading", "The model is loading."]
      : served.degraded.length
        ? ["degraded", `Cannot be stored or read now: ${served.degraded.join(", ")}.`]
        : ["ready", "The server makes pictures."];
  say(word, title);
  showFacts();
  keyButton.hidden = served.key === undefined;
  if (served.key !== undefined) {
    keyButton.textContent = `Key: ${served.key}`;
    keyButton.title = served.admin ? "An admin key. Take another one." : "Take another key.";
  }
  document.dispatchEvent(new CustomEvent("served"));
}

function showFacts() {
  const { served } = api;
  facts.replaceChildren(h("strong", {}, served.family), h("span", { class: "muted" }, `policy ${served.policy}`));
  facts.title = `${served.description} Argus ${served.version}.`;
}

function say(word, title) {
  if (state.textContent !== word) state.textContent = word;
  state.dataset.state = word;
  state.title = title;
}

// Reads what is served now and then; while the page is hidden or has no key, it does not.
async function watch(locked) {
  while (true) {
    if (locked) {
      say("locked", "The server asks for an API key.");
      await new Promise((resolve) => document.addEventListener("served", resolve, { once: true }));
      locked = false;
    } else if (!document.hidden || !api.served) {
      try {
        api.served = await api.get("v1/argus/served");
        showServed();
      } catch (error) {
        locked = error.status === 401;
        say("away", error.message);
      }
    }
    const pause = state.dataset.state === "ready" ? READY_S : LOADING_S;
    if (!locked) await new Promise((resolve) => setTimeout(resolve, 1000 * pause));
  }
}

// --- views

const main = document.getElementById("main");
let unmount = null;
let shown = null;

async function show() {
  const wanted = location.hash.slice(1);
  const view = VIEWS.includes(wanted) ? wanted : VIEWS[0];
  if (view === shown) return;
  shown = view;
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view === "live" ? "Live" : "Playground"} · Argus`;
  unmount?.();
  unmount = null;
  main.replaceChildren();
  try {
    const module = await import(`./${view}.js`);
    if (shown === view) unmount = module.mount(main, api);
  } catch {
    main.append(h("p", { class: "error", role: "alert" }, "This view cannot be loaded: reload the page."));
  }
}

async function begin() {
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    main.focus();
  });
  let locked = false;
  try {
    const health = await api.get("health");
    keyButton.hidden = !health.keys;
    keyButton.textContent = "Log in";
    locked = health.keys && !api.key;
  } catch {
    // `watch` says so
  }
  if (locked) locked = !(await login(""));
  watch(locked);
  addEventListener("hashchange", show);
  show();
}

begin();
