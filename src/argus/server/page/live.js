// The live view: the server of the last minutes, second by second; the policy; a burst.

import { colourOf } from "./app.js";
import { css, newChart } from "./charts.js";
import { h, ms, num } from "./dom.js";

const LIVE = "v1/argus/live";
const EVENTS = `${LIVE}/events`;
const POLICY = "v1/argus/policy";
const BURST = "v1/argus/burst";
const KEPT = 900; // samples
const SPANS = [["2 min", 120], ["5 min", 300], ["15 min", 900]];
const SPAN_S = 120; // shown at first
const GAP_S = 5; // without a sample, from which lines are broken
const RECENT_S = 60; // of the tiles
const MEASURED_S = 300; // of the mean of measured quality: it is measured rarely
const FEWEST_MEASURED = 5; // for a mean
const RETRY_S = [1, 2, 4, 8];
const PRICE_NOTE = "What a second of a worker is worth. At 2, a variant that takes 0.1 s more must make a picture better by 0.2, where 1 is all that the exact picture is worth. 0: a worker is idle, in a burst only for moments. Pictures of a few hundredths of a second make prices of 10 to 100 in a queue. The axis is linear up to about 0.1, then logarithmic.";
const QUALITY_NOTE = "A picture's score beside that of the exact picture of its prompt and seed, as a share of what the exact one gains over a picture of another prompt: above 1 the scorer prefers it to the exact one, below 0 it is like a picture of another prompt. Measured are a share of the approximate pictures; what pins a variant and the built-in burst are not.";
const OUTCOMES = [
  ["on_time", "on time", "--live-on-time"],
  ["late", "late", "--live-late"],
  ["shed", "shed (429)", "--live-shed"],
  ["dropped", "expired (504)", "--live-dropped"],
  ["failed", "failed", "--bad"],
  ["cancelled", "cancelled", "--muted"],
];

// Shows the view in `element`; returns what ends it.
export function mount(element, api) {
  const view = new View(element, api);
  view.begin();
  return () => view.end();
}

class View {
  constructor(element, api) {
    Object.assign(this, { element, api, span: SPAN_S, report: null, state: null, samples: [] });
    this.ended = new AbortController();
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    const rate = (value) => `${num(value, value < 10 && value % 1 ? 1 : 0)}`;
    const fromZero = (least) => (_, high) => [0, Math.max(high ?? 0, least) * 1.08];
    this.charts = {
      load: newChart({ title: "Load and outcomes", unit: "pictures a second", format: rate, range: fromZero(1) }),
      variants: newChart({ title: "Variants", unit: "share of pictures", format: percent, range: () => [0, 1], tick: percent }),
      price: newChart({ title: "Price of a worker", unit: "quality a worker-second", note: PRICE_NOTE, format: (value) => num(value, value && value < 10 ? (value < 1 ? 2 : 1) : 0), range: fromZero(1), curved: true }),
      quality: newChart({ title: "Quality", unit: "1 = exact", note: QUALITY_NOTE, format: (value) => num(value, 2), range: (low) => [Math.max(-0.2, Math.min(0.7, (low ?? 1) - 0.05)), 1.05] }),
      latency: newChart({ title: "Latency", unit: "seconds", format: (value) => ms(1000 * value), range: fromZero(0.1) }),
      queue: newChart({ title: "Queue", unit: "pictures", format: (value) => num(value, 0), range: fromZero(4) }),
    };
  }

  async begin() {
    await Promise.all(["vendor/uPlot.css", "live.css"].map(styled));
    if (this.ended.signal.aborted) return;
    this.element.append(this.page());
    const { signal } = this.ended;
    document.addEventListener("visibilitychange", () => this.follow(), { signal });
    this.dark.addEventListener("change", () => this.restyle(), { signal });
    // The shell knows the variants, and so their colours, once it has read what is served.
    document.addEventListener(
      "served",
      () => {
        this.restyle();
        if (this.refused) this.follow(); // perhaps with another key
      },
      { signal },
    );
    this.follow();
  }

