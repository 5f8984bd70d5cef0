// The playground: a prompt's picture, how it was made, and what other variants make of it.

import { colourOf } from "./app.js";
import { h, ms, num } from "./dom.js";

const PATH = "v1/images/generations";
const STRATEGIES = { exact: "Exact", cache: "Resumed from the cache", steps: "Fewer steps", model: "Another model" };
const STAGES = ["queue", "encode", "retrieve", "denoise", "decode"];
const PREVIEWS = 3;
const AT_ONCE = 3; // pictures of the ladder
const KEPT = 12; // earlier pictures
const MEASURED = "Quality is measured beside the exact picture of this seed, whose is 1. Above 1 the scorer prefers the picture to the exact one; below 0 it is like a picture of another prompt.";
const WIDE = "(min-width: 901px)"; // where the form is beside the results, as in style.css
const TIE = 0.001; // worths that the policy takes for equal
const OWN_SIZES = ["128x128", "256x256", "512x512"]; // resized, where the family allows it

let api;
let page = null; // survives a look at the other view

export function mount(element, client) {
  api = client;
  page ??= playground();
  element.append(page.root);
  page.update();
  document.addEventListener("served", page.update);
  return () => {
    document.removeEventListener("served", page.update);
    page.root.remove();
  };
}

function playground() {
  const form = askForm(paint);
  const results = h("div", { class: "results" });
  const said = h("p", { class: "unseen", role: "status" });
  const root = h("div", { class: "playground" }, form.element, results, said);
  let past = [];
  let current = null;
  let work = null; // aborts what is being painted
  let known = "";
  let owner; // the name of the key

  function update() {
    const served = api.served;
    if (!served) {
      if (!current) results.replaceChildren(empty("Waiting for the server."));
      return;
    }
    const changed = JSON.stringify([served.variants, served.slo, served.sizes, served.prompts, served.key]);
    if (changed === known) return;
    known = changed;
    form.fill(served);
    if (owner !== undefined && owner !== served.key) { // another person's key: what was painted is not theirs
      work?.abort();
      past = [];
      current = null;
    }
    owner = served.key;
    if (!current && !work) results.replaceChildren(empty("Write a prompt, or take one of the examples. The picture comes with an account of how it was made: which variant the server chose, what it predicted of every other one, and what that took."));
  }

  async function paint(asked) {
    work?.abort();
    work = new AbortController();
    form.busy(work);
    const mine = work;
    const waiting = waitingCard(asked);
    current = null;
    show([waiting.element]);
    if (!matchMedia(WIDE).matches) results.scrollIntoView();
    try {
      const made = await painted(asked, { signal: mine.signal, onPreview: waiting.preview, onQueued: waiting.queued });
      if (work !== mine) return;
      past = [{ asked, made }, ...past].slice(0, KEPT);
      open(past[0]);
      said.textContent = `Finished: ${made[0].account.variant}, ${ms(tookMs(made[0].account))}.`;
    } catch (error) {
      if (work === mine) waiting.failed(error);
    } finally {
      if (work === mine) {
        work = null;
        form.busy(null);
      }
    }
  }

  // Shows a result whole: its pictures and accounts, and what is asked of them further.
  function open(result) {
    current = result;
    result.sections ??= resultSections(result);
    show(result.sections);
  }

  function show(sections) {
    results.replaceChildren(...sections, ...(past.length > 1 || (past.length && !current) ? [pastStrip()] : []));
  }

  function pastStrip() {
    const buttons = past.map((one) =>
      h("button", {
        type: "button", title: one.asked.prompt, "aria-label": `Show: ${one.asked.prompt}`,
        "aria-current": one === current ? "true" : null, onclick: () => open(one),
      }, h("img", { src: one.made[0].url, alt: "" })));
    return h("section", { class: "card", "aria-label": "Earlier pictures" },
      h("div", { class: "head" }, h("h2", {}, "Earlier")), h("div", { class: "past" }, buttons));
  }

  return { root, update };
}

function empty(text) {
  return h("div", { class: "card empty" }, h("p", {}, text));
}

// --- the form

