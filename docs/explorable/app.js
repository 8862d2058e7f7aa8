// The controls, the address, the verdict and the tables. The arithmetic runs in a worker.

const WIDTHS = [16, 32, 64, 128, 256];
const RATES = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1];
const STEPS = 200;

const ACTIVATION_CHOICES = {
  linear: { name: "linear", gain: 1, hint: "The case that Glorot's formula is derived for. Try it first: it is right at any depth." },
  tanh: { name: "tanh", gain: 5 / 3, hint: "Try gain 1, then its own gain of 1.667: each layer shrinks the signal a little." },
  sigmoid: { name: "sigmoid", gain: 1, hint: "Its slope is 1/4 at most. Try gain 1, then gain 4: both lose something." },
  relu: { name: "ReLU", gain: Math.SQRT2, hint: "Try 50 layers of ReLU with Glorot, with He, then isometric." },
  leaky_relu: { name: "leaky ReLU", gain: Math.sqrt(2 / 1.04), hint: "Its slope is 0.2 on the left. Try 50 layers and compare the histograms with ReLU's." },
  gelu: { name: "GELU", gain: 1.533530, hint: "Try 50 layers with its own gain: small deviations grow 1.08 times per layer. Then try measured and isometric." },
  silu: { name: "SiLU (swish)", gain: 1.676532, hint: "Try 50 layers with its own gain, then isometric." },
  elu: { name: "ELU", gain: 1.245198, hint: "Try 50 layers with gain 1 and with its own." },
  selu: { name: "SELU", gain: 1, hint: "It was made to keep std 1 by itself. Try 50 layers with gain 1." },
};

const INITIALIZER_CHOICES = {
  constant: { name: "constant 0.1", hint: "Try it once: all units of a layer are the same, and training can't tell them apart." },
  uniform: { name: "uniform, U(−0.1, 0.1)", hint: "A guess without a formula. Try width 16, then 256." },
  normal: { name: "normal, N(0, 0.1²)", hint: "A guess without a formula. Try width 64, 128 and 256: it is right near 100 by luck." },
  glorot_uniform: { name: "Glorot uniform", hint: "Try it with tanh, then with ReLU: ReLU cuts half of the signal away at each layer." },
  glorot_normal: { name: "Glorot normal", hint: "The same std as Glorot uniform. Try both: only the std matters." },
  he_normal: { name: "He normal", hint: "Glorot's std times √2 here, made for ReLU. Try it with ReLU, then with tanh." },
  measured: { name: "measured", hint: "Each kernel is scaled until its product with the batch has std 1 (or the gain). Try 50 layers of GELU." },
  isometric: { name: "isometric", hint: "Orthogonal kernels, whose units come in pairs, z and −z: the network starts as a rotation. Try 200 layers of ReLU." },
};

// In the order of the address. What a link leaves out has its default.
const SETTINGS = {
  depth: { initial: 10, read: wholeNumber(1, 200) },
  width: { initial: 128, read: oneOf(WIDTHS) },
  activation: { initial: "tanh", read: oneOf(Object.keys(ACTIVATION_CHOICES)) },
  initializer: { initial: "glorot_uniform", read: oneOf(Object.keys(INITIALIZER_CHOICES)) },
  gain: { initial: 1, read: number(0.01, 10), rule: "The gain must be a number from 0.01 to 10." },
  residual: { initial: false, read: (text) => ({ true: true, false: false })[text] },
  seed: { initial: 1, read: wholeNumber(0, 999999999), rule: "The seed must be a whole number from 0 to 999999999." },
  axis: { initial: "shared", read: oneOf(["shared", "own"]) },
};