  end() {
    this.ended.abort();
    this.following?.abort();
    for (const chart of Object.values(this.charts)) chart.destroy();
    this.element.replaceChildren();
  }

  // --- data

  // Read what happened, and go on with every new sample; while the page is hidden, do not.
  async follow() {
    this.following?.abort();
    if (document.hidden || this.ended.signal.aborted) return;
    this.following = new AbortController();
    this.refused = false;
    const { signal } = this.following;
    for (let tries = 0; !signal.aborted; tries += 1) {
      const one = new AbortController();
      try {
        const early = []; // samples that come before the history
        this.report = null;
        const stream = this.api.events(EVENTS, {
          signal: AbortSignal.any([signal, one.signal]),
          onEvent: (_, event) => {
            tries = 0;
            if (this.report) this.add(event);
            else early.push(event);
          },
        });
        stream.catch(() => {}); // it is awaited below
        await this.load(signal);
        early.forEach((event) => this.add(event));
        await stream;
        this.say("The server is ending this stream; the page connects again.", true);
      } catch (error) {
        if (signal.aborted) return;
        this.say(error.status === 403 ? `${error.message} Take another key to see this view.` : error.message, true);
        this.refused = error.status === 401 || error.status === 403;
        if (this.refused) return;
      } finally {
        one.abort();
      }
      const pause = RETRY_S[Math.min(tries, RETRY_S.length - 1)];
      await new Promise((resolve) => setTimeout(resolve, 1000 * pause));
    }
  }

  async load(signal) {
    const report = await this.api.get(LIVE, { signal });
    signal.throwIfAborted();
    const { history } = report;
    const rows = history.at.map((_, i) => Object.fromEntries(Object.keys(history).map((name) => [name, history[name][i]])));
    this.samples = [];
    for (const row of rows) this.keep(row);
    this.report = report;
    this.state = report.state;
    this.say("");
    this.fill();
    this.draw();
  }

  add({ sample, state }) {
    const last = this.samples.at(-1);
    if (last && last.at - sample.at > GAP_S) this.samples = []; // the server's clock was set back
    else if (last && sample.at <= last.at) return;
    this.keep(sample);
    this.state = state;
    this.draw();
    if (!this.report.slos.length && sample.serving) this.load(this.following.signal).catch(() => {}); // it was loading
  }

  keep(sample) {
    const last = this.samples.at(-1);
    if (last && sample.at - last.at > GAP_S) this.samples.push({ at: last.at + 1, gap: true });
    this.samples.push(sample);
    this.samples.splice(0, this.samples.length - KEPT);
  }

  // --- the page