function askForm(onPaint) {
  const prompt = h("textarea", { id: "prompt", rows: 3, maxlength: 4000, required: true, "aria-describedby": "prompt-hint" });
  const examples = h("div", { class: "chips", role: "group", "aria-label": "Example prompts" });
  const size = h("input", { id: "size", list: "sizes", placeholder: "auto", autocomplete: "off", spellcheck: "false" });
  const sizes = h("datalist", { id: "sizes" });
  const count = h("input", { id: "count", type: "number", min: 1, max: 10, value: 1, inputmode: "numeric" });
  const seed = h("input", { id: "seed", type: "number", min: 0, placeholder: "any", inputmode: "numeric" });
  const draw = h("button", { type: "button", title: "Another seed", "aria-label": "Another seed" }, "New");
  const slo = h("select", { id: "slo", "aria-describedby": "slo-value" });
  const sloValue = h("span", { class: "value", id: "slo-value" });
  const level = h("select", { id: "level" });
  const least = h("input", { id: "least", type: "range", min: 0, max: 1, step: 0.05, value: 0, "aria-describedby": "least-hint" });
  const leastValue = h("output", { class: "value", for: "least" }, "any");
  const variant = h("select", { id: "variant" });
  const cache = h("input", { id: "cache", type: "checkbox", checked: true });
  const submit = h("button", { type: "submit", class: "primary" }, "Paint");
  const stop = h("button", { type: "button", hidden: true }, "Stop");
  let running = null;

  const element = h("form", { class: "card ask", "aria-label": "What to paint" },
    h("div", {},
      h("label", { for: "prompt" }, "Prompt"), prompt,
      h("div", { class: "actions send" }, submit, stop, h("p", { class: "hint", id: "prompt-hint" }, "or press Enter")), examples),
    h("details", { open: matchMedia(WIDE).matches }, h("summary", {}, "Settings"),
      h("div", { class: "settings" },
        h("div", { class: "pair" },
          h("div", {}, h("label", { for: "size" }, "Size"), size, sizes),
          h("div", {}, h("label", { for: "count" }, "Pictures"), count)),
        h("div", {}, h("label", { for: "seed" }, "Seed"), h("div", { class: "with" }, seed, draw)),
        h("div", { class: "pair" },
          h("div", {}, h("label", { for: "slo" }, "SLO class", sloValue), slo),
          h("div", {}, h("label", { for: "level" }, "Quality"), level)),
        h("div", {},
          h("label", { for: "least" }, "Least quality", leastValue), least,
          h("p", { class: "hint", id: "least-hint" }, "Only variants whose lower bound is so high; 1 is the exact picture.")),
        h("div", {}, h("label", { for: "variant" }, "Variant"), variant),
        h("label", { class: "check" }, cache, "Use the cache"))));

  const pinned = () => {
    least.disabled = level.disabled = Boolean(variant.value);
    leastValue.textContent = variant.value ? "pinned" : Number(least.value) ? `at least ${least.value}` : "any";
  };
  const promised = () => {
    const chosen = api.served?.slo.find((one) => one.name === slo.value);
    sloValue.textContent = chosen?.deadline_ms === undefined ? "" : ms(chosen.deadline_ms);
    sloValue.title = chosen?.quality ? `The deadline; least quality ${chosen.quality}.` : "The deadline.";
  };
  slo.addEventListener("change", promised);
  least.addEventListener("input", pinned);
  variant.addEventListener("change", pinned);
  draw.addEventListener("click", () => { seed.value = Math.floor(Math.random() * 2 ** 31); });
  stop.addEventListener("click", () => running?.abort());
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      element.requestSubmit();
    }
  });
  element.addEventListener("submit", (event) => {
    event.preventDefault();
    onPaint({
      prompt: prompt.value.trim(),
      size: size.value.trim() || "auto",
      n: Number(count.value) || 1,
      seed: seed.value === "" ? null : Number(seed.value),
      slo: slo.value,
      quality: variant.value ? "auto" : level.value,
      least: variant.value ? 0 : Number(least.value),
      variant: variant.value || null,
      cache: cache.checked,
    });
  });

  return {
    element,
    busy(work) {
      running = work;
      stop.hidden = !work;
      submit.textContent = work ? "Paint anew" : "Paint";
    },
    fill(served) {
      examples.replaceChildren(...served.prompts.map((text) => h("button", {
        type: "button", onclick: () => { prompt.value = text; prompt.focus(); },
      }, text)));
      const own = served.size_limit === undefined ? [] : OWN_SIZES;
      sizes.replaceChildren(...["auto", ...served.sizes, ...own].map((value) => h("option", { value })));
      count.max = served.most_pictures;
      choose(slo, served.slo.map((one) => h("option", { value: one.name }, one.name)));
      promised();
      choose(level, served.quality_levels.map((one) => h("option", { value: one }, one)));
      const groups = Object.entries(STRATEGIES).map(([strategy, label]) => {
        const options = served.variants.filter((one) => one.strategy === strategy)
          .map((one) => h("option", { value: one.name }, `${one.name} · ${stepsOf(one)}`));
        return options.length ? h("optgroup", { label }, options) : null;
      });
      choose(variant, [h("option", { value: "" }, "The server chooses"), ...groups.filter(Boolean)]);
      pinned();
    },
  };
}

