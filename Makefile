# Two commands do everything on a machine with Python 3.11 or newer and make: `make quickstart` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
TINY := runs/tiny-base

.PHONY: quickstart test vqav2-data tiny-base clean

# Fine-tune the tiny base on generated scenes, merge, evaluate base, adapter and merged: no network, no GPU.
quickstart: .venv/.installed
	rm -rf $(RUN)
	$(BIN)/python -m data.shapes --output $(RUN)/data --split train2014 --scenes 4000 --seed 1
	$(BIN)/python -m data.shapes --output $(RUN)/data --split val2014 --scenes 300 --seed 2
	$(BIN)/python train.py configs/quickstart.yaml
	$(BIN)/python merge_lora.py $(RUN)/adapter --output $(RUN)/merged --dtype float32
	$(BIN)/python evaluate.py configs/quickstart.yaml

# VQAv2's official files, and of COCO's pictures those that configs/vqav2_8gb.yaml draws; resumable.
vqav2-data: .venv/.installed
	$(BIN)/python -m recipes.fetch_vqav2 --output downloads/vqav2 --fraction 0.1 --seed 0 --validation 5000

# Lint, types, tests.
test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/pytest -n 2

# How assets/tiny-base was made.
tiny-base: .venv/.installed
	rm -rf $(TINY)
	$(BIN)/python -m assets.tokenizer --output assets/tiny-base
	$(BIN)/python -m data.shapes --output $(TINY)/data --split train2014 --scenes 10000 --seed 1000
	$(BIN)/python train.py configs/tiny_base.yaml
	cp $(TINY)/model/model.safetensors assets/tiny-base/

clean:
	rm -rf .venv runs

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
