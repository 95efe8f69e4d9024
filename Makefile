# Two commands do everything on a machine with Python 3.11, git and make: `make demo` and `make test`.

PYTHON ?= python3.11
TEST_WORKERS ?= 2
SINCE ?= main
VENV := .venv
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

SHELL := /bin/bash
# On a terminal pip shows what it does, with its own bars; a log gets a line.
PIP := -m pip$(shell test -t 2 || echo " --quiet --quiet")
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.DEFAULT_GOAL := help
VLLM_VENV := .venv-vllm
# The driver shows whether there is a GPU; `make vllm VLLM_BUILD=cpu` overrules it.
VLLM_BUILD ?= $(if $(wildcard /proc/driver/nvidia/version /dev/nvidiactl),cuda,cpu)
VLLM_LOCK := requirements-vllm$(if $(filter cuda,$(VLLM_BUILD)),-cuda).lock
VLLM_STAMP := $(VLLM_VENV)/.installed-$(VLLM_BUILD)
OTHER_VLLM_STAMP := $(VLLM_VENV)/.installed-$(if $(filter cuda,$(VLLM_BUILD)),cpu,cuda)
BENCH_VENV := .venv-bench
BENCH_STAMP := $(BENCH_VENV)/.installed

PROFILE ?= coco-qwen3vl-4b
OUT ?= benchmarks/results/gpu
DEADLINE ?= 460