// A test trains those whose lesson names an accuracy.
const TOUR = [
  ["A guess", { initializer: "uniform", depth: 20 },
    "U(−0.1, 0.1) has a std of 0.058. To keep the size of a sum over 128 units, 0.088 is needed, and another number for each other width."],
  ["Glorot", { activation: "linear", depth: 20 },
    "Glorot’s std is √(2 / (inputs + outputs)). It makes up for the number of units, forward and back, so both lines stay level, at any depth. The formula takes the layers for linear, as they are here."],
  ["Glorot and tanh", { depth: 20 },
    "tanh bends large values down, so each layer loses a little. Glorot’s std still trains it: 92 % at rate 0.01."],
  ["Too large", { gain: 3, depth: 20, axis: "own" },
    "Larger is not safer. With three times the std most units sit where tanh is flat, and the few others let the gradient grow on its way back."],
  ["ReLU with Glorot", { activation: "relu", depth: 20 },
    "ReLU cuts half of each signal away: √½ = 0.71 times per layer. What reaches the first layers is too small to learn from: 9.5 % at rate 0.01, which is chance."],
  ["ReLU with He", { activation: "relu", initializer: "he_normal", depth: 20 },
    "He’s √2 makes up for the half that is cut away: 86.5 % at rate 0.01. The size is right now, but ReLU also moves all examples to the same side, and with depth they become alike."],
  ["ReLU, isometric", { activation: "relu", initializer: "isometric", depth: 50 },
    "Each unit has a partner with opposite weights, and the next layer subtracts the two: ReLU(z) − ReLU(−z) = z. Between the first layer and the last the network is a rotation, which loses nothing: 96 % at rate 0.01, with 50 layers. Training parts the pairs at once."],
  ["200 layers", { activation: "relu", initializer: "isometric", depth: 200, width: 64 },
    "Rotations one after another are a rotation, so depth costs nothing at the start. The steps of all layers add up: train it at rate 0.003, and compare with He."],
  ["GELU, by formula", { activation: "gelu", gain: 1.53353, depth: 50 },
    "This gain keeps the size of a signal of std 1. One that is a little larger grows, 1.08 times more per layer: no formula for the std alone holds it over 50 layers."],
  ["GELU, isometric", { activation: "gelu", initializer: "isometric", depth: 50 },
    "GELU(z) − GELU(−z) = z too, whatever the std: with pairs there is no deviation that could grow."],
  ["Residual", { initializer: "uniform", gain: 0.4, residual: true, depth: 20 },
    "The first stop’s weights, smaller still. A layer that adds to its input hands it on, so even with weights that are too small signal and gradient stay level. Try gain 3: the gradient then explodes all the same."],
  ["All the same", { initializer: "constant", depth: 5, width: 16 },
    "Equal weights get equal gradients, so they stay equal: a layer is then one unit. Random weights make the units differ; all other stops are about how large they should be."],
];

const element = (id) => document.getElementById(id);
const defaults = Object.fromEntries(
  Object.entries(SETTINGS).map(([key, { initial }]) => [key, initial]));

// ---- The address holds the settings ---------------------------------------------------

function number(low, high) {
  return (text) => {
    const value = text.trim() === "" ? NaN : Number(text);
    return value >= low && value <= high ? value : undefined;
  };
}

function wholeNumber(low, high) {
  const read = number(low, high);
  return (text) => (Number.isInteger(read(text)) ? read(text) : undefined);
}

function oneOf(choices) {
  return (text) => choices.find((choice) => String(choice) === text);
}

function toAddress(settings) {
  return `#${new URLSearchParams(Object.entries(settings))}`;
}

const addressOf = (part) => toAddress({ ...defaults, ...part });

// The settings that an address asks for, and what of it can't be had.
function fromAddress(hash) {
  const settings = { ...defaults };
  const problems = [];
  for (const [key, text] of new URLSearchParams(hash.slice(1))) {
    const value = Object.hasOwn(SETTINGS, key) ? SETTINGS[key].read(text) : undefined;
    if (value === undefined) problems.push(`${key}=${text}`);
    else settings[key] = value;
  }
  return { settings, problems };
}

// ---- Controls -------------------------------------------------------------------------

function fillSelect(id, choices) {
  for (const [value, name] of choices) element(id).add(new Option(name, value));
}

function writeControls(settings) {
  for (const key of ["depth", "width", "activation", "initializer", "gain", "seed"])
    element(key).value = settings[key];
  element("residual").checked = settings.residual;
  document.querySelector(`[name=axis][value=${settings.axis}]`).checked = true;
  element("depth-value").textContent = settings.depth;
  const { name, gain, hint } = ACTIVATION_CHOICES[settings.activation];
  element("activation-hint").textContent = hint;
  element("initializer-hint").textContent = INITIALIZER_CHOICES[settings.initializer].hint;
  element("use-gain").textContent = `${name}: ${formatNumber(gain, 4)}`;
  for (const link of element("tour").querySelectorAll("a"))
    link.ariaCurrent = link.hash === toAddress(settings) ? "true" : null;
}