  page() {
    this.status = h("p", { class: "notice", role: "status", hidden: true });
    this.policy = h("select", { id: "live-policy", onchange: () => this.showPolicy() });
    this.take = h("button", { type: "submit", disabled: true }, "Switch");
    this.rate = h("input", { id: "live-rate", type: "number", min: 0.1, step: "any", inputmode: "decimal", required: true });
    this.seconds = h("input", { id: "live-seconds", type: "number", min: 1, step: "any", inputmode: "decimal", required: true });
    this.start = h("button", { type: "submit", class: "primary" }, "Start burst");
    this.stop = h("button", { type: "button", disabled: true, onclick: () => this.endBurst() }, "Stop");
    this.burst = h("p", { class: "burst muted" });
    this.told = h("p", { class: "unseen", role: "status" }); // to screen readers, once
    const spans = SPANS.map(([name, seconds]) =>
      h(
        "label",
        {},
        h("input", { type: "radio", name: "live-span", value: seconds, checked: seconds === this.span, onchange: () => this.zoom(seconds) }),
        h("span", {}, name),
      ),
    );
    this.tiles = h("dl", { class: "tiles" });
    this.rows = h("tbody");
    this.cache = h("dl", { class: "tiles" });
    const heads = ["Worker", "Holds", "Makes now", "Queued", "Wait", "Busy"];
    return h(
      "div",
      { class: "live" },
      h("h1", { class: "unseen" }, "Live"),
      this.status,
      h(
        "section",
        { class: "card controls", "aria-label": "Controls" },
        h(
          "form",
          { class: "field", onsubmit: (event) => this.switch(event) },
          h("div", {}, h("label", { for: "live-policy" }, "Policy"), this.policy),
          h("div", { class: "actions" }, this.take),
        ),
        h(
          "form",
          { class: "field", onsubmit: (event) => this.beginBurst(event) },
          h("div", { class: "number" }, h("label", { for: "live-rate" }, "Burst, requests/s"), this.rate),
          h("div", { class: "number" }, h("label", { for: "live-seconds" }, "for seconds"), this.seconds),
          h("div", { class: "actions" }, this.start, this.stop),
        ),
        h("fieldset", { class: "spans" }, h("legend", {}, "Shown"), h("div", {}, spans)),
        this.burst,
        this.told,
      ),
      this.tiles,
      h("div", { class: "charts" }, Object.values(this.charts).map((chart) => chart.element)),
      h(
        "section",
        { class: "card" },
        h("h2", {}, "Workers"),
        h(
          "div",
          { class: "scroll", tabindex: 0, role: "region", "aria-label": "Workers" },
          h("table", { class: "workers" }, h("thead", {}, h("tr", {}, heads.map((name) => h("th", { scope: "col" }, name)))), this.rows),
        ),
      ),
      h("section", { class: "card" }, h("h2", {}, "Cache"), this.cache),
    );
  }

  say(message, bad = false) {
    if (this.status.textContent !== message) this.status.textContent = message;
    this.status.hidden = !message;
    this.status.classList.toggle("error", bad);
  }

  // Fill the controls with what the server can do.
  fill() {
    const { policies, burst } = this.report;
    this.policy.replaceChildren(
      ...policies.map((one) => h("option", { value: one.name, disabled: Boolean(one.problem), title: one.problem ?? undefined }, one.problem ? `${one.name} (not here)` : one.name)),
    );
    this.policy.value = this.state.policy;
    this.shown = this.state.policy;
    this.rate.max = burst.most_rate;
    this.seconds.max = burst.most_seconds;
    if (!this.touched) [this.rate.value, this.seconds.value] = [burst.rate, burst.seconds];
    this.start.title = burst.problem ?? "";
  }

  zoom(seconds) {
    this.span = seconds;
    if (this.report) this.draw();
  }

  restyle() {
    for (const chart of Object.values(this.charts)) chart.restyle();
    if (this.report) this.draw();
  }

  // --- controls

  async switch(event) {
    event.preventDefault();
    try {
      const { policy } = await this.api.post(POLICY, { policy: this.policy.value });
      this.say("");
      this.told.textContent = `The policy is ${policy}.`;
      this.state.policy = policy;
      this.api.decides(policy);
    } catch (error) {
      this.say(error.message, true);
    }
    this.showPolicy();
  }

  async beginBurst(event) {
    event.preventDefault();
    this.touched = true;
    await this.asked(() => this.api.post(BURST, { rate: this.rate.valueAsNumber, seconds: this.seconds.valueAsNumber }));
  }

  async endBurst() {
    await this.asked(() => this.api.delete(BURST));
  }

  async asked(ask) {
    try {
      this.state.burst = await ask();
      this.say("");
    } catch (error) {
      this.say(error.message, true);
    }
    this.showBurst();
  }

  // --- drawing

  draw() {
    this.showBurst();
    this.showPolicy();
    this.showTiles();
    this.showCharts();
    this.showWorkers();
    this.showCache();
  }

  // Show the policy in force when it changes, also by others; a choice that is not sent stays.
  showPolicy() {
    const { policy } = this.state;
    if (policy !== this.shown) this.policy.value = this.shown = policy;
    this.api.decides(policy);
    this.take.disabled = this.policy.value === policy;
  }

