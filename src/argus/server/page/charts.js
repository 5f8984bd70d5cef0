// Charts over time with a legend that also shows the values under the cursor. uPlot draws them.

import { h, num } from "./dom.js";
import uPlot from "./vendor/uPlot.js";

const HEIGHT = 190;
const ASINH = 4; // uPlot's number of that scale
const POWERS = [0, 0.1, 1, 10, 100, 1000, 10000]; // on its axis
const LINEAR = 0.1; // to which a curved axis is about linear
const FONT = "12px system-ui, sans-serif";
const cursors = uPlot.sync("live");
const clock = new Intl.DateTimeFormat([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

// The computed value of a custom property of style.css or live.css.
export function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// A value of an axis whose values are `step` apart.
export function plain(value, step) {
  return num(value, (String(Number(step.toPrecision(6))).split(".")[1] ?? "").length);
}

// A chart. `title` and `unit` are its words, `format` writes a value and `tick(value, step)` one of
// the y axis, `range` gives the limits of that axis for those of the data. A `note` explains them
// below. A `curved` axis is linear up to `LINEAR` and logarithmic beyond.
//
// `show(times, series, span, marks)` draws series of `{name, values, colour}`, null for no value:
// with `stack` one upon the other in their order, else as lines, with `dash` dashed. `span` are the
// first and last second of the x axis; `marks` are `bands` of [from, to] and `lines` of {at, text}.
export function newChart({ title, unit, format, range, note, curved = false, tick = curved ? String : plain }) {
  const plot = h("div", { class: "plot", role: "img" });
  const legend = h("ul", { class: "keys" });
  const element = h(
    "figure",
    { class: "card chart" },
    h("figcaption", {}, h("h3", {}, title)),
    plot,
    legend,
    note && h("details", { class: "note" }, h("summary", {}, "What is this?"), h("p", {}, note)),
  );
  let drawn = null; // the uPlot, made again when the series or the colours change
  let shape = "";
  let now = { times: [], series: [], span: [0, 1], marks: { bands: [], lines: [] } };

  const stacked = () => now.series.filter((one) => one.stack);
  // As drawn: sums of stacked series, the highest first, so that each covers what is below it.
  const layers = () => {
    const sums = [];
    let below = now.times.map(() => 0);
    for (const one of stacked()) {
      below = one.values.map((value, i) => (value === null ? null : (below[i] ?? 0) + value));
      sums.unshift(below);
    }
    return [now.times, ...sums, ...now.series.filter((one) => !one.stack).map((one) => one.values)];
  };

  function build() {
    drawn?.destroy();
    const [ink, line] = [css("--muted"), css("--line")];
    const axis = { stroke: ink, font: FONT, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1, size: 4 } };
    const powers = curved ? { splits: (_, __, low, high) => POWERS.filter((one) => one >= low && one <= high), filter: (_, at) => at } : {};
    const areas = stacked().reverse().map((one) => ({ stroke: one.colour, fill: one.colour, width: 0, points: { show: false } }));
    const lines = now.series
      .filter((one) => !one.stack)
      .map((one) => ({ stroke: one.colour, width: one.dash ? 1.5 : 2, dash: one.dash, points: { show: false }, spanGaps: false }));
    drawn = new uPlot(
      {
        width: plot.clientWidth || 320,
        height: HEIGHT,
        padding: [8, 26, 0, 0],
        legend: { show: false },
        cursor: { sync: { key: cursors.key, setSeries: false }, drag: { setScale: false, x: false, y: false }, y: false, points: { show: false } },
        scales: { x: { time: true, range: () => now.span }, y: { ...(curved ? { distr: ASINH, asinh: LINEAR } : {}), range: (_, low, high) => range(low, high) } },
        axes: [
          { ...axis, space: 72, size: 30, values: (_, at) => at.map((one) => clock.format(1000 * one)) },
          { ...axis, ...powers, space: 34, size: 50, label: unit, labelFont: FONT, labelSize: 18, labelGap: 0, values: (_, at, __, ___, step) => at.map((one) => tick(one, step)) },
        ],
        series: [{}, ...areas, ...lines],
        hooks: { drawClear: [drawBands], draw: [drawMarks], setCursor: [say] },
      },
      layers(),
      plot,
    );
  }

  function drawBands(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.fillStyle = css("--soft");
    for (const [from, to] of now.marks.bands) {
      const [left, right] = [from, to].map((at) => Math.min(bbox.left + bbox.width, Math.max(bbox.left, u.valToPos(at, "x", true))));
      if (right > left) ctx.fillRect(left, bbox.top, right - left, bbox.height);
    }
    ctx.restore();
  }

  function drawMarks(u) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = css("--muted");
    ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.textBaseline = "top";
    for (const { at, text } of now.marks.lines) {
      const x = u.valToPos(at, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      ctx.textAlign = x > bbox.left + bbox.width / 2 ? "right" : "left";
      ctx.fillText(text, x + (ctx.textAlign === "left" ? 4 : -4) * devicePixelRatio, bbox.top + 2);
    }
    ctx.restore();
  }

  // Write the values under the cursor, else the last ones.
  function say() {
    const at = drawn?.cursor.idx ?? now.times.length - 1;
    const words = now.series.map((one) => {
      const value = one.values[at] ?? null;
      return value === null ? "–" : format(value);
    });
    now.series.forEach((one, i) => {
      const value = legend.children[i]?.lastChild;
      if (value && value.textContent !== words[i]) value.textContent = words[i];
    });
    return words;
  }

  const watcher = new ResizeObserver(() => {
    if (drawn && plot.clientWidth && plot.clientWidth !== drawn.width) drawn.setSize({ width: plot.clientWidth, height: HEIGHT });
  });
  watcher.observe(plot);

  return {
    element,
    show(times, series, span, marks) {
      now = { times, series, span, marks };
      const wanted = JSON.stringify(series.map(({ name, colour, stack, dash }) => [name, colour, stack, dash]));
      if (!drawn || wanted !== shape) {
        shape = wanted;
        legend.replaceChildren(
          ...series.map((one) =>
            h("li", { class: one.stack ? "area" : one.dash ? "dashed" : "line", style: { "--colour": one.colour } }, h("span", {}, one.name), h("b", {}, "–")),
          ),
        );
        build();
      } else {
        drawn.setData(layers());
      }
      const words = say();
      plot.setAttribute("aria-label", `${title}, ${unit}: ${series.map((one, i) => `${one.name} ${words[i]}`).join(", ") || "nothing yet"}.`);
    },
    // Draw again, after the colours changed.
    restyle() {
      shape = "";
    },
    destroy() {
      watcher.disconnect();
      drawn?.destroy();
      drawn = null;
    },
  };
}