// Replaces a select's options and keeps what is selected, if that is still there.
function choose(select, options) {
  const before = select.value;
  select.replaceChildren(...options);
  if (before && [...select.options].some((one) => one.value === before)) select.value = before;
}

function stepsOf(variant) {
  const run = variant.steps - variant.skip;
  return variant.skip ? `${run} of ${variant.steps} steps` : `${run} steps`;
}

// --- requests

// The pictures of what is asked for: [{url, account}]. One picture shows previews on its way.
async function painted(asked, { signal, onPreview, onQueued } = {}) {
  const options = { cache: asked.cache, explain: true, score: api.served?.scores ?? false };
  if (asked.variant) options.variant = asked.variant;
  else if (asked.least) options.min_quality = asked.least;
  if (asked.slo) options.slo = asked.slo;
  const body = { prompt: asked.prompt, size: asked.size, quality: asked.quality ?? "auto", argus: options };
  if (asked.seed !== null) body.seed = asked.seed;
  if (asked.n > 1) {
    const answer = await api.post(PATH, { ...body, n: asked.n }, { signal });
    return answer.data.map((one, i) => ({ url: png(one.b64_json), account: answer.argus[i] }));
  }
  let made = null;
  await api.events(PATH, {
    method: "POST",
    body: { ...body, stream: true, partial_images: onPreview ? PREVIEWS : 0 },
    signal,
    onEvent(name, data) {
      if (name === "queued") onQueued?.(data);
      else if (name === "image_generation.partial_image") onPreview?.(png(data.b64_json), data.partial_image_index);
      else if (name === "image_generation.completed") made = { url: png(data.b64_json), account: data.argus[0] };
      else if (name === "error") throw new Error(data.error.message);
    },
  });
  if (!made) throw new Error("The server ended the answer before the picture was finished.");
  return [made];
}

function png(base64) {
  return `data:image/png;base64,${base64}`;
}

// What went wrong, in the server's words.
function wrong(error) {
  if (error.name === "AbortError") return h("p", { class: "notice", role: "status" }, "Stopped.");
  const title = error.status === 429 ? "The server is full. " : error.status === 504 ? "Too late. " : "";
  return h("p", { class: "error", role: "alert" }, title ? h("strong", {}, title) : null, error.message);
}

function picture(url, alt, shape) {
  return h("div", { class: "frame", style: { "--shape": shape } }, h("img", { src: url, alt }));
}

function shapeOf(size) {
  const match = /^(\d+)x(\d+)$/.exec(size);
  return match ? `${match[1]} / ${match[2]}` : "1";
}

// --- a picture on its way

function waitingCard(asked) {
  const image = h("img", { alt: `Unfinished: ${asked.prompt}`, hidden: true });
  const frame = h("div", { class: "frame waiting", style: { "--shape": shapeOf(asked.size) } }, image);
  const progress = h("p", { class: "progress muted", role: "status" }, "Sent.");
  const how = h("div", { class: "how" }, h("h2", {}, asked.prompt), progress);
  return {
    element: h("section", { class: "card made", "aria-label": "The picture", "aria-busy": "true" }, h("div", { class: "shown" }, frame), how),
    queued({ queued_behind: before, expected_ms: expected }) {
      const place = before ? `Queued behind ${before} ${before > 1 ? "pictures" : "picture"}` : "At a worker";
      progress.textContent = `${place}; expected in ${ms(expected)}.`;
    },
    preview(url, index) {
      image.src = url;
      image.hidden = false;
      progress.textContent = `Denoising: preview ${index + 1} of ${PREVIEWS}.`;
    },
    failed(error) {
      frame.classList.remove("waiting");
      this.element.removeAttribute("aria-busy");
      progress.replaceWith(wrong(error));
    },
  };
}

