"""The page to play with: its numbers are those of `propagate`, and everyone can use it.

With `--overwrite` it writes the table of differences, `docs/evidence/explorable.md`.
"""

import re
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
from browser import close, launched, needs_chromium, open_file, violations
from keras import layers, ops
from scipy import stats

from keras_glorot import (
    GlorotNormal,
    GlorotUniform,
    calculate_gain,
    initialize,
    propagate,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "torch",
        reason="the page has no backend; torch runs models without compiling fastest",
    ),
    needs_chromium,
]

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "explorable"
EVIDENCE = DOCS / "evidence" / "explorable.md"
BATCH = 64  # of the page
SEEDS = 20  # of each of the two sides
SIGNIFICANCE = 1e-3  # of a false alarm in the whole comparison


def setting(activation, initializer, depth, width, gain=1.0, residual=False):
    settings = {"depth": depth, "width": width, "activation": activation}
    return settings | {"initializer": initializer, "gain": gain, "residual": residual}


# Every activation, every initializer, plain and residual, shallow and deep.
SETTINGS = {
    "tanh": setting("tanh", "glorot_uniform", 10, 128),
    "tanh saturated": setting("tanh", "glorot_normal", 10, 64, gain=3.0),
    "tanh residual": setting("tanh", "uniform", 20, 64, residual=True),
    "sigmoid": setting("sigmoid", "normal", 5, 128),
    "relu": setting("relu", "glorot_uniform", 30, 64),
    "relu he": setting("relu", "he_normal", 20, 128),
    "relu residual": setting("relu", "uniform", 10, 32, residual=True),
    "leaky relu": setting("leaky_relu", "glorot_uniform", 20, 64, gain=1.38675),
    "gelu": setting("gelu", "glorot_normal", 20, 64, gain=1.53353),
    "gelu measured": setting("gelu", "measured", 30, 32),
    "silu measured residual": setting("silu", "measured", 10, 32, residual=True),
    "elu": setting("elu", "normal", 10, 128, gain=1.1),
    "selu": setting("selu", "uniform", 10, 256),
    "linear": setting("linear", "glorot_uniform", 30, 32),
    "constant": setting("tanh", "constant", 4, 16),
    "relu isometric": setting("relu", "isometric", 30, 64),
    "elu isometric": setting("elu", "isometric", 10, 64),
    "tanh isometric residual": setting("tanh", "isometric", 10, 32, residual=True),
    "relu isometric residual": setting("relu", "isometric", 10, 32, residual=True),
}
QUANTITIES = ("std", "gradient", "mean", "idle", "between")

# A line of the page's arithmetic, a wrong one, and the setting that must notice.
FAULTS = {
    "slope of tanh": ("slope: (z, y) => 1 - y * y", "slope: (z, y) => 1 - y", "tanh"),
    "slope of relu": ("slope: (z) => (z > 0 ? 1 : 0)", "slope: () => 1", "relu"),
    "slope of gelu": (
        "slope: (z) => cumulative(z) + z * density(z)",
        "slope: (z) => cumulative(z)",
        "gelu",
    ),
    "erf": ("Math.sign(x) * (1", "1.1 * Math.sign(x) * (1", "gelu"),
    "fans": ("Math.sqrt(2 / (fanIn + fanOut))", "Math.sqrt(2 / fanIn)", "tanh"),
    "limit": ("Math.sqrt(3) * glorotStd", "2 * glorotStd", "linear"),
    "truncation": ("(value * std) / TRUNCATED_STD", "value * std", "relu he"),
    "no truncation, 2 %": ("std * normal()", "1.02 * std * normal()", "sigmoid"),
    "gain": ("settings.gain * draw()", "draw()", "leaky relu"),
    "measure": ("? settings.gain : null", "? 1.05 : null", "gelu measured"),
    "skip": ("if (layer.skip) for", "if (false) for", "tanh residual"),
    "std": ("Math.sqrt(squares / values.length)", "squares / values.length", "relu"),
    "mean": ("const mean = sum / values.length", "const mean = 0", "relu he"),
    "saturated": ("Math.abs(value) < 0.1", "value < 0.2", "tanh saturated"),
    "dead": ("dead += zero", "dead += 1 - zero", "relu"),
    "between": ("sum / width / std ** 2", "sum / width / std", "relu"),
    "pairs": ("const opposite = (takes &&", "const opposite = (false &&", "relu isometric"),
}


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