function readControls() {
  const texts = { axis: document.querySelector("[name=axis]:checked").value };
  for (const key of ["depth", "width", "activation", "initializer", "gain", "seed"])
    texts[key] = element(key).value;
  texts.residual = String(element("residual").checked);
  const settings = {};
  for (const [key, { read }] of Object.entries(SETTINGS)) settings[key] = read(texts[key]);
  return settings;
}

// ---- The verdict, in words ------------------------------------------------------------

const LEVELS = ["good", "warn", "bad"];
const HEADLINES = { good: "Level.", warn: "Not quite.", bad: "It breaks." };

// What becomes of a std from layer to layer, in the order in which it travels.
function trend(stds, name, from) {
  const broken = stds.findIndex((std) => !Number.isFinite(std));
  if (broken >= 0) return ["bad", `The ${name} overflows ${from(broken)}.`];
  const zero = stds.indexOf(0);
  if (zero >= 0) return ["bad", `The ${name} is exactly zero ${from(zero)}.`];
  const ratio = stds.at(-1) / stds[0];
  const change = Math.max(ratio, 1 / ratio);
  if (change <= 2) return ["good", `The ${name} keeps its size (${formatNumber(ratio)} times).`];
  const way = ratio < 1 ? "falls" : "grows";
  const perLayer = formatNumber(ratio ** (1 / (stds.length - 1)));
  const figures = `${way} to ${formatNumber(ratio)} times its size, ${perLayer} times per layer`;
  if (change <= 10) return ["warn", `The ${name} ${figures}.`];
  return ["bad", `The ${name} ${ratio < 1 ? "vanishes" : "explodes"}: it ${figures}.`];
}

function judge({ settings, rows, alike }) {
  const { activation } = settings;
  const last = rows.length - 1;
  const stds = rows.map((row) => row.std);
  const gradients = rows.map((row) => row.gradient);
  const findings = [
    trend(stds, "signal", (index) => `from layer ${index} on`),
    trend(gradients.toReversed(), "gradient", (index) =>
      `from layer ${last - index} back to the input`),
  ];
  const idle = rows.map((row) => row.idle ?? 0);
  const worst = idle.indexOf(Math.max(...idle));
  if (idle[worst] > 0.5) {
    const state = activation === "relu" ? "units are dead: zero for every example" : "values are saturated: the slope is nearly zero there";
    findings.push(["bad", `In layer ${worst}, ${percent(idle[worst])} of the ${state}.`]);
  }
  if (alike && stds[1] > 0)
    findings.push(["bad", "All units of a layer compute the same, and they get the same gradient: no training makes them differ."]);
  else if (rows[last].between !== null && rows[last].between < 0.2 && !findings.some(([level]) => level === "bad"))
    findings.push(["warn", `Only ${percent(rows[last].between)} of the variance at the end differs between examples: the network hardly tells its inputs apart.`]);
  const level = LEVELS[Math.max(...findings.map(([each]) => LEVELS.indexOf(each)))];
  return { level, sentences: findings.map(([, sentence]) => sentence) };
}

const percent = (fraction) => `${formatNumber(100 * fraction, 2)} %`;

function showVerdict(result) {
  const { level, sentences } = judge(result);
  const headline = document.createElement("strong");
  headline.textContent = HEADLINES[level];
  element("verdict").dataset.level = level;
  element("verdict").replaceChildren(headline, ` ${sentences.join(" ")}`);
  const stop = TOUR.find(([, part]) => addressOf(part) === toAddress(result.settings));
  element("lesson").hidden = !stop;
  element("lesson").textContent = stop?.[2];
}

// ---- Tables ---------------------------------------------------------------------------

