# Every target makes the environment it needs; `make test` and `make demo` are the two
# to know. Versions are pinned in requirements/.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
# What an installation is made from: when it changes, the native kernel is built again.
PACKAGE := pyproject.toml setup.py keras_glorot/_native.c
DOCS := .venv-docs
PYTEST := -m pytest -p no:cacheprovider
export TF_CPP_MIN_LOG_LEVEL ?= 3
# Warnings of pip about its own version or indexes tell a user nothing.
PIP := -m pip install --quiet --disable-pip-version-check

.PHONY: test test-all slow jax torch oldest lint format demo docs browser bench pins clean

test: $(VENV)/test
	KERAS_BACKEND=tensorflow $(VENV)/bin/python $(PYTEST) -m "not slow"

# What `make test` leaves out.
test-all: lint jax torch slow oldest

jax torch: $(VENV)/all
	KERAS_BACKEND=$@ $(VENV)/bin/python $(PYTEST) -m "not slow"

slow: $(VENV)/all $(OLDEST)/all docs browser
	KERAS_BACKEND=tensorflow KERAS_GLOROT_OTHER_PYTHON=$(OLDEST)/bin/python \
		$(VENV)/bin/python $(PYTEST) -m slow
	KERAS_BACKEND=torch $(VENV)/bin/python $(PYTEST) -m slow tests/test_explorable.py

# The tests of pages need one. Without it, or without root to install it, they are skipped.
browser:
	@command -v chromium google-chrome >/dev/null || \
		{ apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
		echo "Install chromium to run the tests of pages."

# The documentation, in site/. A broken link or reference is an error.
docs: $(DOCS)/all
	$(DOCS)/bin/python -m mkdocs build --strict --quiet

oldest: $(OLDEST)/all
	KERAS_BACKEND=tensorflow $(OLDEST)/bin/python $(PYTEST) -m "not slow"
	KERAS_BACKEND=jax $(OLDEST)/bin/python $(PYTEST) -m "not slow"

lint: $(VENV)/all
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/all
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: $(VENV)/test
	KERAS_BACKEND=tensorflow $(VENV)/bin/python benchmarks/demo.py

# Renews the pins from requirements/*.in; commit the result.
pins:
	for name in test all oldest docs; do \
		$(PYTHON) -m venv --clear .venv-pins && \
		.venv-pins/bin/python $(PIP) -r requirements/$$name.in && \
		.venv-pins/bin/python -m pip freeze --all --exclude pip | sed 's/+cpu$$//' > requirements/$$name.txt; \
	done; rm -rf .venv-pins

clean:
	rm -rf $(VENV) $(OLDEST) $(DOCS) site

$(VENV)/test: requirements/test.txt $(PACKAGE)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python $(PIP) -r requirements/test.txt
	$(VENV)/bin/python $(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/all: $(VENV)/test requirements/all.txt
	$(VENV)/bin/python $(PIP) -r requirements/all.txt
	touch $@

$(OLDEST)/all: requirements/oldest.txt $(PACKAGE)
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -r requirements/oldest.txt
	$(OLDEST)/bin/python $(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(DOCS)/all: requirements/docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python $(PIP) -r requirements/docs.txt
	touch $@