def open_page(browser, folder=PAGE, address="", width=1200, scheme="light"):
    page = open_file(browser, folder / "index.html", address, width, scheme)
    page.wait_for_selector("#results[aria-busy=false]", timeout=30_000)
    return page


# ---- The numbers ------------------------------------------------------------------------

READ_TABLES = """async (addresses) => {
  const tables = [];
  for (const address of addresses) {
    location.hash = address;
    while (document.getElementById("results").dataset.shown !== address)
      await new Promise((resolve) => setTimeout(resolve, 5));
    tables.push([...document.querySelectorAll("#numbers tbody tr")].map((row) =>
      [...row.querySelectorAll("data")].map((data) => data.value)));
  }
  return tables;
}"""


def address(settings, seed=1):
    """In the order of the page, as JavaScript writes numbers and truth values."""
    values = settings | {"seed": seed, "axis": "shared"}
    return "#" + "&".join(
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}".lower()
        for key, value in values.items()
    )


def numbers_of_page(page, settings):
    """An array (seed, layer from 0, quantity) from the table that the page shows."""
    addresses = [address(settings, seed) for seed in range(1, SEEDS + 1)]
    tables = page.evaluate(READ_TABLES, addresses)
    numbers = [[[float(v or "nan") for v in row] for row in table] for table in tables]
    return np.array(numbers)[..., : len(QUANTITIES)]


def numbers_of_keras(settings):
    """The same from `propagate`, with kernels and inputs of its own."""
    model = build(settings)
    outputs = [model.get_layer(f"layer_{k}").output for k in depths(settings)[1:]]
    all_outputs = keras.Model(model.input, outputs)
    numbers = []
    for seed in range(SEEDS):
        x = np.random.default_rng([7, seed]).standard_normal((BATCH, settings["width"]))
        x = x.astype("float32")
        fill(model, x, settings, seed)
        table = propagate(model, x, seed=seed)
        rows = {row["path"]: row for row in table}
        whole = table.rows[-1]
        at_input = whole["gradient_std"] * whole["backward_gain"]
        tensors = [x, *(ops.convert_to_numpy(y) for y in ops.stack(all_outputs(x)))]
        layer_0 = [x.std(), at_input, x.mean(), np.nan, between(x)]
        numbers.append([layer_0])
        for depth in depths(settings)[1:]:
            row, dense = rows[f"layer_{depth}"], rows[f"dense_{depth}"]
            idle = dense["dead"] if dense["saturated"] is None else dense["saturated"]
            idle = np.nan if idle is None else idle
            figures = [row["std"], row["gradient_std"], row["mean"], idle]
            numbers[-1].append([*figures, between(tensors[depth])])
    return np.array(numbers, float)


def depths(settings):
    return range(settings["depth"] + 1)


def between(tensor):
    """The part of the variance that differs between the examples."""
    return (tensor.astype(float) - tensor.mean(0)).var() / tensor.astype(float).var()


def build(settings):
    """`dense_k` is the k-th kernel with its activation, `layer_k` what comes out."""
    width = settings["width"]
    value = inputs = keras.Input((width,))
    for depth in depths(settings)[1:]:
        dense = layers.Dense(
            width, settings["activation"], use_bias=False, name=f"dense_{depth}"
        )
        part = dense(value)
        if settings["residual"]:
            value = layers.Add(name=f"layer_{depth}")([value, part])
        else:
            # A second name for the same: `propagate` names calls by layers.
            value = layers.Identity(name=f"layer_{depth}")(part)
    return keras.Model(inputs, value)


def fill(model, x, settings, seed):
    gain = settings["gain"]
    if settings["initializer"] == "isometric":
        initialize(model, "isometric", seed=seed, verbose=False)
        return
    new_initializer = {
        "constant": lambda seed: keras.initializers.Constant(0.1 * gain),
        "uniform": lambda seed: keras.initializers.RandomUniform(
            -0.1 * gain, 0.1 * gain, seed
        ),
        "normal": lambda seed: keras.initializers.RandomNormal(0.0, 0.1 * gain, seed),
        "glorot_uniform": lambda seed: GlorotUniform(gain, seed),
        "glorot_normal": lambda seed: GlorotNormal(gain, seed),
        "he_normal": lambda seed: keras.initializers.VarianceScaling(
            2 * gain**2, "fan_in", "truncated_normal", seed
        ),
        "measured": lambda seed: GlorotNormal(gain, seed),
    }[settings["initializer"]]
    value = ops.convert_to_tensor(x)
    for depth in depths(settings)[1:]:
        dense = model.get_layer(f"dense_{depth}")
        dense.kernel.assign(new_initializer(1000 * seed + depth)(dense.kernel.shape))
        if settings["initializer"] == "measured":
            dense.kernel.assign(dense.kernel * (gain / ops.std(value @ dense.kernel)))
            part = dense(value)
            value = value + part if settings["residual"] else part