function addRow(body, header, cells) {
  const row = body.insertRow();
  const title = document.createElement("th");
  title.scope = "row";
  title.textContent = header;
  row.append(title);
  for (const [text, value] of cells) {
    const data = document.createElement("data");
    data.value = value;
    data.textContent = text;
    row.insertCell().append(data);
  }
  return title;
}

function showNumbers({ rows }) {
  const body = element("numbers").querySelector("tbody");
  body.replaceChildren();
  const figure = (value) => [formatNumber(value), value];
  const share = (value) => (value === null ? ["–", ""] : [percent(value), value]);
  rows.forEach(({ std, gradient, mean, idle, between }, layer) => {
    const cells = [figure(std), figure(gradient), figure(mean), share(idle), share(between)];
    addRow(body, String(layer), cells);
  });
}

function showRuns() {
  const body = element("runs").querySelector("tbody");
  body.replaceChildren();
  for (const { label, rate, points, loss, color } of runs) {
    const [step, accuracy] = points.at(-1);
    const cells = [[`${accuracy.toFixed(1)} %`, accuracy / 100], [Number.isNaN(loss) ? "–" : formatNumber(loss), loss],
      [step, step], [rate, rate]];
    const swatch = document.createElement("span");
    swatch.className = `swatch run-${color}`;
    addRow(body, label, cells).prepend(swatch);
  }
}

// ---- Workers --------------------------------------------------------------------------

// Runs in the worker, beside `arithmetic`.
function serve({ propagate, newTrainer }) {
  self.onmessage = ({ data: { settings, training } }) => {
    if (!training) {
      self.postMessage(propagate(settings));
      return;
    }
    const { rate, digits, steps } = training;
    const trainer = newTrainer(settings, rate, digits);
    self.postMessage({ step: 0, loss: NaN, accuracy: trainer.accuracy() });
    let [sum, count] = [0, 0];
    for (let step = 1; step <= steps; step++) {
      sum += trainer.step();
      count += 1;
      if (step % 10) continue;
      self.postMessage({ step, loss: sum / count, accuracy: trainer.accuracy() });
      if (!Number.isFinite(sum)) return;
      [sum, count] = [0, 0];
    }
  };
}

function newWorker(listen) {
  const source = `(${serve})((${arithmetic})());`;
  const address = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
  const worker = new Worker(address);
  worker.onmessage = ({ data }) => listen(data);
  worker.onerror = ({ message }) => showNote(`The arithmetic failed: ${message}`);
  return worker;
}

function showNote(text) {
  element("note").hidden = !text;
  element("note").textContent = text;
}

// ---- What the page does ----------------------------------------------------------------

const charts = Object.fromEntries(["depth", "signal", "gradient", "training"].map((name) => [
  name, new Chart(element(`${name}-chart`))]));
let settings = null;
let shown = null; // the last result
let running = null; // the settings at work in the worker; one at a time, the latest wins

const explorer = newWorker((result) => {
  shown = result;
  const stale = running !== settings;
  running = null;
  if (stale) compute();
  else show();
});

function compute() {
  element("results").ariaBusy = "true";
  if (running) return;
  running = settings;
  explorer.postMessage({ settings });
}

function show() {
  showVerdict(shown);
  showNumbers(shown);
  drawDepth(charts.depth, shown.rows);
  showHistograms();
  const [first, last] = [shown.rows[0], shown.rows.at(-1)];
  element("depth-chart").ariaLabel =
    `Line chart. The std of the signal goes from ${formatNumber(first.std)} at the input to ` +
    `${formatNumber(last.std)} at layer ${settings.depth}, that of the gradient from ` +
    `${formatNumber(last.gradient)} there to ${formatNumber(first.gradient)} at the input. ` +
    "All layers are in the table below.";
  element("results").dataset.shown = toAddress(settings);
  element("results").ariaBusy = "false";
}

function showHistograms() {
  for (const [name, histograms, key] of [
    ["signal", shown.signals, "std"], ["gradient", shown.gradients, "gradient"]]) {
    drawRidges(charts[name], histograms, settings.axis, name);
    const stds = histograms.layers.map((layer) =>
      `layer ${layer}, std ${formatNumber(shown.rows[layer][key])}`);
    element(`${name}-chart`).ariaLabel = `Histograms of the ${name}: ${stds.join("; ")}.`;
  }
}

