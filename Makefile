# Two commands are all a fresh machine needs: `make demo` and `make test`. Everything lives in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BUNDLE := artifacts/smollm2-135m

.PHONY: setup demo test lint types check stress stress-server docs pictures bench bench-server bench-peers bench-finetune compat compat-kinds \
	fuzz kill kill-finetune schemathesis sweep end-to-end clean

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 setup" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

$(BUNDLE)/manifest.json: | $(STAMP)
	$(BIN)/llm-export smollm2 -o $(BUNDLE)

demo: setup $(BUNDLE)/manifest.json
	@echo
	@echo "> Why is the sky blue?"
	@$(BIN)/llm-chat $(BUNDLE) --temperature 0 --max-tokens 150 --ask "Why is the sky blue?"
	@echo
	@echo "Open the chat with:  $(BIN)/llm-chat"

# Two processes share two cores: a thread of one that waits must not spin where the other could compute.
# Without --max-worker-restart 0, pytest-xdist 3.8 waits forever after a test has crashed its process.
test: export OMP_WAIT_POLICY := passive
test: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

check: lint types test

# An engine with 16 callers while every call of its steps fails at random: make stress [SEED=1]
stress: setup
	$(BIN)/python tests/stress/run.py $(SEED)

# llm-serve and clients that leave, never read, never finish a request, or send too much
stress-server: setup
	$(BIN)/python tests/stress/server.py

docs: setup
	$(BIN)/python docs/sampling.py > docs/sampling.md
	$(BIN)/python docs/families_page.py

pictures: setup $(BUNDLE)/manifest.json
	$(BIN)/python docs/screenshots.py $(BUNDLE) docs/pictures
	$(BIN)/python docs/web_screenshots.py $(BUNDLE) docs/pictures

bench: setup $(BUNDLE)/manifest.json
	$(BIN)/llm-bench $(BUNDLE)

bench-server: setup $(BUNDLE)/manifest.json
	$(BIN)/python -m llm_edge.bench.server $(BUNDLE) --llama-server --drift 10

bench-peers: setup $(BUNDLE)/manifest.json
	$(BIN)/python -m llm_edge.bench.peers.run $(BUNDLE) $(BUNDLES) $(SOURCES:%=--source %) --markdown .peers/results.md

bench-finetune: setup
	$(BIN)/python -m llm_edge.bench.finetune

compat: setup $(BUNDLE)/manifest.json
	$(BIN)/python compat/run.py $(BUNDLE)

# Which other runtimes run a tiny model of each architecture: make compat-kinds [KINDS="lfm2 gpt_oss"]
compat-kinds: setup
	$(BIN)/python compat/kinds.py $(KINDS)

# Hostile and damaged input of every kind, with limits on time and memory: make fuzz [SEED=1]
fuzz: setup
	$(BIN)/python tests/fuzz/run.py $(SEED)

# Kills exports at 60 random moments: make kill [SEED=1]
kill: setup
	$(BIN)/python tests/fuzz/kill.py $(SEED)

# Kills a fine-tuning run at 30 random lines and resumes it: make kill-finetune [SEED=1]
kill-finetune: setup
	PYTHONPATH=tests/support $(BIN)/python tests/support/tiny_training.py $$(mktemp -d) $(or $(SEED),1) 30

# Sends 5,000 requests made from the OpenAPI document of llm-serve: make schemathesis [SEED=n]
schemathesis: setup
	$(BIN)/python tests/schemathesis/run.py $(SEED)

# Exports a tiny model of every causal language model in transformers and compares it: make sweep [KINDS="lfm2 bamba"]
sweep: setup
	$(BIN)/python tests/sweep/run.py $(KINDS)

# Exports tiny models of twelve kinds to int8 and int4, and talks to them: make end-to-end [KINDS="lfm2 gpt_oss"]
end-to-end: setup
	$(BIN)/python tests/sweep/end_to_end.py $(KINDS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