def differences(ours, theirs, depth):
    """(quantity, layer, difference in standard errors), at the ends and in the middle."""
    found = []
    for index, quantity in enumerate(QUANTITIES):
        for layer in sorted({0, 1, (depth + 1) // 2, depth}):
            a, b = ours[:, layer, index], theirs[:, layer, index]
            assert np.isnan(a).all() == np.isnan(b).all(), (quantity, layer)
            if np.isnan(a).all():
                continue
            if quantity in ("std", "gradient"):  # their errors are factors
                a, b = np.log(a), np.log(b)
            found.append((quantity, layer, standard_errors(a, b)))
    return found


def standard_errors(a, b):
    difference = abs(a.mean() - b.mean())
    error = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    # Where no seed matters (constant kernels, no dead unit at all), float32 does.
    error = max(error, 1e-5 * max(1, abs(b).max()))
    return difference / error


def limit():
    """Two-sided, by Student, for all comparisons together: about six."""
    count = len(SETTINGS) * len(QUANTITIES) * 4
    return stats.t.isf(SIGNIFICANCE / 2 / count, SEEDS - 1)


@pytest.fixture(scope="module")
def truth():
    """What Keras gives, worked out once for each setting."""
    known = {}

    def numbers(name):
        if name not in known:
            known[name] = numbers_of_keras(SETTINGS[name])
        return known[name]

    return numbers


TABLE = """# The page to play with, against `propagate`

No number of the page differs from `propagate` by more than chance makes it.

--8<-- "docs/evidence/charts/explorable.html"

`KERAS_BACKEND=torch python -m pytest -m slow tests/test_explorable.py --overwrite` writes
this table. Both sides draw {seeds} networks of their own for each setting. A number is the
largest difference between the two means, in standard errors, among four layers: the input,
the first, the middle and the last. The test fails beyond {limit:.1f}, which is {chance:.1%}
likely in the whole table where nothing is wrong.

*idle* is the share of saturated or of dead units; only some activations have it. *between*
is the share of the variance that is between the examples of the batch.

| setting | depth | width | {quantities} |
|---|--:|--:|{columns}
"""


def heading():
    return TABLE.format(
        seeds=SEEDS,
        limit=limit(),
        chance=SIGNIFICANCE,
        quantities=" | ".join(QUANTITIES),
        columns="--:|" * len(QUANTITIES),
    )


def table_row(settings, found):
    words = [settings["activation"], settings["initializer"]]
    words += [f"gain {settings['gain']:g}"] * (settings["gain"] != 1)
    words += ["residual"] * settings["residual"]
    worst = [
        max((error for quantity, _, error in found if quantity == each), default=None)
        for each in QUANTITIES
    ]
    cells = [
        ", ".join(words).replace("_", " "),
        f"{settings['depth']} | {settings['width']}",
        *("" if error is None else f"{error:.2f}" for error in worst),
    ]
    return f"| {' | '.join(cells)} |\n"


def without_differences(text):
    return re.sub(r"\b\d+\.\d\d\b", "#", text)


def test_numbers_are_those_of_propagate(browser, truth, request):
    page = open_page(browser)
    text, worst = heading(), {}
    for name, settings in SETTINGS.items():
        found = differences(numbers_of_page(page, settings), truth(name), settings["depth"])
        text += table_row(settings, found)
        worst[name] = max(error for _, _, error in found)
    close(page)
    assert max(worst.values()) < limit(), worst
    if request.config.getoption("--overwrite"):
        EVIDENCE.write_text(text, encoding="utf-8")
    committed = EVIDENCE.read_text(encoding="utf-8")
    assert without_differences(text) == without_differences(committed)


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_arithmetic_is_noticed(browser, truth, tmp_path, fault):
    right, wrong, name = FAULTS[fault]
    folder = shutil.copytree(PAGE, tmp_path / "page")
    script = folder / "arithmetic.js"
    text = script.read_text(encoding="utf-8")
    assert text.count(right) == 1, right
    script.write_text(text.replace(right, wrong), encoding="utf-8")
    page = open_page(browser, folder)
    ours = numbers_of_page(page, SETTINGS[name])
    close(page)
    found = differences(ours, truth(name), SETTINGS[name]["depth"])
    assert max(error for _, _, error in found) > limit()


TRAIN = """(settings) => {
  const trainer = arithmetic().newTrainer(settings, 0.1, DIGITS);
  const kernels = () => trainer.layers.map((layer) => [...layer.kernel]);
  const start = kernels();
  const batches = Array.from({ length: 20 }, () => trainer.nextBatch());
  const losses = batches.map((batch) => trainer.step(batch));
  const accuracy = trainer.accuracy();
  return { start, batches, losses, end: kernels(), accuracy, digits: DIGITS };
}"""


@pytest.mark.parametrize("residual", [False, True])
def test_training_is_that_of_keras(browser, residual):
    """From the same kernels, on the same batches: the same losses and kernels."""
    settings = setting("gelu", "glorot_uniform", 4, 32, gain=1.5, residual=residual)
    page = open_page(browser)
    page_run = page.evaluate(TRAIN, settings | {"seed": 3})
    close(page)
    digits = page_run["digits"]
    images = np.array([ord(letter) - ord("a") for letter in digits["images"]], float)
    images = ((images - images.mean()) / images.std()).reshape(-1, 64).astype("float32")
    labels = np.array([int(digit) for digit in digits["labels"]])

    value = inputs = keras.Input((64,))
    for depth in range(4):
        part = layers.Dense(32, "gelu", use_bias=False)(value)
        value = layers.Add()([value, part]) if residual and depth else part
    model = keras.Model(inputs, layers.Dense(10, use_bias=False)(value))
    for kernel, values in zip(model.weights, page_run["start"], strict=True):
        kernel.assign(np.reshape(values, kernel.shape))
    model.compile(
        keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(True)
    )
    losses = [
        float(model.train_on_batch(images[batch], labels[batch]))
        for batch in page_run["batches"]
        if not model.reset_metrics()
    ]
    np.testing.assert_allclose(page_run["losses"], losses, rtol=1e-3)
    for kernel, values in zip(model.weights, page_run["end"], strict=True):
        expected = ops.convert_to_numpy(kernel)
        np.testing.assert_allclose(np.reshape(values, kernel.shape), expected, atol=1e-4)
    test = slice(digits["training"], None)
    scores = ops.convert_to_numpy(model(images[test]))
    assert page_run["accuracy"] == pytest.approx((scores.argmax(1) == labels[test]).mean())


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    text = (PAGE / "digits.js").read_text(encoding="utf-8")
    images, labels = (
        re.search(f'"{key}": "(.*?)"', text)[1] for key in ("images", "labels")
    )
    digits = datasets.load_digits()
    pixels = np.array([ord(letter) - ord("a") for letter in images]).reshape(-1, 64)
    np.testing.assert_array_equal(pixels, digits.data[:1000])
    np.testing.assert_array_equal([int(label) for label in labels], digits.target[:1000])


def test_gains_are_those_of_the_package(browser):
    page = open_page(browser)
    choices = page.evaluate("ACTIVATION_CHOICES")
    close(page)
    for name, choice in choices.items():
        expected = 1.0 if name == "selu" else calculate_gain(name)
        assert choice["gain"] == pytest.approx(expected, rel=1e-5), name


# ---- The page ---------------------------------------------------------------------------


def test_small():
    files = [file for file in PAGE.rglob("*") if file.suffix != ".py"]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 300_000


def test_from_the_keyboard(browser):
    page = open_page(browser)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the result"
    page.focus("#depth")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "document.getElementById('results').dataset.shown.includes('depth=11&')"
    )
    assert page.url.endswith(address(setting("tanh", "glorot_uniform", 11, 128)))
    assert page.locator("#numbers tbody tr").count() == 12
    page.focus("#initializer")
    page.keyboard.type("uni")
    page.wait_for_function("document.getElementById('verdict').dataset.level === 'bad'")
    assert "The signal vanishes" in page.inner_text("#verdict")
    close(page)


def test_a_link_brings_back_what_was_seen(browser):
    settings = setting("silu", "measured", 7, 32, gain=0.5, residual=True)
    page = open_page(browser, address=address(settings, seed=5))
    verdict = page.inner_text("#verdict")
    assert page.input_value("#activation") == "silu"
    assert page.is_checked("#residual")
    page.click("text=ReLU with Glorot")
    page.wait_for_function(
        "document.getElementById('results').dataset.shown.includes('relu')"
    )
    page.go_back()
    page.wait_for_function(
        "document.getElementById('results').dataset.shown.includes('silu')"
    )
    assert page.inner_text("#verdict") == verdict
    close(page)


def test_a_link_that_asks_for_too_much_says_so(browser):
    page = open_page(browser, address="#depth=999&activation=tanhh&colour=red&gain=")
    note = page.inner_text("#note")
    assert all(part in note for part in ("depth=999", "activation=tanhh", "colour=red"))
    assert page.input_value("#depth") == "10"
    close(page)


@pytest.mark.parametrize("text", ["0", "11", ""])
def test_a_wrong_gain_is_named_and_nothing_is_shown(browser, text):
    page = open_page(browser)
    page.fill("#gain", text)
    assert page.locator("#gain:invalid").count() == 1
    assert page.inner_text("#note") == "The gain must be a number from 0.01 to 10."
    page.focus("#depth")
    page.keyboard.press("ArrowRight")
    assert not page.is_visible("#verdict")
    assert not page.is_visible("#train")
    page.fill("#gain", "2")
    page.wait_for_selector("#verdict")
    assert not page.is_visible("#note")
    assert "depth=11&" in page.url
    assert "gain=2&" in page.url
    close(page)


def test_the_tour_teaches(browser):
    """Each stop ends in a verdict and a lesson, and several verdicts are good."""
    page = open_page(browser)
    levels, lessons = [], []
    for stop in page.locator("#tour a").all():
        stop.click()
        address = page.evaluate("location.hash")
        page.wait_for_function(
            "address => document.getElementById('results').dataset.shown === address",
            arg=address,
            timeout=60_000,
        )
        levels.append(page.get_attribute("#verdict", "data-level"))
        lessons.append(page.inner_text("#lesson"))
    assert levels.count("good") >= 4
    assert levels.count("bad") >= 4
    assert all(lessons)
    assert len(set(lessons)) == len(lessons)
    page.click("#new-seed")  # no stop of the tour
    page.wait_for_selector("#lesson", state="hidden")
    close(page)


LESSONS = """async () => {
  const runs = [];
  for (const [name, part, lesson] of TOUR) {
    const found = lesson.match(/([\\d.]+) % at rate ([\\d.]+\\d)/);
    if (!found) continue;
    const [settings, rate] = [{ ...defaults, ...part }, Number(found[2])];
    const trainer = arithmetic().newTrainer(settings, rate, DIGITS);
    for (let step = 0; step < STEPS; step++) trainer.step();
    runs.push([name, Number(found[1]), 100 * trainer.accuracy()]);
  }
  return runs;
}"""


def test_lessons_say_what_training_gives(browser):
    """Of 200 digits: a browser with another `Math.exp` may get some others right."""
    page = open_page(browser)
    page.set_default_timeout(0)
    runs = page.evaluate(LESSONS)
    close(page)
    assert [name for name, *_ in runs] == [
        "Glorot and tanh",
        "ReLU with Glorot",
        "ReLU with He",
        "ReLU, isometric",
    ]
    for name, said, trained in runs:
        assert trained == pytest.approx(said, abs=3), name


def test_trains_and_stops(browser):
    page = open_page(browser)
    page.click("#train")
    page.wait_for_function("document.querySelector('#training-status').textContent.startsWith('Done')",
                           timeout=60_000)  # fmt: skip
    accuracy = float(page.locator("#runs data").first.get_attribute("value"))
    assert accuracy > 0.8
    page.evaluate("location.hash = 'depth=100&width=256'")
    page.wait_for_function(
        "document.getElementById('results').dataset.shown.includes('depth=100&')"
    )
    page.click("#train")
    page.click("#stop")
    assert page.inner_text("#training-status").startswith("Stopped.")
    close(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_accessible(browser, width, scheme):
    """No violation of any rule of axe-core, nothing that must be scrolled sideways."""
    page = open_page(browser, width=width, scheme=scheme)
    page.click("#numbers summary")
    page.click("#train")
    page.wait_for_selector("#runs data")
    page.click("#stop")
    assert not [(each["id"], each["impact"], each["nodes"]) for each in violations(page)]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    close(page)