// --- a result

function resultSections({ asked, made }) {
  let index = 0;
  const top = h("section", { class: "card made", "aria-label": "The picture and how it was made" });
  const bars = h("div");
  const more = h("div");
  const strip = made.length > 1 && h("div", { class: "several", role: "group", "aria-label": "Pictures" },
    made.map((one, i) => h("button", { type: "button", "aria-label": `Picture ${i + 1}`, onclick: () => view(i) }, h("img", { src: one.url, alt: "" }))));

  function view(i) {
    index = i;
    const one = made[index];
    const { account } = one;
    if (strip) [...strip.children].forEach((button, j) => button.setAttribute("aria-pressed", String(j === index)));
    const seeded = { ...asked, n: 1, seed: account.seed };
    const again = (sections) => more.replaceChildren(sections);
    const exact = h("button", { type: "button", onclick: () => again(besideExact(seeded, one)) }, "Make it exact");
    exact.disabled = account.variant === "exact";
    exact.title = exact.disabled ? "This is the exact picture." : "The same prompt and seed by the exact variant.";
    const ladder = h("button", { type: "button", onclick: () => again(allVariants(seeded, one)), title: "The same prompt and seed by every variant." }, "All variants");
    const save = h("a", { class: "button", href: one.url, download: `argus-${account.seed}.png` }, "Save");
    top.replaceChildren(
      h("div", { class: "shown" }, picture(one.url, asked.prompt, shapeOf(asked.size)), strip, h("div", { class: "actions" }, exact, ladder, save)),
      howMade(asked, account));
    bars.replaceChildren(...(account.candidates ? [weighed(account)] : []));
    more.replaceChildren();
  }
  view(0);
  return [top, more, bars];
}

function swatch(name) {
  return h("span", { class: "variant", style: { "--colour": colourOf(name) } }, name);
}

function howMade(asked, account) {
  return h("div", { class: "how" },
    h("div", {},
      h("p", { class: "muted small" }, asked.prompt),
      h("div", { class: "title" }, swatch(account.variant),
        account.deadline_ms !== undefined && h("span", { class: `badge ${account.on_time ? "good" : "bad"}` }, account.on_time ? "on time" : "late")),
      h("p", {}, `${stepsRun(account)} ${why(account)}`),
      account.unknown_words?.length ? unknown(account.unknown_words) : null),
    account.neighbour && neighbour(asked, account),
    h("dl", { class: "grid" }, facts(account)),
    timings(account));
}

function unknown(words) {
  const said = words.map((word) => `“${word}”`).join(", ");
  return h("p", { class: "notice small" }, `The model does not know ${said}: no variant paints that, and the predicted quality says nothing of it.`);
}

function stepsRun(account) {
  const total = account.steps_run + account.steps_skipped;
  if (account.steps_skipped) return `${account.steps_run} of ${total} steps were run; the first ${account.steps_skipped} were taken from a neighbour's latents.`;
  return `All ${total} steps of this variant were run${account.model ? ` on the model ${account.model}` : ""}.`;
}

function why(account) {
  const reason = account.reason.charAt(0).toUpperCase() + account.reason.slice(1);
  let price = "";
  if (account.price !== undefined) price = account.price > 0 ? ` A second of a worker cost ${num(account.price, 3)} of quality.` : " A second of a worker cost nothing, so quality and waiting decided.";
  return `${reason}.${price}`;
}

function tookMs(account) {
  return STAGES.reduce((sum, stage) => sum + (account.timings_ms[stage] ?? 0), 0);
}

