# Two commands do everything on a machine with Python 3.11 or newer and make: `make quickstart` and `make test`.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/quickstart
TINY := runs/tiny-base
STUDY := runs/connectors
MIXTURE := runs/mixture
ANSWERS := runs/answers
PREFERENCES := runs/preferences
REWARDS := runs/rewards
NUMERICAL := adapters/test_storage adapters/test_merge evaluation/test_evaluate lora/test_linear lora/test_nf4 model \
	preflight system/test_distributed training/test_trainer test_benchmarks

.PHONY: quickstart test test-browser pictures test-machines test-transformers-4 fuzz vqav2 vqav2-data tiny-base connectors mixture answers preferences rewards clean

# Fine-tune the tiny base on generated scenes, merge, evaluate base, adapter and merged: no network, no GPU.
# Interrupted, the same command resumes; `make clean` deletes the run.
quickstart: .venv/.installed
	$(BIN)/python -m data.synthetic.scenes --output $(RUN)/data --split train2014 --scenes 4000 --seed 1
	$(BIN)/python -m data.synthetic.scenes --output $(RUN)/data --split val2014 --scenes 300 --seed 2
	$(BIN)/python train.py configs/quickstart.yaml
	$(BIN)/python merge_lora.py $(RUN)/adapter --output $(RUN)/merged --dtype float32 --force
	$(BIN)/python evaluate.py configs/quickstart.yaml

# The real run on a GPU: checks, downloads, trains, evaluates, and reports. Interrupted, the same command resumes.
# make vqav2 RUN_ARGS="configs/mine.yaml train.epochs=2" takes another configuration.
vqav2: .venv/.installed
	$(BIN)/python -m finetune.pipeline $(RUN_ARGS)

# VQAv2's official files, and those of COCO's images that configs/vqav2_8gb.yaml selects; resumable.
vqav2-data: .venv/.installed
	$(BIN)/python -m data.download.vqav2 --output downloads/vqav2 --fraction 0.1 --seed 0 --validation 5000

# Lint, types, tests. Each process has a half of the tests in their order, so that what tests share is made once, and the
# one that is done first takes some from the other.
test: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/pytest -n 2 --dist worksteal

# The report and the demo, clicked through in a Chromium (Debian: apt install chromium). `make test` does so too, where it
# finds one, but for the demo: gradio asks for an older pillow than the tests were run with, hence an environment apart.
test-browser: .venv-browser/.installed
	BROWSER_TESTS=required .venv-browser/bin/python -m pytest tests/browser tests/demo

# The pictures of the README, from the quickstart's result.
pictures: .venv-browser/.installed
	.venv-browser/bin/python -m docs.pictures

# What depends on rounding, as on other machines: with 1, 2 and 4 threads, each with the kernels that this CPU has, those
# of an x86 CPU with AVX2, and those of one without. Others ignore what names x86.
test-machines: .venv/.installed-dev
	@set -e; for threads in 1 2 4; do for cpu in "" avx2,AVX2,AVX2 default,SSE41,SSE4_2; do \
		echo "$$threads threads, kernels: $${cpu:-as they are}"; \
		IFS=,; set -- $$cpu; unset IFS; \
		env OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=$$threads MKL_NUM_THREADS=$$threads \
			$${cpu:+ATEN_CPU_CAPABILITY=$$1 ONEDNN_MAX_CPU_ISA=$$2 MKL_ENABLE_INSTRUCTIONS=$$3} \
			$(BIN)/pytest -n 2 $(wildcard $(patsubst %,tests/%.py,$(NUMERICAL)) $(patsubst %,tests/%,$(NUMERICAL))); \
	done; done

# Our files in transformers 4.57 and the PEFT of its time, theirs here. The package itself asks for transformers 5, so it
# is not installed there. Left out: an image of 1 x 1 pixels, whose three channels 4.57 takes for its width.
test-transformers-4: .venv-4/.installed
	.venv-4/bin/python -m pytest -n 2 $(patsubst %,tests/%.py,model/test_paligemma model/test_checkpoint model/test_generate \
		adapters/test_storage adapters/test_merge data/test_processor) \
		--deselect "tests/data/test_processor.py::test_pixels_are_the_librarys_bit_for_bit[size4]"

# Ten thousand corrupted adapters and checkpoints; `make test` tries 300.
fuzz: .venv/.installed-dev
	$(BIN)/python -m tests.fuzz --files 10000