# A name that is not there stops make before it builds an environment for minutes.
named = $(if $(wildcard $(1)/$(2).yaml),,$(error $(1)/$(2).yaml: no such file; there are: $(notdir $(basename $(wildcard $(1)/*.yaml)))))
ifneq ($(filter check-profile,$(MAKECMDGOALS)),)
$(call named,configs,$(PROFILE))
endif
ifneq ($(filter preset,$(MAKECMDGOALS)),)
$(call named,configs/presets,$(PRESET))
endif

.PHONY: help env dev locks demo test test-all quick changed-tests vllm test-vllm preset ablation experiments bench gpu-check check-profile smoke test-faults test-cuts checks docs report base trees real clean-resume

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

env: $(STAMP)  ## make .venv from requirements.lock (once)

# pip would compile on one core, and a third more: tests, and models that nobody here imports. Not an error: some packages
# ship templates that are no Python.
COMPILE = -m compileall -qq -j 0 -x '/tests?/|/transformers/models/.*/(modeling|modular|convert)_(?!auto|qwen)'

# Each file that pip takes must have a hash of the lock, which names all of them; torch, whose file the index decides, has none.
BY_HASH := install --no-deps --require-hashes

$(STAMP): requirements.lock requirements-torch.lock pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.lock into $(VENV) (minutes, once)"
	@$(VENV)/bin/python $(PIP) $(BY_HASH) --no-compile -r requirements.lock
	@$(VENV)/bin/python $(PIP) install --no-compile -r requirements-torch.lock
	@$(VENV)/bin/python $(COMPILE) $(VENV)/lib || true
	@$(VENV)/bin/python $(PIP) install --no-deps -e .
	@touch $@

# --no-deps: what they need is in requirements.lock, and the text encoder asks for a library that only downloads.
$(DEV_STAMP): $(STAMP) requirements-dev.lock
	@$(VENV)/bin/python $(PIP) $(BY_HASH) -r requirements-dev.lock
	@touch $@

LOCKS := requirements.lock requirements-dev.lock requirements-vllm.lock
locks:  ## look up the hashes of the versions that the locks name; needs uv (CONTRIBUTING.md, "Dependencies")
	for lock in $(LOCKS); do \
		sed -nE 's/^([^#= ]+==[^ ]+).*/\1/p' $$lock > $$lock.in && \
		uv pip compile --quiet --no-deps --generate-hashes --no-header --no-annotate --python-version 3.11 $$lock.in \
			| sed -E ':a;/\\$$/N;s/ *\\\n *(--hash)/ \1/;ta' > $$lock.hashed && \
		{ grep '^#' $$lock; cat $$lock.hashed; } > $$lock.new && mv $$lock.new $$lock; rm -f $$lock.in $$lock.hashed; \
	done

dev: $(DEV_STAMP)  ## the same, with what tests, checks and the documentation site need

demo: env  ## run the whole graph of the profile in params.yaml, then say where to look
	dvc repro
	@profile=$$(sed -nE 's/^profile: *([^ #]+).*/\1/p' params.yaml); \
	echo; \
	echo "report    reports/$$profile/progress.md"; \
	echo "pictures  reports/$$profile/gallery/"; \
	echo "metrics   dvc metrics show"; \
	echo "an A/B    dvc exp run -S softce_weight=0.2, then dvc metrics diff   (after: source .venv/bin/activate)"

# tests/conftest.py says which tests stay together, and which files come first.
SUITE := OMP_NUM_THREADS=1 pytest -n $(TEST_WORKERS) --dist loadscope --no-loadscope-reorder --durations=20

test: $(DEV_STAMP)  ## run the test-suite, and name its slowest twenty
	$(SUITE) -m "not vllm and not faults and not thorough"

test-all: $(DEV_STAMP)  ## the same, and runs in several processes, killed runs, more damaged files, and benchmarks at toy size
	$(SUITE) -m "not vllm and not faults"

quick: $(DEV_STAMP)  ## before a pull request, 90 seconds: lint, formatting, types, and the unit tests of what differs from main
	@$(MAKE) --no-print-directory --output-sync=target -j2 checks changed-tests

changed-tests: $(DEV_STAMP)  ## the unit tests of what differs from SINCE=main, nearest first, for a minute
	OMP_NUM_THREADS=1 PYTHONPATH=src python tests/changed.py --since $(SINCE)

vllm: $(VLLM_STAMP)  ## make .venv-vllm, the environment of the vLLM server: CUDA build with a driver, else CPU (once; GBs)
	@echo "$(VLLM_VENV) holds the $(VLLM_BUILD) build of vLLM ($(VLLM_LOCK))"

# CPU: --no-deps, because vLLM also asks for torchaudio and torchcodec, which break transformers beside a CPU torch.
$(VLLM_STAMP): $(VLLM_LOCK) requirements-torch.lock
	@echo "installing $(VLLM_LOCK) into $(VLLM_VENV): the $(VLLM_BUILD) build of vLLM (minutes, once)"
	@if test -e $(OTHER_VLLM_STAMP); then rm -rf $(VLLM_VENV); fi
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@$(VLLM_VENV)/bin/python $(PIP) $(if $(filter cpu,$(VLLM_BUILD)),$(BY_HASH),install) --no-compile -r $(VLLM_LOCK)
	@$(if $(filter cpu,$(VLLM_BUILD)),$(VLLM_VENV)/bin/python $(PIP) install --no-compile --no-deps -r requirements-torch.lock)
	@$(VLLM_VENV)/bin/python $(COMPILE) $(VLLM_VENV)/lib || true
	@touch $@

test-vllm: $(DEV_STAMP) vllm  ## test the vLLM engine against real servers
	OMP_NUM_THREADS=1 pytest --durations=20 -m "vllm and not faults" tests/rollout

smoke: $(DEV_STAMP)  ## run the graph of the smoke profile in a temporary clone
	OMP_NUM_THREADS=1 pytest tests/graph/test_smoke.py

# What one campaign found is kept: one that its BUDGET (seconds) cut goes on.
test-faults: $(DEV_STAMP)  ## hit each stage at every operation on files, kill the graph at 20 places, parse answers by the thousand, into reports/faults.md (an hour and a half; BUDGET=600, FAULTS="--stages pack", POINTS="0 19")
	PYTHONPATH=src:.:tests OMP_NUM_THREADS=1 python -m fault_lab --jobs $(TEST_WORKERS) --results .resume/faults --report reports/faults.md \
		$(if $(BUDGET),--budget $(BUDGET)) $(FAULTS)
	OMP_NUM_THREADS=1 FAULT_POINTS="$(POINTS)" pytest -s tests/graph/test_kill.py tests/infra/test_artefacts.py
	$(if $(POINTS),,OMP_NUM_THREADS=1 pytest -m faults tests/rollout tests/text)

test-cuts: $(DEV_STAMP)  ## change every key of params.yaml on the smoke profile: what runs again must come out different (ten minutes)
	OMP_NUM_THREADS=1 pytest -n $(TEST_WORKERS) tests/graph/test_cuts.py

checks: $(DEV_STAMP)  ## lint, formatting, types, and the words of the glossary
	ruff check
	ruff format --check
	mypy
	pytest -q tests/invariants/test_words.py

docs: $(DEV_STAMP)  ## build the documentation site into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=src mkdocs build --strict --quiet
	@echo "site/index.html"

report: env  ## rebuild the report from what the stages left, without running them
	dvc repro --single-item check
	dvc repro --single-item --force report

base: env  ## pretrain the embedded base model again (one to two hours) and put it into models/tiny-base
	cd pipelines/base && dvc repro
	rm -rf models/tiny-base && cp -rL pipelines/base/checkpoint models/tiny-base
	PYTHONPATH=src python -m coordexp.cli doctor --pin --profile tiny
	PYTHONPATH=src python -m coordexp.cli doctor --pin --profile smoke

preset: env  ## run the graph under a named recipe of configs/presets: make preset PRESET=mixture
	dvc exp run $$(PYTHONPATH=src python -m coordexp.config.presets $(PRESET))

ablation: env  ## train and compare the recipes of the objective, into reports/answers/objective.md (hours; resumable; ARGS="--seeds 1 --arm pure_ce")
	PYTHONPATH=src python -m coordexp.cli answer objective $(ARGS)

experiments: env  ## the experiments of all commits: what changed, difference of mAP, verdict, cost (ARGS="--all")
	PYTHONPATH=src python -m coordexp.cli runs $(ARGS)

# The project's environment and what is only measured against, which must not get into it.
$(BENCH_STAMP): $(DEV_STAMP) benchmarks/requirements.txt
	$(VENV)/bin/python -m venv --without-pip $(BENCH_VENV)
	@echo "import site; site.addsitedir('$$($(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> $$($(BENCH_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	@$(VENV)/bin/python $(PIP) --python $(BENCH_VENV) install --no-deps -r benchmarks/requirements.txt
	@touch $@

bench: $(BENCH_STAMP)  ## measure speed, growth and memory side by side, 20 minutes (BENCH="startup ..." for some, BENCH=--help for their minutes)
	PYTHONPATH=src $(BENCH_VENV)/bin/python -m benchmarks $(BENCH)

# Not of `env`: it runs in whatever environment a GPU machine has, .venv if that is there.
gpu-check:  ## check a machine with a GPU, into OUT within DEADLINE seconds (ARGS="--only step-2b"; ARGS=--cpu without one)
	PYTHONPATH=src:.$${PYTHONPATH:+:$$PYTHONPATH} PYTHONUNBUFFERED=1 \
		python -m benchmarks.gpu_check --out $(OUT) --deadline $(DEADLINE) $(ARGS)

check-profile: env  ## try PROFILE=... on 16 images of its data with a shrunken model, and print the plan of the run
	PYTHONPATH=src python -m pipelines.check_profile --profile $(PROFILE)

trees: env  ## fetch annotated aerial photos (21 MB) and cut them into tiles, for the profile trees (docs/real_data.md)
	PYTHONPATH=src python -m pipelines.fetch trees

real: env  ## fetch COCO val2017 (1.1 GB, resumes), for the profile coco-val2017 (docs/real_data.md)
	PYTHONPATH=src python -m pipelines.fetch coco-val2017

clean-resume:  ## forget interrupted runs: the next one starts at step 0
	rm -rf .resume