// Nothing is shown of a network that can't be computed.
function refuse(problems) {
  element("found").hidden = element("results").hidden = true;
  showNote(problems.join(" "));
}

function apply(next, problems = []) {
  settings = next;
  writeControls(settings);
  element("found").hidden = element("results").hidden = false;
  showNote(problems.length ? `This page can't show ${problems.join(", ")}. It shows what is set below instead.` : "");
  compute();
}

function change(part) {
  history.replaceState(null, "", toAddress({ ...settings, ...part }));
  apply({ ...settings, ...part });
}

function followAddress() {
  const asked = fromAddress(location.hash);
  apply(asked.settings, asked.problems);
}

// ---- Training ---------------------------------------------------------------------------

const runs = [];
let trainer = null;

function startTraining() {
  stopTraining();
  const rate = Number(element("rate").value);
  const { depth, width, activation, initializer, gain, residual } = settings;
  const parts = [INITIALIZER_CHOICES[initializer].name, ACTIVATION_CHOICES[activation].name,
    `${depth} × ${width}`];
  if (gain !== 1) parts.push(`gain ${formatNumber(gain)}`);
  if (residual) parts.push("residual");
  const free = [1, 2, 3].find((color) => runs.every((run) => run.color !== color));
  const color = free ?? runs.shift().color;
  const run = { label: parts.join(", "), rate, color, points: [], loss: NaN };
  runs.push(run);
  element("training-status").textContent = "Training …";
  element("stop").disabled = false;
  element("training-chart").hidden = element("runs").hidden = false;
  trainer = newWorker(({ step, loss, accuracy }) => {
    run.points.push([step, 100 * accuracy]);
    run.loss = loss;
    element("progress").value = step;
    drawRuns(charts.training, runs);
    showRuns();
    const failed = step > 0 && !Number.isFinite(loss);
    if (step === STEPS || failed) stopTraining(failed ? "The loss is not finite: the training has failed." : "Done.");
  });
  trainer.postMessage({ settings, training: { rate, digits: DIGITS, steps: STEPS } });
}

function stopTraining(reason = "Stopped.") {
  if (!trainer) return;
  trainer.terminate();
  trainer = null;
  element("stop").disabled = true;
  const run = runs.at(-1);
  if (run.points.length === 0) {
    runs.pop();
    element("training-status").textContent = reason;
    return;
  }
  const [step, accuracy] = run.points.at(-1);
  element("training-status").textContent =
    `${reason} ${run.label}: test accuracy ${accuracy.toFixed(1)} % after ${step} steps.`;
}

// ---- Start ------------------------------------------------------------------------------

fillSelect("width", WIDTHS.map((width) => [width, `${width} units`]));
const named = (choices) => Object.entries(choices).map(([key, { name }]) => [key, name]);
fillSelect("activation", named(ACTIVATION_CHOICES));
fillSelect("initializer", named(INITIALIZER_CHOICES));
fillSelect("rate", RATES.map((rate) => [rate, rate]));
element("rate").value = 0.01;
for (const [name, part] of TOUR) {
  const link = document.createElement("a");
  link.href = addressOf(part);
  link.textContent = name;
  const item = document.createElement("li");
  item.append(link);
  element("tour").append(item);
}

element("controls").addEventListener("input", () => {
  const next = readControls();
  const wrong = Object.keys(next).filter((key) => next[key] === undefined);
  if (wrong.length) refuse(wrong.map((key) => SETTINGS[key].rule));
  else change(next);
});
element("controls").addEventListener("submit", (event) => event.preventDefault());
element("use-gain").addEventListener("click", () =>
  change({ gain: Number(ACTIVATION_CHOICES[settings.activation].gain.toPrecision(7)) }));
element("new-seed").addEventListener("click", () => change({ seed: (settings.seed + 1) % 1e9 }));
for (const radio of document.querySelectorAll("[name=axis]"))
  radio.addEventListener("change", () => change({ axis: radio.value }));
element("training").addEventListener("submit", (event) => {
  event.preventDefault();
  startTraining();
});
element("stop").addEventListener("click", () => stopTraining());
addEventListener("hashchange", followAddress);
followAddress();