# How assets/tiny-base was made.
tiny-base: .venv/.installed
	rm -rf $(TINY)
	$(BIN)/python -m assets.tokenizer --output assets/tiny-base
	$(BIN)/python -m data.synthetic.scenes --output $(TINY)/data --split train2014 --scenes 10000 --seed 1000
	$(BIN)/python train.py configs/tiny_base.yaml
	cp $(TINY)/model/model.safetensors assets/tiny-base/

# Which connector: seven of them, five seeds each, on hard scenes; writes the table in docs/connectors.md and
# docs/connectors.png. About 45 minutes on two cores. Interrupted, the same command resumes.
connectors: .venv/.installed
	$(BIN)/python -m data.synthetic.scenes --output $(STUDY)/pretraining --split train2014 --scenes 10000 --seed 11 --level hard
	$(BIN)/python -m data.synthetic.scenes --output $(STUDY)/data --split train2014 --scenes 1500 --seed 12 --level hard
	$(BIN)/python -m data.synthetic.scenes --output $(STUDY)/data --split val2014 --scenes 150 --seed 13 --level hard
	$(BIN)/python train.py configs/connectors/base.yaml
	$(BIN)/python -m benchmarks.connectors

# What is kept of captioning when questions are learned, alone and in a mixture; writes the table in docs/mixtures.md. About
# 10 minutes on two cores. Interrupted, the same command resumes.
mixture: .venv/.installed-dev
	$(BIN)/python -m data.synthetic.scenes --output $(MIXTURE)/data --split train2014 --scenes 4000 --seed 1
	$(BIN)/python -m data.synthetic.scenes --output $(MIXTURE)/data --split val2014 --scenes 300 --seed 2
	$(BIN)/python -m benchmarks.mixture

# Which answers of a question to learn from: three arms, five seeds each, on scenes whose annotators disagree; writes the
# table in docs/answers.md and docs/answers.png. Interrupted, the same command resumes.
answers: .venv/.installed
	$(BIN)/python -m data.synthetic.scenes --output $(ANSWERS)/data --split train2014 --scenes 700 --seed 21 --dissent 6
	$(BIN)/python -m data.synthetic.scenes --output $(ANSWERS)/data --split val2014 --scenes 150 --seed 22 --dissent 6
	$(BIN)/python -m benchmarks.answers

# A network that answers in one word learns from pairs of its own answers to answer in a sentence: three arms, three seeds
# each; writes the table in docs/alignment.md and docs/preferences.png. Interrupted, the same command resumes.
preferences: .venv/.installed
	$(BIN)/python -m data.synthetic.scenes --output $(PREFERENCES)/data --split train2014 --scenes 2000 --seed 31
	$(BIN)/python -m data.synthetic.scenes --output $(PREFERENCES)/data --split val2014 --scenes 150 --seed 32
	$(BIN)/python -m benchmarks.preferences

# Official VQA accuracy raised by rewards, beside training that goes on as it began: two arms, five seeds each, on scenes
# whose annotators disagree; writes the table in docs/alignment.md and docs/rewards.png. Interrupted, the same command
# resumes.
rewards: .venv/.installed
	$(BIN)/python -m data.synthetic.scenes --output $(REWARDS)/data --split train2014 --scenes 700 --seed 41 --dissent 6
	$(BIN)/python -m data.synthetic.scenes --output $(REWARDS)/data --split val2014 --scenes 150 --seed 42 --dissent 6
	$(BIN)/python -m benchmarks.rewards

clean:
	rm -rf .venv .venv-4 .venv-browser runs

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-browser/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-browser
	grep -v '^pillow==' constraints.txt > .venv-browser/constraints.txt
	.venv-browser/bin/pip install --quiet --constraint .venv-browser/constraints.txt --editable ".[dev,demo]"
	touch $@

.venv-4/.installed: constraints.txt
	$(PYTHON) -m venv .venv-4
	grep -vE '^(transformers|peft|tokenizers|huggingface-hub|datasets)==' constraints.txt > .venv-4/constraints.txt
	.venv-4/bin/pip install --quiet --constraint .venv-4/constraints.txt transformers==4.57.6 peft==0.18.1 datasets==5.0.1 \
		torch accelerate pillow psutil pydantic rich pytest pytest-timeout pytest-xdist hypothesis
	touch $@