  showBurst() {
    if (!this.report) return;
    const { burst } = this.state;
    const running = Boolean(burst?.running);
    this.start.disabled = running || Boolean(this.report.burst.problem) || !this.report.slos.length;
    this.stop.disabled = !running;
    const { problem, ramp_s: ramp } = this.report.burst;
    let words = problem ?? `The rate rises over a quarter of the burst, at most ${num(ramp, 0)} s.`;
    if (burst) {
      const left = Math.max(0, burst.seconds - burst.elapsed_s);
      const ends = Object.entries(burst.outcomes).map(([name, count]) => `${count} ${name}`);
      const rising = burst.elapsed_s < burst.ramp_s ? ", its rate still rising" : "";
      const when = !running ? "The last burst" : left ? `A burst, ${num(left, 0)} s left${rising}` : "A burst, waiting for the last pictures";
      words = `${when}: ${burst.sent} sent${ends.length ? `, ${ends.join(", ")}` : ""}.`;
    }
    if (this.burst.textContent !== words) this.burst.textContent = words;
    if (this.running !== undefined && running !== this.running) this.told.textContent = running ? "A burst begins." : words;
    this.running = running;
  }

  showTiles() {
    const recent = this.samples.filter((one) => !one.gap && one.at > this.last - RECENT_S);
    const short = recent.slice(-5);
    const per = (name, of) => total(of, name) / Math.max(1e-9, total(of, "seconds"));
    const ends = OUTCOMES.reduce((sum, [name]) => sum + total(recent, name), 0);
    const onTime = ends ? total(recent, "on_time") / ends : null;
    const predicted = mean(recent, "predicted", "predictions");
    const measurements = total(this.samples, "measurements");
    const measured = measurements < FEWEST_MEASURED ? null : mean(this.samples, "measured", "measurements");
    const last = recent.at(-1);
    const prices = (last?.prices ?? []).filter((one) => one !== null);
    const limits = this.report.slos.map((one) => one.latency_s).filter((one) => one !== null);
    const { drifted } = this.state;
    const offered = recent.length ? per("offered", short) : null;
    this.tiles.replaceChildren(
      tile("Offered", offered === null ? "–" : `${num(offered, 1)} /s`, last?.exact_rate ? `exact alone could make ${num(last.exact_rate, 1)} /s` : "", "", "All workers with the exact model, as fast as they were when the server started."),
      tile("On time", onTime === null ? "–" : `${num(100 * onTime, 1)} %`, `of the last ${RECENT_S} s`, onTime === null ? "" : onTime >= 0.95 ? "good" : onTime >= 0.8 ? "warn" : "bad", "Of all pictures that were asked for; others call it SLO attainment."),
      tile("Predicted quality", predicted === null ? "–" : num(predicted, 2), measured === null ? `${measurements || "none"} measured yet` : `measured ${num(measured, 2)}, of ${measurements}`, "", QUALITY_NOTE),
      tile("Price now", prices.length ? num(Math.max(...prices), 1) : "–", prices.length ? "quality a worker-second" : this.state.policy.startsWith("price") ? "" : `${this.state.policy} has none`, "", PRICE_NOTE),
      tile("Latency, p95", last?.latency_p95_s == null ? "–" : ms(1000 * last.latency_p95_s), limits.length ? `promised ${ms(1000 * Math.min(...limits))}` : "nothing promised", limits.length && last?.latency_p95_s > Math.min(...limits) ? "bad" : ""),
      tile("Drift", drifted === null ? "–" : drifted.length ? drifted.join(", ") : "none", drifted === null ? "no predictor" : "of errors and prompts", drifted?.length ? "bad" : ""),
    );
  }

  get last() {
    return this.samples.at(-1)?.at ?? Date.now() / 1000;
  }

