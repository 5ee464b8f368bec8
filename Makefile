# Every target makes its own .venv when it is missing. `make demo` and `make test` are all a newcomer needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HARNESS := $(VENV)/harness
BROWSER := $(VENV)/.browser
# Two workers suit two cores; `make test WORKERS=8` on a larger machine.
WORKERS ?= 2
ROOMS := kernels model engine rlhf evals tools samples

.PHONY: setup demo demo-lora test test-gpu mutate-rlhf modules lint bench-train bench-generate bench-eval bench-serve bench-ppo bench-kernels tune-kernels clean

setup: $(READY) $(BROWSER)

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[data,logs,eval,serve,dev]'
	touch $(READY)

# For the test of the chat page, which is skipped without.
$(BROWSER): $(READY)
	-$(BIN)/python -m tests.browser
	touch $(BROWSER)

# For one test, in a folder that nothing else sees.
$(HARNESS)/.ready: tests/engine/serving/harness.txt $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(HARNESS) --requirement $<
	touch $@

demo: $(READY)
	$(BIN)/python tools/demo.py

# And then each stage with adapters of rank 8, beside what training all weights has brought.
demo-lora: $(READY)
	$(BIN)/python tools/demo.py --lora

test: $(READY) $(BROWSER) $(HARNESS)/.ready
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 15 tests

# The kernels' own tests too: on a GPU they run compiled, and in bf16. One process, for one GPU.
test-gpu: $(READY)
	$(BIN)/pytest tests/gpu tests/kernels tests/engine/test_training_curve.py

# Breaks the details of docs/rlhf-details.md in a copy of the tree, one at a time: a test must notice each.
mutate-rlhf: $(READY)
	$(BIN)/python tests/mutate_rlhf.py

# Writes docs/modules.md, which a test compares with the files.
modules: $(READY)
	$(BIN)/python -m tests.house

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(ROOMS)

bench-train: $(READY)
	$(BIN)/python tools/bench_train.py

bench-generate: $(READY)
	$(BIN)/python tools/bench_generate.py

# `make bench-eval DATA=DIR` asks CMMLU's own questions; without, questions are made up.
bench-eval: $(READY)
	$(BIN)/python tools/bench_eval.py $(if $(DATA),--data $(DATA))

# Against TRL where it is installed; it says how to get it, or do without.
bench-ppo: $(READY)
	$(BIN)/python tools/bench_ppo.py

# 64 clients for two minutes, of the model that `make demo` leaves; MODEL=DIR takes another.
bench-serve: $(READY)
	$(BIN)/python tools/bench_serve.py $(if $(MODEL),--model $(MODEL))

bench-kernels: $(READY)
	$(BIN)/python tools/bench_kernels.py

tune-kernels: $(READY)
	$(BIN)/python tools/tune_kernels.py

clean:
	rm -rf $(VENV) ckpt build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
