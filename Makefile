# Two commands do all the set-up they need:  make demo   and   make test
#
#   make demo    the main job on this machine's CPU: real Ray, vLLM and FSDP2, real images; it learns in minutes
#   make test    lint, types, unit and integration tests
#   make unit    the unit tests alone
#   make slow    tests that take a quarter of an hour more: runs that are stopped, a run over three hosts, vLLM's server
#   make slow-slurm   a run over two hosts of a real Slurm, preempted: root, Debian, five minutes
#   make faults  everything that may be lost is lost, in real runs: the table of docs/faults.md, 50 minutes
#   make long    the same kinds of stops at more moments, half an hour
#   make bench   all benchmarks, an hour on a quiet machine; EXTRAS=cpu,dev,bench brings TRL (docs/performance.md)
#   make bench-switches   which settings help, two data sets, hours; it may be stopped and goes on (docs/switches.md)
#   make bench-classifier   what probabilities, votes and second looks are worth, 3.5 hours; it, too, goes on
#   make gpu-test   checks of a machine's GPUs, a quarter of an hour for one (estimated); TIER="learner" for some (docs/gpus.md)
#   make setup   the environment in .venv alone (EXTRAS=gpu,dev for a GPU machine)
#   make lock    the versions of all packages anew, after a change of pyproject.toml: deploy/locks/
#   make image   a container image for CPUs, built without Docker, and a run of 4 steps in it: root, Debian
#   make bare-test   both commands on a bare Debian, without compiler, headers or libraries (deploy/bare_test.sh)

# A Python of your choice; left out, one that fits is looked for.
PYTHON ?=
comma := ,
# The checks of a GPU need its packages: those for CPUs would replace them in .venv, and find no GPU.
ON_GPU := $(and $(filter gpu-test,$(MAKECMDGOALS)),$(shell command -v nvidia-smi 2>/dev/null))
EXTRAS ?= $(if $(ON_GPU),gpu,cpu)$(comma)dev
SEED ?= 0
BIN := .venv/bin
READY := .venv/ready-$(subst $(comma),-,$(EXTRAS))
BENCHMARKS := bench-trl bench-digits bench-generation bench-forward bench-transfer bench-overlap bench-controller \
	bench-checkpoints bench-losses bench-report-page bench-watching
# Intel's OpenMP runtime comes with the CPU build of vLLM; without it the same batch took 1 to 20 times as long.
# By its name: the loader takes a space in LD_PRELOAD, as in the name of this folder, for the next path.
OPENMP = $$(cd .venv/lib && ls libiomp5.so 2>/dev/null) LD_LIBRARY_PATH="$(CURDIR)/.venv/lib$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}"

# Bytecode is kept, or each process of a test would compile the package anew.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test unit slow slow-slurm long faults gpu-test lint setup lock image bare-test clean $(BENCHMARKS) bench bench-report \
	bench-switches bench-classifier
.DEFAULT_GOAL := help

help:
	@sed -n 's/^#  *\(make .*\)/\1/p' Makefile

setup: $(READY)

$(READY): pyproject.toml $(wildcard deploy/*.py deploy/locks/*.txt) deploy/install.sh
	@PYTHON="$(PYTHON)" EXTRAS="$(EXTRAS)" bash deploy/install.sh
	@touch "$@"

demo: setup
	$(BIN)/python -m rft_cluster.launch --config digits run.seed=$(SEED) run.name=digits-$$(date +%Y%m%d-%H%M%S)

# Apart: vLLM's in-process engines leave a process group behind in the integration tests' process.
test: setup lint unit
	LD_PRELOAD=$(OPENMP) $(BIN)/python -m pytest tests/integration

# A file's tests share its fixtures, so they stay in one process. Two processes a core: some tests wait for a time limit.
# pytest's capture of log records visits every logger six times a test, which took a tenth of the time.
unit: setup
	$(BIN)/python -m pytest tests/unit -n $$((2 * $$(nproc) > 8 ? 8 : 2 * $$(nproc))) --dist loadfile -p no:logging

slow: setup
	LD_PRELOAD=$(OPENMP) $(BIN)/python -m pytest tests/integration tests/faults -m "slow and not long"

slow-slurm: setup
	LD_PRELOAD=$(OPENMP) $(BIN)/python -m pytest tests/slurm -m slow -rP

long: setup
	LD_PRELOAD=$(OPENMP) $(BIN)/python -m pytest tests/integration tests/faults -m long

faults: setup
	rm -f runs/faults.jsonl
	LD_PRELOAD=$(OPENMP) $(BIN)/python -m pytest tests/faults -m "faults and not long"

bench: $(BENCHMARKS) bench-report

bench-trl: setup
	LD_PRELOAD=$(OPENMP) $(BIN)/python -m benchmarks.gate
	$(BIN)/python -m benchmarks.speed

bench-digits: setup
	$(BIN)/python -m benchmarks.digits

bench-generation: setup
	$(BIN)/python -m benchmarks.generation

bench-switches: setup
	$(BIN)/python -m benchmarks.switches

bench-classifier: setup
	$(BIN)/python -m benchmarks.classifier

bench-forward: setup
	LD_PRELOAD=$(OPENMP) $(BIN)/python -m benchmarks.learner_forward

bench-transfer: setup
	$(BIN)/python -m benchmarks.weight_transfer

bench-overlap: setup
	$(BIN)/python -m benchmarks.roles --parts overlap

bench-controller: setup
	$(BIN)/python -m benchmarks.roles --parts controller

bench-report-page: setup
	$(BIN)/python -m benchmarks.report_page

bench-losses: setup
	$(BIN)/python -m benchmarks.losses

bench-watching: setup
	$(BIN)/python -m benchmarks.watching

bench-checkpoints: setup
	LD_PRELOAD=$(OPENMP) $(BIN)/python -m benchmarks.checkpoints

bench-report: setup
	$(BIN)/python -m benchmarks.report

TIER ?=
gpu-test: setup
	$(BIN)/python -m benchmarks.gpu_check $(if $(TIER),--tier $(TIER))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p rft_cluster -p benchmarks -m tests.faults.crashing # whose part of the run no other test calls

# Needs the first half of setup only: where setup fails for a version that a source lacks, this is the cure.
lock:
	$(BIN)/python deploy/install_packages.py --lock

image:
	bash deploy/docker/make_image.sh

bare-test:
	bash deploy/bare_test.sh

clean:
	rm -rf .venv runs