  showCharts() {
    const { samples, span } = this;
    const end = this.last;
    const from = samples.findIndex((one) => one.at >= end - span);
    const shown = samples.slice(Math.max(0, from));
    const times = shown.map((one) => one.at);
    const window = span <= 120 ? 3 : span <= 300 ? 5 : 15;
    const wide = Math.max(10, window); // of means over few pictures
    const cut = (values) => values.slice(Math.max(0, from));
    const per = (name) => cut(trailing(samples, (one) => one[name], (one) => one.seconds, window));
    const plain = (read) => shown.map((one) => (one.gap ? null : read(one)));
    const marks = this.marks(shown);
    const draw = (chart, series) => chart.show(times, series, [end - span, end], marks);

    draw(this.charts.load, [
      ...OUTCOMES.filter(([name]) => name === "on_time" || shown.some((one) => one[name])).map(([name, word, colour]) => ({ name: word, values: per(name), colour: css(colour), stack: true })),
      { name: "offered", values: per("offered"), colour: css("--ink") },
      { name: "exact alone could make", values: plain((one) => one.exact_rate), colour: css("--muted"), dash: [6, 4] },
    ]);

    const names = this.report.variants.map((one) => one.name);
    const used = names.map((_, v) => v).filter((v) => shown.some((one) => !one.gap && one.variants[v]));
    const made = (one) => one.variants.reduce((sum, count) => sum + count, 0);
    draw(this.charts.variants, used.map((v) => ({
      name: names[v], colour: colourOf(names[v]), stack: true,
      values: cut(trailing(samples, (one) => one.variants[v], made, wide)),
    })));

    const { models, variants } = this.report;
    const held = models.map((_, m) => m).filter((m) => shown.some((one) => !one.gap && (one.prices[m] ?? null) !== null));
    draw(this.charts.price, held.map((m) => ({
      name: models[m], colour: colourOf(variants.find((one) => one.model === models[m])?.name), values: plain((one) => one.prices[m] ?? null),
    })));

    draw(this.charts.quality, [
      { name: "predicted", colour: css("--accent"), values: cut(trailing(samples, (one) => (one.predicted ?? 0) * one.predictions, (one) => one.predictions, wide)) },
      { name: `measured, mean of ${MEASURED_S / 60} min`, colour: css("--live-measured"), values: cut(trailing(samples, (one) => (one.measured ?? 0) * one.measurements, (one) => one.measurements, MEASURED_S, FEWEST_MEASURED)) },
    ]);

    draw(this.charts.latency, [
      { name: "p50", colour: css("--live-half"), values: plain((one) => one.latency_p50_s) },
      { name: "p95", colour: css("--accent"), values: plain((one) => one.latency_p95_s) },
      ...this.report.slos.filter((one) => one.latency_s !== null).slice(0, 4).map((one) => ({
        name: `promised (${one.name})`, colour: css("--bad"), dash: [6, 4], values: times.map(() => one.latency_s),
      })),
    ]);

    draw(this.charts.queue, [
      { name: "running", colour: css("--live-running"), stack: true, values: plain((one) => one.running) },
      { name: "waiting", colour: css("--live-late"), stack: true, values: plain((one) => one.waiting) },
    ]);
  }

  // The bursts and the changes of the policy among samples.
  marks(samples) {
    const [bands, lines] = [[], []];
    let before = null;
    for (const one of samples) {
      if (one.gap) continue;
      const begin = one.at - one.seconds;
      if (one.burst && before?.burst && bands.length) bands.at(-1)[1] = one.at;
      else if (one.burst) bands.push([begin, one.at]);
      if (before && one.policy !== before.policy) lines.push({ at: one.at, text: one.policy });
      before = one;
    }
    return { bands, lines };
  }

  showWorkers() {
    const { workers } = this.state;
    this.rows.replaceChildren(
      ...workers.map((one) =>
        h(
          "tr",
          {},
          h("th", { scope: "row" }, `${one.number}`, h("span", { class: "muted" }, one.type)),
          h("td", { "data-name": "Holds" }, held(one)),
          h("td", { "data-name": "Makes now" }, h("ul", { class: "doing" }, Object.entries(one.running).map(([name, count]) => h("li", { style: { "--colour": colourOf(name) } }, `${count} × ${name}`))), Object.keys(one.running).length ? null : "–"),
          h("td", { "data-name": "Queued", class: "right" }, `${one.queued}`),
          h("td", { "data-name": "Wait", class: "right" }, ms(1000 * one.wait_s)),
          h("td", { "data-name": "Busy" }, h("div", { class: "busy" }, h("meter", { min: 0, max: 1, value: one.busy, "aria-label": `Worker ${one.number} is busy` }), h("span", {}, percent(one.busy)))),
        ),
      ),
    );
  }