function facts(account) {
  const took = tookMs(account);
  const rows = [];
  const fact = (name, value, title) => rows.push(h("div", { title }, h("dt", {}, name), h("dd", {}, value)));
  if (account.predicted_quality !== undefined) fact("Predicted quality", `${num(account.predicted_quality)}, at least ${num(account.quality_bound)}`, "Relative to the exact picture; in nine of ten groups of such prompts the mean is above the bound.");
  if (account.score !== undefined) fact("Score of this picture", num(account.score), "By the family's scorer.");
  fact("Took", account.deadline_ms === undefined ? ms(took) : `${ms(took)} of ${ms(account.deadline_ms)}`);
  fact("Worker time", ms(1000 * account.gpu_seconds), "Each second divided among the pictures that shared it.");
  fact("Saved", account.saved_ms ? ms(account.saved_ms) : "nothing", "Worker time against the exact picture, each alone in its batch.");
  if (account.cost !== undefined) fact("Cost", `${account.cost.toPrecision(3)} ${account.currency}`);
  if (account.saved_cost) fact("Saved cost", `${account.saved_cost.toPrecision(3)} ${account.currency}`);
  fact("Worker", `${account.worker} · ${account.worker_type}`);
  fact("Queued behind", String(account.queued_behind));
  fact("SLO class", account.slo);
  fact("Seed", String(account.seed));
  if (account.painted_at) fact("Painted at", account.painted_at, "And resized.");
  if (account.prompt_truncated) fact("Prompt", "cut: it is too long", "The text encoder reads its beginning.");
  return rows;
}

const neighbours = new Map(); // promises of their pictures, by entry of the cache and size
const MOST_NEIGHBOURS = 12;
document.addEventListener("served", () => neighbours.clear()); // perhaps with another key

// The picture of a cached prompt: what its deepest cached latents finish to with its own prompt,
// which takes the fewest steps; null if another entry is nearest by now.
function finished(prompt, entry, size) {
  const known = `${entry} ${size}`;
  if (!neighbours.has(known)) {
    if (neighbours.size >= MOST_NEIGHBOURS) neighbours.delete(neighbours.keys().next().value);
    const deepest = api.served.variants.filter((one) => one.strategy === "cache").at(-1);
    const painting = painted({ prompt, size, n: 1, seed: null, variant: deepest.name, cache: true })
      .then(([found]) => (found.account.neighbour?.entry === entry ? found.url : null));
    neighbours.set(known, painting);
    painting.catch(() => neighbours.delete(known));
  }
  return neighbours.get(known);
}

// The cached prompt that a picture was resumed from, and its picture.
function neighbour(asked, account) {
  const { prompt, entry } = account.neighbour;
  const frame = h("div", { class: "frame" });
  const similarity = `similarity ${num(account.similarity, 3)}`;
  if (prompt === undefined) {
    return h("div", { class: "neighbour" }, frame, h("p", {}, `A cached prompt, ${similarity}. The cache is shared between keys, so its words are not shown.`));
  }
  const show = h("button", { type: "button", class: "small", onclick: () => {
    show.disabled = true;
    finished(prompt, entry, asked.size)
      .then((url) => (url ? show.replaceWith(h("img", { src: url, alt: `The neighbour's picture: ${prompt}` })) : show.replaceWith("It is not cached any more.")))
      .catch((error) => show.replaceWith(wrong(error)));
  } }, "Paint it");
  frame.append(show);
  return h("div", { class: "neighbour" }, frame,
    h("div", {}, h("h3", {}, "Neighbour"), h("p", {}, prompt), h("p", { class: "muted small" }, prompt === asked.prompt ? `The same prompt, cached before; ${similarity}` : similarity)));
}

function timings(account) {
  const parts = STAGES.map((stage) => [stage, account.timings_ms[stage] ?? 0]);
  const said = parts.map(([stage, value]) => `${stage} ${ms(value)}`).join(", ");
  return h("div", {},
    h("h3", {}, "Where the time went"),
    h("div", { class: "stack", role: "img", "aria-label": said }, parts.map(([stage, value]) => h("span", { class: stage, style: { "--part": value }, title: `${stage} ${ms(value)}` }))),
    h("ul", { class: "legend" }, parts.map(([stage, value]) => h("li", { class: stage }, `${stage} ${ms(value)}`))));
}

// --- what was known of every variant

