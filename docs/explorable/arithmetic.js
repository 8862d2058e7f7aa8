// All arithmetic of the page: draw kernels, run a network forward and back, train it.
// It is one function, because a browser starts no worker from a file of a page that was
// opened from disk: the worker is made from the text of this function.
function arithmetic() {
  "use strict";

  const BATCH = 64; // examples in a batch of noise
  const BINS = 61; // of a histogram; odd, so that zero has a bin of its own
  const RIDGES = 10; // layers that get a histogram

  // ---- Random numbers: sfc32 (from PractRand), one stream for each purpose ------------

  function randomStream(seed, purpose, index) {
    let [a, b, c, counter] = [seed >>> 0, purpose >>> 0, index >>> 0, 1];
    const next = () => {
      const sum = (((a + b) | 0) + counter) | 0;
      counter = (counter + 1) | 0;
      a = b ^ (b >>> 9);
      b = (c + (c << 3)) | 0;
      c = (((c << 21) | (c >>> 11)) + sum) | 0;
      return sum >>> 0;
    };
    for (let i = 0; i < 16; i++) next(); // mixes the three words
    return () => (next() + 0.5) / 4294967296; // in (0, 1)
  }

  function normalStream(random) {
    let spare = null; // Box and Muller's method gives two at a time
    return () => {
      if (spare !== null) {
        const value = spare;
        spare = null;
        return value;
      }
      const radius = Math.sqrt(-2 * Math.log(random()));
      const angle = 2 * Math.PI * random();
      spare = radius * Math.sin(angle);
      return radius * Math.cos(angle);
    };
  }

  const PURPOSES = { input: 1, gradient: 2, kernel: 3, batches: 4 };

  function normals(count, seed, purpose) {
    const normal = normalStream(randomStream(seed, purpose, 0));
    return Float32Array.from({ length: count }, normal);
  }

  // ---- Initializers: (fan_in, fan_out, random) -> a function that draws one weight -----

  const TRUNCATED_STD = 0.8796256610342398; // of a standard normal cut off at ±2

  function uniform(limit, random) {
    return () => limit * (2 * random() - 1);
  }

  function truncatedNormal(std, random) {
    const normal = normalStream(random);
    return () => {
      let value;
      do value = normal();
      while (Math.abs(value) > 2);
      return (value * std) / TRUNCATED_STD;
    };
  }

  function gaussian(std, random) {
    const normal = normalStream(random);
    return () => std * normal();
  }

  const glorotStd = (fanIn, fanOut) => Math.sqrt(2 / (fanIn + fanOut));
  const heStd = (fanIn) => Math.sqrt(2 / fanIn);

  const INITIALIZERS = {
    constant: () => () => 0.1,
    uniform: (fanIn, fanOut, random) => uniform(0.1, random),
    normal: (fanIn, fanOut, random) => gaussian(0.1, random),
    glorot_uniform: (fanIn, fanOut, random) =>
      uniform(Math.sqrt(3) * glorotStd(fanIn, fanOut), random),
    glorot_normal: (fanIn, fanOut, random) =>
      truncatedNormal(glorotStd(fanIn, fanOut), random),
    he_normal: (fanIn, fanOut, random) => truncatedNormal(heStd(fanIn), random),
    measured: (fanIn, fanOut, random) =>
      truncatedNormal(glorotStd(fanIn, fanOut), random), // scaled later, by `forward`
    isometric: (fanIn, fanOut, random) => gaussian(1, random), // see `makeIsometric`
  };

  function newLayer(inputs, outputs, activation, index, settings) {
    const random = randomStream(settings.seed, PURPOSES.kernel, index);
    const draw = INITIALIZERS[settings.initializer](inputs, outputs, random);
    const kernel = new Float32Array(inputs * outputs);
    for (let i = 0; i < kernel.length; i++) kernel[i] = settings.gain * draw();
    const skip = settings.residual && activation !== "output" && inputs === outputs;
    return { inputs, outputs, activation: ACTIVATIONS[activation], skip, kernel };
  }

  // Layers between `sizes`, each with its activation.
  function newNetwork(sizes, activations, settings) {
    const layers = activations.map((activation, index) =>
      newLayer(sizes[index], sizes[index + 1], activation, index, settings));
    if (settings.initializer === "isometric") makeIsometric(layers, settings.gain);
    return layers;
  }

  // ---- The isometric start, as keras_glorot's initialize(model, "isometric") -----------

  // Units 2k and 2k + 1 get opposite weights, z and -z. The next kernel takes them with
  // opposite signs, so it sees f(z) - f(-z): for ReLU, GELU and SiLU that is z. Between
  // the pairs stands an orthogonal matrix.
  function makeIsometric(layers, gain) {
    const branches = layers.filter((layer) => layer.skip).length;
    let before = null; // the effect of the activation that the input went through
    let [takes, stays] = [false, false]; // whether it is in pairs; has the effect's level
    layers.forEach((layer, index) => {
      const next = layers[index + 1];
      const effect = measureEffect(layer.activation.value);
      let factor = gain;
      if (before) factor *= stays ? 1 / (before.level * before.slope) : before.gain;
      stays = !layer.skip && next !== undefined && !next.skip;
      if (stays) factor *= effect.level;
      // Outputs of ReLU and the like have a mean, and means add up faster than noise.
      if (layer.skip) factor /= effect.isOdd ? Math.sqrt(branches) : branches;
      const makes = stays && !effect.isOdd;
      mirror(layer, takes, makes, factor);
      before = layer.skip ? null : effect;
      takes = makes;
    });
  }

  // Where f(z) - f(-z) is no multiple of z at a std of 1, it is nearly one far above the
  // curve of f, or far below.
  const [SMALL, LEVELS] = [0.1, [100, 0.3]];
  const POINTS = [...Array.from({ length: 201 }, (_, i) => 0.01 + (i * 3.99) / 200), SMALL];

  // The a of f(z) - f(-z) = a z, half of it for an odd f; the std of z at which it holds
  // best; for a unit without a partner, the factor that makes up for f; whether a pair
  // would be no more than one unit.
  function measureEffect(f) {
    const lines = LEVELS.map((level) => line(f, level));
    const own = line(f, 1);
    const best = own.error === 0 ? own : lines[0].error < lines[1].error ? lines[0] : lines[1];
    const [up, down] = [f(SMALL), f(-SMALL)];
    const isOdd = Math.abs(up + down) < 1e-6;
    const gain = SMALL / Math.sqrt((up * up + down * down) / 2);
    return { slope: best.slope / (isOdd ? 2 : 1), level: best.level, gain, isOdd };
  }

  // The a of f(z) - f(-z) = a z at a std of z, and the error of that.
  function line(f, level) {
    const of = (z) => f(z) - f(-z);
    const slope = of(level * SMALL) / (level * SMALL);
    const isExact = POINTS.every((point) =>
      Math.abs(of(level * point) / (level * point) / slope - 1) < 1e-3);
    if (isExact) return { level, slope, error: 0 };
    let [yy, yz, zz] = [0, 0, 0];
    for (const point of POINTS) {
      const [weight, z] = [Math.exp(-point * point / 2), level * point];
      yy += weight * of(z) ** 2;
      yz += weight * of(z) * z;
      zz += weight * z * z;
    }
    return { level, slope: Math.sqrt(yy / zz), error: 1 - (yz * yz) / (yy * zz) };
  }

  // Makes a kernel of normal values one of an orthogonal matrix.
  function mirror({ inputs, outputs, kernel }, takes, makes, factor) {
    const rows = takes ? inputs / 2 : inputs;
    const columns = makes ? outputs / 2 : outputs;
    const [count, size] = [Math.min(rows, columns), Math.max(rows, columns)];
    const vectors = Array.from({ length: count }, (_, i) =>
      Float64Array.from(kernel.subarray(i * size, (i + 1) * size)));
    orthonormalize(vectors);
    factor *= Math.sqrt((2 * size) / (rows + columns)); // Glorot's
    for (let i = 0; i < inputs; i++)
      for (let j = 0; j < outputs; j++) {
        const row = takes ? i >> 1 : i, column = makes ? j >> 1 : j;
        const value = rows < columns ? vectors[row][column] : vectors[column][row];
        const opposite = (takes && i % 2 === 1) !== (makes && j % 2 === 1);
        kernel[i * outputs + j] = (opposite ? -factor : factor) * value;
      }
  }

  // By Gram and Schmidt's method, in the order that loses fewest digits.
  function orthonormalize(vectors) {
    vectors.forEach((vector, i) => {
      const length = Math.sqrt(dot(vector, 0, vector, 0, vector.length));
      scale(vector, 1 / length);
      for (const other of vectors.slice(i + 1)) {
        const part = dot(other, 0, vector, 0, vector.length);
        for (let k = 0; k < other.length; k++) other[k] -= part * vector[k];
      }
    });
  }

  // ---- Activations: z -> value, and z, value -> slope ---------------------------------

  // Abramowitz and Stegun, 7.1.26: the error is below 1.5e-7.
  function erf(x) {
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const polynomial =
      ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t +
        0.254829592) * t;
    return Math.sign(x) * (1 - polynomial * Math.exp(-x * x));
  }

  const cumulative = (z) => 0.5 * (1 + erf(z * Math.SQRT1_2));
  const density = (z) => Math.exp(-0.5 * z * z) / Math.sqrt(2 * Math.PI);
  const logistic = (z) => 1 / (1 + Math.exp(-z));
  const [SELU_SCALE, SELU_ALPHA] = [1.0507009873554805, 1.6732632423543772];

  const ACTIVATIONS = {
    linear: { value: (z) => z, slope: () => 1 },
    output: { value: (z) => z, slope: () => 1 },
    tanh: { value: Math.tanh, slope: (z, y) => 1 - y * y, saturates: true },
    sigmoid: { value: logistic, slope: (z, y) => y * (1 - y), saturates: true },
    relu: { value: (z) => (z > 0 ? z : 0), slope: (z) => (z > 0 ? 1 : 0), dies: true },
    leaky_relu: { value: (z) => (z > 0 ? z : 0.2 * z), slope: (z) => (z > 0 ? 1 : 0.2) },
    gelu: {
      value: (z) => z * cumulative(z),
      slope: (z) => cumulative(z) + z * density(z),
    },
    silu: {
      value: (z) => z * logistic(z),
      slope: (z) => logistic(z) * (1 + z * (1 - logistic(z))),
    },
    elu: {
      value: (z) => (z > 0 ? z : Math.expm1(z)),
      slope: (z) => (z > 0 ? 1 : Math.exp(z)),
    },
    selu: {
      value: (z) => SELU_SCALE * (z > 0 ? z : SELU_ALPHA * Math.expm1(z)),
      slope: (z) => SELU_SCALE * (z > 0 ? 1 : SELU_ALPHA * Math.exp(z)),
    },
  };

  // ---- Matrices, row by row ----------------------------------------------------------

  function transpose(matrix, rows, columns) {
    const result = new Float32Array(matrix.length);
    for (let i = 0; i < rows; i++)
      for (let j = 0; j < columns; j++) result[j * rows + i] = matrix[i * columns + j];
    return result;
  }

  // a (rows x inner) times the transpose of b (columns x inner). Four rows and two columns
  // at a time: eight sums stay in registers, which is five times as fast as one.
  function multiply(a, b, rows, columns, inner) {
    const result = new Float32Array(rows * columns);
    let i = 0;
    for (; i + 3 < rows; i += 4) {
      const [a0, a1, a2, a3] = [i * inner, (i + 1) * inner, (i + 2) * inner, (i + 3) * inner];
      let j = 0;
      for (; j + 1 < columns; j += 2) {
        const [b0, b1] = [j * inner, (j + 1) * inner];
        let s00 = 0, s01 = 0, s10 = 0, s11 = 0, s20 = 0, s21 = 0, s30 = 0, s31 = 0;
        for (let k = 0; k < inner; k++) {
          const u = b[b0 + k], v = b[b1 + k];
          const w = a[a0 + k], x = a[a1 + k], y = a[a2 + k], z = a[a3 + k];
          s00 += w * u; s01 += w * v;
          s10 += x * u; s11 += x * v;
          s20 += y * u; s21 += y * v;
          s30 += z * u; s31 += z * v;
        }
        let at = i * columns + j;
        result[at] = s00; result[at + 1] = s01; at += columns;
        result[at] = s10; result[at + 1] = s11; at += columns;
        result[at] = s20; result[at + 1] = s21; at += columns;
        result[at] = s30; result[at + 1] = s31;
      }
      for (; j < columns; j++)
        for (let row = i; row < i + 4; row++)
          result[row * columns + j] = dot(a, row * inner, b, j * inner, inner);
    }
    for (; i < rows; i++)
      for (let j = 0; j < columns; j++)
        result[i * columns + j] = dot(a, i * inner, b, j * inner, inner);
    return result;
  }

  function dot(a, aStart, b, bStart, count) {
    let sum = 0;
    for (let k = 0; k < count; k++) sum += a[aStart + k] * b[bStart + k];
    return sum;
  }

  function moments(values) {
    let sum = 0;
    for (let i = 0; i < values.length; i++) sum += values[i];
    const mean = sum / values.length;
    let squares = 0;
    for (let i = 0; i < values.length; i++) squares += (values[i] - mean) ** 2;
    return { mean, std: Math.sqrt(squares / values.length) };
  }

  function scale(values, factor) {
    for (let i = 0; i < values.length; i++) values[i] *= factor;
  }

  // ---- The network -------------------------------------------------------------------

  // What each layer was given and returned. With `targetStd`, each kernel is first scaled
  // so that its result has that std: the measured initialization.
  function forward(layers, input, batch, targetStd = null) {
    const passes = [];
    let value = input;
    for (const layer of layers) {
      const { inputs, outputs, kernel, activation } = layer;
      const flipped = transpose(kernel, inputs, outputs);
      const z = multiply(value, flipped, batch, outputs, inputs);
      if (targetStd !== null) {
        const { std } = moments(z);
        const factor = std > 0 && Number.isFinite(std) ? targetStd / std : 1;
        scale(kernel, factor);
        scale(z, factor);
      }
      const activated = new Float32Array(z.length);
      const slope = new Float32Array(z.length);
      for (let i = 0; i < z.length; i++) {
        activated[i] = activation.value(z[i]);
        slope[i] = activation.slope(z[i], activated[i]);
      }
      const output = layer.skip ? activated.map((part, i) => part + value[i]) : activated;
      passes.push({ layer, input: value, activated, slope, output });
      value = output;
    }
    return passes;
  }

  // Goes back through the layers. `visit` sees each with the gradient at its output, and
  // with that at its product with the kernel. Returns the gradient at the input.
  function backward(passes, gradient, batch, visit) {
    for (let index = passes.length - 1; index >= 0; index--) {
      const { layer, slope } = passes[index];
      const inner = gradient.map((value, i) => value * slope[i]);
      visit(index, gradient, inner);
      const before = multiply(inner, layer.kernel, batch, layer.inputs, layer.outputs);
      if (layer.skip) for (let i = 0; i < before.length; i++) before[i] += gradient[i];
      gradient = before;
    }
    return gradient;
  }

  function targetOf(settings) {
    return settings.initializer === "measured" ? settings.gain : null;
  }

  // ---- What the page shows: signal and gradient by depth ------------------------------

  // The network takes unit normal noise. The gradient is that of sum(c * output), c random
  // with unit variance, as in keras_glorot.propagate.
  function propagate(settings) {
    const { depth, width, activation, seed } = settings;
    const activations = new Array(depth).fill(activation);
    const layers = newNetwork(new Array(depth + 1).fill(width), activations, settings);
    const input = normals(BATCH * width, seed, PURPOSES.input);
    const passes = forward(layers, input, BATCH, targetOf(settings));
    const signals = [input, ...passes.map((pass) => pass.output)];
    const gradients = [];
    const last = normals(BATCH * width, seed, PURPOSES.gradient);
    gradients[0] = backward(passes, last, BATCH, (index, gradient) => {
      gradients[index + 1] = gradient;
    });
    const rows = signals.map((signal, index) => {
      const { mean, std } = moments(signal);
      const idle = index === 0 ? null : idleFraction(passes[index - 1], width);
      const between = betweenExamples(signal, width, std);
      return { mean, std, gradient: moments(gradients[index]).std, idle, between };
    });
    const shown = evenly(depth, RIDGES);
    return {
      settings,
      rows,
      alike: passes.every((pass) => unitsAlike(pass.activated, width)),
      signals: histograms(shown, signals),
      gradients: histograms(shown, gradients),
    };
  }

  // Saturated values (|slope| < 0.1 of tanh and sigmoid), or ReLU units that are zero on
  // the whole batch.
  function idleFraction({ layer, slope, activated }, width) {
    if (layer.activation.saturates)
      return slope.reduce((sum, value) => sum + (Math.abs(value) < 0.1), 0) / slope.length;
    if (!layer.activation.dies) return null;
    let dead = 0;
    for (let unit = 0; unit < width; unit++) {
      let zero = true;
      for (let at = unit; at < activated.length && zero; at += width)
        zero = activated[at] === 0;
      dead += zero;
    }
    return dead / width;
  }

  // Which part of the variance differs between the examples. The rest is the same for all.
  function betweenExamples(signal, width, std) {
    let sum = 0;
    for (let unit = 0; unit < width; unit++) {
      const values = [];
      for (let at = unit; at < signal.length; at += width) values.push(signal[at]);
      sum += moments(values).std ** 2;
    }
    return std > 0 ? sum / width / std ** 2 : null;
  }

  function unitsAlike(activated, width) {
    return activated.every((value, i) => {
      const first = activated[i - (i % width)];
      return Math.abs(value - first) <= 1e-5 * Math.abs(first);
    });
  }

  // Up to `count` of the layers 1 to depth, the first and the last among them.
  function evenly(depth, count) {
    const steps = Math.min(depth, count) - 1;
    if (steps === 0) return [1];
    return Array.from({ length: steps + 1 }, (_, i) =>
      1 + Math.round((i * (depth - 1)) / steps));
  }

  // Of the shown layers, twice: all on one axis, and each in units of its own std.
  function histograms(shown, tensors) {
    const limits = shown.map((layer) => quantile(tensors[layer].map(Math.abs), 0.995));
    const finite = limits.filter(Number.isFinite);
    const limit = roundUp(Math.max(...finite)) || 1;
    return {
      layers: shown,
      limit,
      shared: shown.map((layer) => histogram(tensors[layer], 0, limit)),
      own: shown.map((layer) => {
        const { mean, std } = moments(tensors[layer]);
        return histogram(tensors[layer], mean, 4 * std);
      }),
    };
  }

  // To a number that is easy to halve: 1, 2, 4, 6, 8 times a power of ten.
  function roundUp(value) {
    const power = 10 ** Math.floor(Math.log10(value));
    return power * [1, 2, 4, 6, 8, 10].find((digit) => digit * power >= value * 0.999);
  }

  function quantile(values, fraction) {
    return values.sort()[Math.floor(fraction * (values.length - 1))];
  }

  // Counts from center - limit to center + limit. What lies outside has no bin.
  function histogram(values, center, limit) {
    const counts = new Array(BINS).fill(0);
    for (const value of values) {
      const place = limit > 0 ? (value - center) / limit : 0; // from -1 to 1
      const bin = Math.floor(((place + 1) / 2) * BINS);
      if (bin >= 0 && bin < BINS) counts[bin] += 1;
    }
    return counts;
  }

  // ---- Training: digits, softmax, plain gradient descent --------------------------------

  const PIXELS = 64;
  const CLASSES = 10;
  const TRAIN_BATCH = 32;

  // `digits`: {images: a letter for each pixel, a = 0 to q = 16; labels: a digit each;
  // training: how many of them are for training}.
  function newTrainer(settings, learningRate, digits) {
    const pixels = Float32Array.from(digits.images, (letter) => letter.charCodeAt(0) - 97);
    const { mean, std } = moments(pixels);
    for (let i = 0; i < pixels.length; i++) pixels[i] = (pixels[i] - mean) / std;
    const labels = Array.from(digits.labels, Number);
    const rowsOf = (first, last) => pixels.subarray(first * PIXELS, last * PIXELS);

    const { depth, width, activation, seed } = settings;
    const sizes = [PIXELS, ...new Array(depth).fill(width), CLASSES];
    const activations = [...new Array(depth).fill(activation), "output"];
    const layers = newNetwork(sizes, activations, settings);
    if (targetOf(settings) !== null)
      forward(layers, rowsOf(0, BATCH), BATCH, targetOf(settings));

    const random = randomStream(seed, PURPOSES.batches, 0);
    const nextBatch = () =>
      Array.from({ length: TRAIN_BATCH }, () => Math.floor(random() * digits.training));

    function step(batch = nextBatch()) {
      const input = new Float32Array(batch.length * PIXELS);
      batch.forEach((example, i) => input.set(rowsOf(example, example + 1), i * PIXELS));
      const passes = forward(layers, input, batch.length);
      const { loss, gradient } = crossEntropy(passes.at(-1).output, batch.map((i) => labels[i]));
      const updates = [];
      backward(passes, gradient, batch.length, (index, _, inner) => {
        const { inputs, outputs } = layers[index];
        const before = transpose(passes[index].input, batch.length, inputs);
        const after = transpose(inner, batch.length, outputs);
        updates[index] = multiply(before, after, inputs, outputs, batch.length);
      });
      layers.forEach(({ kernel }, index) => {
        for (let i = 0; i < kernel.length; i++) kernel[i] -= learningRate * updates[index][i];
      });
      return loss;
    }

    function accuracy() {
      const count = labels.length - digits.training;
      const scores = forward(layers, rowsOf(digits.training, labels.length), count)
        .at(-1).output;
      let right = 0;
      for (let i = 0; i < count; i++) {
        const row = scores.subarray(i * CLASSES, (i + 1) * CLASSES);
        right += row.indexOf(Math.max(...row)) === labels[digits.training + i];
      }
      return right / count;
    }

    return { layers, nextBatch, step, accuracy };
  }

  // The mean loss of a batch, and its gradient at the scores.
  function crossEntropy(scores, labels) {
    const gradient = new Float32Array(scores.length);
    let loss = 0;
    labels.forEach((label, i) => {
      const row = scores.subarray(i * CLASSES, (i + 1) * CLASSES);
      const highest = Math.max(...row);
      const total = row.reduce((sum, score) => sum + Math.exp(score - highest), 0);
      loss += Math.log(total) + highest - row[label];
      row.forEach((score, j) => {
        const probability = Math.exp(score - highest) / total;
        gradient[i * CLASSES + j] = (probability - (j === label)) / labels.length;
      });
    });
    return { loss: loss / labels.length, gradient };
  }

  return { propagate, newTrainer };
}
