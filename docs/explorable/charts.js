// Draws with uPlot. Colours come from the style sheet, so that they follow the theme.

const color = (name) =>
  getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";
const superscript = (exponent) =>
  String(exponent).replace("-", "⁻").replace(/\d/g, (digit) => SUPERSCRIPTS[digit]);

// 0.0123, 1.23 × 10⁻⁵
function formatNumber(value, digits = 3) {
  if (!Number.isFinite(value)) return "not finite";
  if (value === 0) return "0";
  const [mantissa, exponent] = value.toExponential(digits - 1).split("e");
  const text =
    exponent >= -3 && exponent <= 3
      ? Number(value.toPrecision(digits)).toString()
      : `${Number(mantissa)} × 10${superscript(Number(exponent))}`;
  return text.replace("-", "−");
}

function formatPower(exponent) {
  const small = exponent >= -2 && exponent <= 2;
  return small ? String(10 ** exponent) : `10${superscript(exponent)}`;
}

const axis = (options) => ({
  stroke: () => color("soft"),
  grid: { stroke: () => color("grid"), width: 1 },
  ticks: { stroke: () => color("grid"), width: 1 },
  font: "13px system-ui, sans-serif",
  labelFont: "13px system-ui, sans-serif",
  labelSize: 20,
  gap: 4,
  ...options,
});

// One chart in one element. It is made anew for new data: that takes a millisecond.
class Chart {
  constructor(element) {
    this.element = element;
    this.plot = null;
    new ResizeObserver(() => this.resize()).observe(element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
      this.plot?.redraw());
  }

  draw(options, data) {
    this.plot?.destroy();
    this.height = options.height;
    const width = this.element.clientWidth || 300;
    const base = { width, cursor: { y: false, drag: { x: false } }, padding: [10, 12, 0, 0] };
    this.plot = new uPlot({ ...base, ...options }, data, this.element);
  }

  resize() {
    const width = this.element.clientWidth;
    if (this.plot && width && width !== this.plot.width)
      this.plot.setSize({ width, height: this.height });
  }
}

// Tells whole numbers along an axis, at most `count` of them.
function wholeSteps(low, high, count) {
  const sizes = [1, 2, 5, 10, 20, 50, 100, 200];
  const size = sizes.find((step) => (high - low) / step <= count);
  const first = Math.ceil(low / size) * size;
  const steps = [];
  for (let value = first; value <= high; value += size) steps.push(value);
  return steps;
}

// Signal and gradient by depth. Plotted are powers of ten: zero has none and leaves a gap.
function drawDepth(chart, rows) {
  const power = (value) => (value > 0 && Number.isFinite(value) ? Math.log10(value) : null);
  const signal = rows.map((row) => power(row.std));
  const gradient = rows.map((row) => power(row.gradient));
  const all = [...signal, ...gradient].filter((value) => value !== null);
  // A level line should look level: at least two powers of ten are shown.
  const low = Math.floor(Math.min(-1, ...all));
  const high = Math.ceil(Math.max(1, ...all));
  const series = (label, name, dash) => ({
    label,
    stroke: () => color(name),
    width: 2.5,
    dash,
    points: { show: rows.length <= 31, size: dash ? 5 : 8, fill: () => color(name) },
    value: (_, value) => (value === null ? "–" : formatNumber(10 ** value)),
  });
  const options = {
    height: 300,
    scales: { x: { time: false, range: [0, rows.length - 1] }, y: { range: [low, high] } },
    axes: [
      axis({ size: 30, label: "layer", splits: () => wholeSteps(0, rows.length - 1, 10) }),
      axis({
        size: 56,
        splits: () => wholeSteps(low, high, 8),
        values: (_, splits) => splits.map(formatPower),
      }),
    ],
    series: [
      { label: "Layer", value: (_, value) => value ?? "–" },
      series("signal, std", "signal"),
      series("gradient, std", "gradient", [7, 4]),
    ],
  };
  chart.draw(options, [rows.map((_, index) => index), signal, gradient]);
}

// One histogram above the other, the first layer on top.
function drawRidges(chart, histograms, which, name) {
  const { layers, limit } = histograms;
  const count = layers.length;
  const bins = histograms[which][0].length;
  const places = Array.from({ length: bins }, (_, bin) => ((bin + 0.5) / bins) * 2 - 1);
  const baseline = (index) => count - 1 - index;
  const ridges = histograms[which].map((counts, index) => {
    const highest = Math.max(...counts) || 1;
    return counts.map((value) => baseline(index) + (1.5 * value) / highest);
  });
  const unit = which === "own" ? 4 : limit;
  const label = which === "own" ? "distance from the mean, in std" : "value";
  const options = {
    height: Math.max(170, 60 + 36 * (count + 1)),
    legend: { show: false },
    cursor: { show: false },
    scales: { x: { time: false, range: [-1, 1] }, y: { range: [-0.1, count + 0.6] } },
    axes: [
      axis({
        size: 30,
        label,
        splits: () => [-1, -0.5, 0, 0.5, 1],
        values: (_, splits) => splits.map((place) => formatNumber(place * unit, 2)),
      }),
      axis({
        size: 52,
        label: "layer",
        splits: () => layers.map((_, index) => baseline(index)).reverse(),
        values: () => [...layers].reverse().map(String),
      }),
    ],
    padding: [4, 34, 0, 0],
    series: [
      {},
      ...layers.map((_, index) => ({
        stroke: () => color(name),
        fill: () => `${color(name)}44`,
        width: 1.5,
        points: { show: false },
        fillTo: () => baseline(index),
      })),
    ],
  };
  chart.draw(options, [places, ...ridges]);
}

// Test accuracy by step, a line for each run.
function drawRuns(chart, runs) {
  const steps = [...new Set(runs.flatMap((run) => run.points.map(([step]) => step)))];
  steps.sort((a, b) => a - b);
  const dashes = [undefined, [8, 4], [3, 3]];
  const options = {
    height: 260,
    legend: { show: false }, // the table below is one
    cursor: { show: false },
    scales: { x: { time: false, range: [0, 200] }, y: { range: [0, 100] } },
    axes: [
      axis({ size: 30, label: "step", splits: () => [0, 50, 100, 150, 200] }),
      axis({ size: 56, values: (_, splits) => splits.map((value) => `${value} %`) }),
    ],
    series: [
      {},
      ...runs.map((run) => ({
        stroke: () => color(`run-${run.color}`),
        dash: dashes[run.color - 1],
        width: 2.5,
        points: { show: false },
        spanGaps: true,
      })),
    ],
  };
  const lines = runs.map((run) => {
    const points = new Map(run.points);
    return steps.map((step) => points.get(step) ?? null);
  });
  chart.draw(options, [steps, ...lines]);
}
