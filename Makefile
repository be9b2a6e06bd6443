# make demo   install, convert the embedded digits, train, evaluate, report
# make test   install, run the tests

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/digits-alexnet.yaml
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo test lint clean

install: $(VENV)/installed

# uv installs the same packages from the same place in a fifth of pip's time; pip takes over where uv cannot be had
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard setup.py dist_train/*.c)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv || true
	if test -x $(BIN)/uv; then $(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -e '.[dev]'; \
	else $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'; fi
	touch $@

demo: install
	test -f shards/digits/index.json || dist-train shard datasets/digits.yaml
	rm -rf runs/digits-alexnet
	accelerate launch --config_file accelerate_config.yaml -m dist_train.train --config $(RECIPE)
	dist-train eval runs/digits-alexnet --split test
	dist-train report runs/digits-alexnet

test: install
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info runs
