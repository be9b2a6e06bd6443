# make demo   install, convert the embedded digits, train, evaluate, report
# make test   install, run the tests
# make study-demo   what early stopping, folds, schedules, BatchNorm, dropout, activations and optimizers do on a table
# make test-cluster   the tests on a real SLURM and on separate hosts; as root, it fetches their Debian packages
# make clean   removes what install made, but for the native core; shards/ and runs/ stay
# make gpu-check   everything that only a GPU can show, in under eight minutes, into benchmarks/results/<card>-<date>.json;
#                  with the way of CIFAR-10 to 94% where shards/cifar10 is there, and timm's loop where timm can be had

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV_INSTALL := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt
PIP_INSTALL := $(BIN)/pip install --quiet -c constraints.txt
export OUTER_PATH := $(PATH)
OUTER := PATH="$$OUTER_PATH" $(PYTHON)
IS_NEW := -c 'import sys; sys.exit(sys.version_info < (3, 11))'
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: install demo study-demo test test-cluster gpu-check lint clean

install: $(VENV)/installed

# uv installs the same packages from the same place in a fifth of pip's time; pip takes over where uv cannot be had
$(VENV)/installed: pyproject.toml constraints.txt $(wildcard setup.py dist_train/*.[ch])
	@test ! -e $(BIN) || { $(BIN)/python $(IS_NEW) 2> /dev/null; case $$? in 0) ;; 1) rm -rf $(VENV) ;; \
		*) echo "$(BIN)/python does not start: load the module it was made with, or make clean"; exit 2 ;; esac; }
	@test -e $(BIN) || $(OUTER) $(IS_NEW) || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/pip || $(BIN)/python -m ensurepip --default-pip > /dev/null 2>&1 || $(OUTER) -m venv --clear $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv || true
	if test -x $(BIN)/uv; then $(UV_INSTALL) -e '.[dev]'; else $(PIP_INSTALL) -e '.[dev]'; fi
	$(BIN)/python -m compileall -q dist_train  # where Python is told to write no bytecode, every start would compile anew
	touch $@

demo: install
	test -f shards/digits/index.json || dist-train shard datasets/digits.yaml
	rm -rf runs/digits-alexnet
	accelerate launch --config_file accelerate_config.yaml -m dist_train.train --config recipes/digits-alexnet.yaml
	dist-train eval runs/digits-alexnet --split test
	dist-train report runs/digits-alexnet

study-demo: install
	test -f shards/breast-cancer/index.json || dist-train shard datasets/breast-cancer.yaml
	rm -rf runs/mlp-study runs/mlp-study-base runs/mlp-study-best
	dist-train study recipes/mlp-study.yaml & other=$$!; dist-train study recipes/mlp-study.yaml && wait $$other
	dist-train train --config recipes/mlp-base.yaml --run runs/mlp-study-base
	dist-train train --config runs/mlp-study/best.yaml --run runs/mlp-study-best
	dist-train compare runs/mlp-study-base runs/mlp-study-best

test: install
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

# where the packages cannot be had, the tests say what is missing and are skipped
test-cluster: install
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && \
	  ! (PATH=$$PATH:/usr/sbin:/sbin; for p in slurmctld slurmd sbatch munged ip strace; do command -v $$p || exit 1; done) > /dev/null; then \
	  timeout 120 apt-get update -q > /dev/null; \
	  DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -q -y slurmctld slurmd slurm-client munge iproute2 strace > /dev/null; \
	fi || true
	$(BIN)/python -m pytest -q -rs -m cluster

# without timm and without a network to fetch it from, the check goes on and names its loop among what was left out
gpu-check: install
	$(BIN)/python -c 'import timm' 2> /dev/null || \
	  if test -x $(BIN)/uv; then timeout 120 $(UV_INSTALL) -e '.[bench]'; else timeout 120 $(PIP_INSTALL) -e '.[bench]'; fi || true
	$(BIN)/python benchmarks/gpu_check.py $(if $(wildcard shards/cifar10/index.json),--cifar10 shards/cifar10)

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
