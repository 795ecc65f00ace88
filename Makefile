# Everything a newcomer runs. Set-up happens by itself, in .venv, and is redone only when pyproject.toml has changed.
#
# Paths are relative, and tools are started as `python -m`, so the tree may lie anywhere, in a folder with spaces too.

# The Python to make .venv from; by default the first on PATH that is 3.11 or later.
PYTHON =
# Further arguments for pytest: make test ARGS="-k admission -x"
ARGS =
# The oracle: how many operations are compared with the running kernel, and from which seed (empty: a new one). The
# simulation: how many events.
N = 100000
SEED =
# Small worlds: how many acts deep they are searched.
DEPTH = 3
# Hostile input: how many messages.
MESSAGES = 200000
# Arm's rules: of the cases above, so many unless N is given (an emulated CPU takes its time).
ARM_CASES = 4000
# Foreign users of slots: how many random scenarios.
SCENARIOS = 300

venv_python = .venv/bin/python
pip_install = $(venv_python) -m pip install --quiet --disable-pip-version-check --no-input

.DEFAULT_GOAL := help
.PHONY: help demo test bench oracle silicon pokes vcpu vcpu-arm64 isolation simulate worlds mutants fuzz foreigners arm64 armhf hotplug setup setup-dev clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo      see hwbpd at work (as root: on the real debug registers)'
	@echo 'make test      behaviour, types, lint and layout; ARGS="-k admission" for a part'
	@echo 'make bench     latencies beside their floors: a bare echo, the bare system calls'
	@echo 'make oracle    compare admission with the running kernel: N=100000 SEED=7'
	@echo 'make silicon   compare the x86 register model with the CPU under it: N=20000 SEED=7'
	@echo 'make pokes     compare what a tracer sees of debug registers with the running kernel: N=10000 SEED=7'
	@echo 'make vcpu      compare the model of KVM with a real vCPU, through /dev/kvm: N=2000 SEED=7'
	@echo 'make vcpu-arm64  the breakpoints of an arm64 guest, on KVM under QEMU: N=300 SEED=7'
	@echo 'make isolation every world that a switch strategy of a hypervisor can come to, and what it breaks there'
	@echo 'make simulate  arbitration with everything going wrong: N=1000000 SEED=7'
	@echo 'make worlds    every history of a small world, so many acts deep: DEPTH=4'
	@echo 'make mutants   change the rules of the core, and see whether a test notices: N=100 SEED=7'
	@echo 'make fuzz      hostile input against a daemon: MESSAGES=200000 SEED=7'
	@echo 'make foreigners  culprits outside hwbpd, named or left unnamed, never wrongly: SCENARIOS=300 SEED=7'
	@echo 'make arm64     Arm'\''s rules against a real arm64 kernel, under QEMU: N=4000 SEED=7; ARGS=--tests for all tests'
	@echo 'make armhf     ARMv7'\''s rules against a 32-bit kernel, as far as QEMU carries: N=4000 SEED=7'
	@echo 'make hotplug   take a CPU offline and back under claims; disturbs whatever runs beside it'
	@echo 'make setup     only prepare .venv (setup-dev: with the tools for tests)'
	@echo 'make clean     remove .venv and what the tools have left'

demo: setup
	@$(venv_python) examples/demo.py

test: setup-dev
	@$(venv_python) -m pytest $(ARGS)

bench: setup-dev
	@$(venv_python) -m benchmarks $(ARGS)

oracle: setup-dev
	@$(venv_python) -m tests.judges.oracle --operations $(N) $(if $(SEED),--seed $(SEED))

silicon: setup-dev
	@$(venv_python) -m tests.judges.silicon --cases $(if $(filter file,$(origin N)),20000,$(N)) \
		$(if $(SEED),--seed $(SEED))

pokes: setup-dev
	@$(venv_python) -m tests.judges.pokes --sequences $(if $(filter file,$(origin N)),10000,$(N)) \
		$(if $(SEED),--seed $(SEED))

vcpu: setup-dev
	@$(venv_python) -m tests.judges.vcpu --sequences $(if $(filter file,$(origin N)),2000,$(N)) \
		$(if $(SEED),--seed $(SEED))

vcpu-arm64: setup-dev
	@$(venv_python) -m tests.judges.vcpu_arm64 --cases $(if $(filter file,$(origin N)),300,$(N)) \
		$(if $(SEED),--seed $(SEED))

isolation: setup-dev
	@PYTHONPATH=plugins $(venv_python) -m hwbpd_kvm.isolation $(ARGS)

simulate: setup-dev
	@$(venv_python) -m tests.simulation --events $(N) $(if $(SEED),--seed $(SEED))

worlds: setup-dev
	@$(venv_python) -m tests.worlds --depth $(DEPTH)

# Its tool brings a web server along, so it has an environment of its own.
mutants: setup-dev .make/mutants/installed
	@$(venv_python) -m tests.mutants --mutants $(if $(filter file,$(origin N)),100,$(N)) $(if $(SEED),--seed $(SEED)) \
		--cosmic-ray .make/mutants/bin/cosmic-ray

.make/mutants/installed: | .venv/made
	@$(venv_python) -m venv .make/mutants
	@.make/mutants/bin/python -m pip install --quiet --disable-pip-version-check --no-input 'cosmic-ray>=8.4'
	@touch $@

fuzz: setup-dev
	@$(venv_python) -m tests.fuzz --messages $(MESSAGES) $(if $(SEED),--seed $(SEED))

foreigners: setup-dev
	@$(venv_python) -m tests.judges.foreigners --scenarios $(SCENARIOS) $(if $(SEED),--seed $(SEED))

arm64 armhf: setup-dev
	@$(venv_python) -m tests.judges.arm64 --cases $(if $(filter file,$(origin N)),$(ARM_CASES),$(N)) \
		$(if $(SEED),--seed $(SEED)) $(if $(filter armhf,$@),--armhf) $(ARGS)

hotplug: setup-dev
	@$(venv_python) -m pytest -n0 -m hotplug tests/hardware/test_hotplug.py tests/hardware/test_daemon_hotplug.py $(ARGS)

setup: .venv/installed
	@:
setup-dev: .venv/installed-dev
	@:

.venv/installed: pyproject.toml .venv/made
	@echo 'installing hwbpd and what it needs'
	@$(pip_install) --editable .
	@touch $@

.venv/installed-dev: pyproject.toml .venv/made
	@echo 'installing hwbpd and what it and its tests need'
	@$(pip_install) --editable '.[dev]'
	@touch .venv/installed $@

# A version manager may put names on PATH that start nothing, so each candidate is tried, not only looked for.
.venv/made: .ci/make_venv.py
	@for python in $(if $(PYTHON),'$(PYTHON)',python3 python3.11 python3.12 python3.13 python3.14 /usr/bin/python3); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			"$$python" .ci/make_venv.py .venv && touch $@; exit; \
		fi; \
	done; \
	echo 'no Python 3.11 or later found; on Debian 12: apt-get install python3, or say make PYTHON=/path/to/python' >&2; \
	exit 1

clean:
	rm -rf .venv .make dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