function weighed(account) {
  const all = account.candidates;
  const priced = all.some((one) => one.worth !== undefined);
  const one = Math.max(1, ...all.map((c) => c.predicted_quality ?? 0));
  const dearest = Math.max(...all.map((c) => c.cost_ms));
  const head = h("tr", { role: "row" },
    ["Variant", "Predicted quality", "Worker time"].map((text) => h("th", { scope: "col", role: "columnheader" }, text)),
    priced
      ? ["Price × cost", "Worth"].map((text) => h("th", { scope: "col", role: "columnheader", class: "right" }, text))
      : h("th", { scope: "col", role: "columnheader" }, h("span", { class: "unseen" }, "Note")));
  const rows = all.map((c) => {
    const chosen = c.variant === account.variant;
    const cells = [
      h("th", { scope: "row", role: "rowheader" }, swatch(c.variant), chosen && h("span", { class: "unseen" }, ", chosen")),
      h("td", { class: "bar-cell", role: "cell" }, c.predicted_quality === undefined ? h("span", { class: "why" }, "not predicted") : qualityBar(c, one)),
      h("td", { class: "cost-cell right", role: "cell" }, costBar(c, dearest)),
    ];
    if (c.excluded) cells.push(h("td", { class: "why", role: "cell", colspan: priced ? 2 : 1 }, c.excluded));
    else if (!priced) cells.push(h("td", { class: "why", role: "cell" }, chosen ? "chosen" : ""));
    else {
      cells.push(
        h("td", { class: "right paid", role: "cell" }, c.paid === undefined ? "" : num(c.paid, 3)),
        h("td", { class: "right worth", role: "cell" }, c.worth === undefined ? "" : num(c.worth, 3)));
    }
    return h("tr", { role: "row", class: chosen ? "chosen" : c.excluded ? "out" : null, style: { "--colour": colourOf(c.variant) } }, cells);
  });
  return h("section", { class: "card", "aria-labelledby": "weighed" },
    h("div", { class: "head" },
      h("h2", { id: "weighed" }, "What the server knew when it decided"),
      h("p", { class: "muted small" }, "Bars: predicted mean. Whiskers: down to a bound; in nine of ten groups of such prompts the mean is above it. Worker time: its share of the largest batch that the deadlines allow. Line: the exact picture's 1.")),
    h("div", { class: "scroll" }, h("table", { class: "weighed", role: "table", style: { "--one": 1 / one } }, h("thead", { role: "rowgroup" }, head), h("tbody", { role: "rowgroup" }, rows))),
    h("p", { class: "sum small muted" }, verdict(account)));
}

function qualityBar(c, one) {
  const share = (value) => Math.min(1, Math.max(0, value / one));
  const bound = c.quality_bound ?? c.predicted_quality;
  const track = h("div", { class: "track", style: { "--mean": share(c.predicted_quality), "--low": share(bound) }, role: "img", "aria-label": `predicted ${num(c.predicted_quality)}, at least ${num(bound)}` },
    h("div", { class: "fill" }), bound < c.predicted_quality && h("div", { class: "bound" }));
  return h("div", { class: "quality", title: `${num(c.predicted_quality, 3)}, such prompts on average at least ${num(bound, 3)}, in nine groups of ten` }, track, h("span", {}, num(c.predicted_quality)));
}

function costBar(c, dearest) {
  return h("div", { class: "cost" }, h("div", { class: "track", style: { "--part": c.cost_ms / dearest } }, h("div", { class: "fill" })), h("span", {}, ms(c.cost_ms)));
}

// One sentence: how the worth of the chosen variant came about.
function verdict(account) {
  const won = account.candidates.find((c) => c.variant === account.variant);
  if (!won) return "The request sets the number of steps; no variant was weighed.";
  if (won.worth === undefined) return `Nothing was weighed: ${account.reason}.`;
  const quality = won.worth + won.paid + won.risk;
  const better = account.candidates.some((c) => c.worth > won.worth && c.worth - won.worth <= TIE);
  return `${won.variant}: ${num(quality, 3)} quality − ${num(won.paid, 3)} for ${ms(won.cost_ms)} of a worker − ${num(won.risk, 3)} for waiting and the chance of being late = ${num(won.worth, 3)}.`
    + (better ? ` Another variant is worth as much, within ${TIE}: the plan's shares decide between them.` : "");
}

// --- the same prompt by other variants

// The quality of a picture beside the exact one of its prompt and seed, if both were scored.
function measured(account, exact) {
  if (account.judged_quality === undefined || exact?.judged_quality === undefined) return null;
  return 1 + account.judged_quality - exact.judged_quality;
}

function figures(account, exact) {
  const rows = [];
  const row = (name, value, title) => rows.push(h("dt", { title }, name), h("dd", { title }, value));
  const quality = measured(account, exact);
  if (account.score !== undefined) row("Score", num(account.score));
  if (quality !== null) row("Quality", num(quality), MEASURED);
  if (account.predicted_quality !== undefined) row("Predicted", num(account.predicted_quality));
  row("Worker time", ms(1000 * account.gpu_seconds));
  row("Took", ms(tookMs(account)));
  return h("dl", { class: "pairs" }, rows);
}