  showCache() {
    const { cache } = this.state;
    const recent = this.samples.filter((one) => !one.gap && one.at > this.last - RECENT_S);
    const [hits, misses] = [total(recent, "hits"), total(recent, "misses")];
    const similar = recent.filter((one) => one.similarity !== null);
    const mean = similar.reduce((sum, one) => sum + one.similarity, 0) / similar.length;
    this.cache.replaceChildren(
      tile("Prompts", cache.entries.toLocaleString("en"), "whose latents are kept"),
      tile("Latents", bytes(cache.size_bytes), `of ${bytes(cache.limit_bytes)}`),
      tile("Resumed", hits.toLocaleString("en"), `pictures in the last ${RECENT_S} s`),
      tile("Hit rate", hits + misses ? percent(hits / (hits + misses)) : "–", `of ${hits + misses} looked up`),
      tile("Similarity", similar.length ? num(mean, 2) : "–", "mean, to the neighbour"),
      tile("Store", percent(cache.usable), "of latents come in time", cache.usable < 0.9 ? "warn" : ""),
    );
  }
}

// --- parts

function tile(name, value, note, tone = "", title = null) {
  return h("div", { class: `tile ${tone}`, title }, h("dt", {}, name), h("dd", {}, value), h("dd", { class: "muted" }, note));
}

function held(worker) {
  const words = { starting: "loading", leaving: "finishing, then", full: "full", unusable: "unusable", stopped: "stopped" };
  if (worker.state === "ready") return h("span", { class: "held" }, worker.model, worker.next ? h("span", { class: "muted" }, `, then ${worker.next}`) : null);
  const model = worker.state === "leaving" ? worker.next : worker.model;
  const bad = worker.state === "unusable" || worker.state === "stopped";
  return h("span", { class: bad ? "held bad" : "held warn" }, `${words[worker.state]} ${model ?? ""}`);
}

function percent(share) {
  return `${num(100 * share, 0)} %`;
}

function bytes(count) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, count)) / 3));
  return `${num(count / 1000 ** power, power && count / 1000 ** power < 10 ? 1 : 0)} ${units[power]}`;
}

// Add a style sheet of this folder to the page, once; resolves when it is there.
function styled(path) {
  const href = new URL(path, import.meta.url).href;
  if ([...document.styleSheets].some((one) => one.href === href)) return null;
  return new Promise((resolve) => {
    document.head.append(h("link", { rel: "stylesheet", href, onload: resolve, onerror: resolve }));
  });
}

// --- numbers

function total(samples, name) {
  return samples.reduce((sum, one) => sum + (one[name] ?? 0), 0);
}

// The mean of a field, each sample's weighed by another field.
function mean(samples, name, weight) {
  const weights = total(samples, weight);
  return weights ? samples.reduce((sum, one) => sum + (one[name] ?? 0) * (one[weight] ?? 0), 0) / weights : null;
}

// For every sample the sum of one number over that of another, of the samples of the last `window`
// seconds; null where the latter is less than `least`, and in gaps.
function trailing(samples, above, below, window, least = 1e-9) {
  const values = [];
  let [first, sum, weight] = [0, 0, 0];
  samples.forEach((one, i) => {
    if (one.gap) {
      values.push(null);
      return;
    }
    sum += above(one);
    weight += below(one);
    for (; samples[first].at <= one.at - window; first += 1) {
      if (samples[first].gap) continue;
      sum -= above(samples[first]);
      weight -= below(samples[first]);
    }
    values.push(weight >= least ? Math.max(0, sum / weight) : null);
  });
  return values;
}