function besideExact(asked, one) {
  const body = h("div", { class: "side" }, figure(one, asked), waitingFigure("exact", asked));
  const said = h("p", { class: "small", role: "status" }, "Painting the exact picture.");
  painted({ ...asked, variant: "exact", quality: "auto", least: 0, cache: false })
    .then(([exact]) => {
      body.replaceChildren(figure(one, asked, exact.account), figure(exact, asked, exact.account));
      said.textContent = compared(one.account, exact.account);
    })
    .catch((error) => said.replaceWith(wrong(error)));
  return h("section", { class: "card", "aria-label": "Beside the exact picture" },
    h("div", { class: "head" }, h("h2", {}, "Beside the exact picture"), h("p", { class: "muted small" }, `Seed ${asked.seed}; what is painted for this comparison is not cached.`)),
    said, body);
}

function compared(account, exact) {
  const share = account.gpu_seconds / exact.gpu_seconds;
  const time = `${account.variant} took ${Math.round(100 * share)} % of the exact picture's worker time.`;
  const quality = measured(account, exact);
  if (quality === null) return `${time} The pictures were not scored: the server has no scorer for this prompt, or no time for it.`;
  const predicted = account.predicted_quality === undefined ? "" : `; predicted were ${num(account.predicted_quality)} on average of such prompts, with a lower bound of ${num(account.quality_bound)}`;
  return `${time} Its measured quality is ${num(quality)}${predicted}.`;
}

function figure({ url, account }, asked, exact) {
  return h("figure", {}, h("figcaption", {}, h("h3", {}, swatch(account.variant))),
    picture(url, `${asked.prompt}, by ${account.variant}`, shapeOf(asked.size)), figures(account, exact));
}

function waitingFigure(name, asked, text) {
  const frame = h("div", { class: `frame ${text ? "" : "waiting"}`, style: { "--shape": shapeOf(asked.size) } }, text && h("p", {}, text));
  return h("figure", {}, h("figcaption", {}, h("h3", {}, swatch(name))), frame);
}

// Every variant's picture, painted a few at a time; the exact one first, since the others are
// compared with it.
function allVariants(asked, one) {
  const variants = api.served.variants;
  const cells = new Map(variants.map((v) => [v.name, waitingFigure(v.name, asked)]));
  const grid = h("div", { class: "ladder" }, [...cells.values()]);
  const said = h("p", { class: "small muted", role: "status" }, "");
  const done = new Map();
  let count = 0;

  const put = (name, element) => {
    element.classList.toggle("this", name === one.account.variant);
    cells.get(name).replaceWith(element);
    cells.set(name, element);
  };
  const progress = () => {
    said.textContent = count < variants.length ? `${count} of ${variants.length} painted.` : `${MEASURED} A single picture's score is coarse.`;
  };
  const next = async (v) => {
    if (v.strategy === "cache" && !asked.cache) put(v.name, waitingFigure(v.name, asked, "The cache is not used."));
    else {
      try {
        const [made] = await painted({ ...asked, variant: v.name, quality: "auto", least: 0, cache: v.strategy === "cache" });
        if (made.account.variant === v.name) {
          done.set(v.name, made);
          for (const [name, other] of v.strategy === "exact" ? done : [[v.name, made]]) put(name, figure(other, asked, done.get("exact")?.account));
        } else put(v.name, waitingFigure(v.name, asked, "No latents are cached for it."));
      } catch (error) {
        put(v.name, waitingFigure(v.name, asked, error.message));
      }
    }
    count += 1;
    progress();
  };
  const queue = [...variants];
  const worker = async () => {
    while (queue.length && (grid.isConnected || !count)) await next(queue.shift());
  };
  progress();
  (async () => {
    await next(queue.shift());
    await Promise.all(Array.from({ length: AT_ONCE }, worker));
  })();
  return h("section", { class: "card", "aria-label": "All variants" },
    h("div", { class: "head" }, h("h2", {}, "All variants"), h("p", { class: "muted small" }, `Seed ${asked.seed}. A variant that skips steps resumes from the most similar cached prompt, which is this one if its exact picture is cached.`)),
    said, grid);
}
