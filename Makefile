PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Most modules of the packages are never imported; those that are get compiled then.
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile

.PHONY: quickstart test test_all record targets lint docs golden benchmark clean

quickstart: $(VENV)/core.installed
	$(RUN) -m genai_jax.train --flagfile=experiments/quickstart/transformer.flags --workdir=runs/quickstart
	$(RUN) -m genai_jax.sample --workdir=runs/quickstart --prompt="The " --temperature=0.7 --max_tokens=400

test: $(VENV)/test.installed  ## without what is compiled for other chips and has not changed
	$(RUN) -m tests.unchanged || $(MAKE) targets
	$(RUN) -m pytest $(PYTEST_FLAGS)

test_all: $(VENV)/targets.installed  ## everything; records which of these groups passed
	$(RUN) -m pytest --record $(PYTEST_FLAGS)

record: $(VENV)/targets.installed  ## only these groups; records which of them passed
	$(RUN) -m pytest --record -m depends_on $(PYTEST_FLAGS)

targets: $(VENV)/targets.installed  ## compilers for TPUs and GPUs that are not here

lint: $(VENV)/test.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

docs: $(VENV)/docs.installed  ## the documentation as site/index.html; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet
	@echo "the documentation is in site/index.html"

golden: $(VENV)/test.installed  ## rewrites the golden files; read the diff before committing it
	$(RUN) -m tests.make_golden

benchmark: $(VENV)/test.installed
	$(RUN) -m benchmarks.train_step
	$(RUN) -m benchmarks.loss_memory
	$(RUN) -m benchmarks.compile_time
	$(RUN) -m benchmarks.solver_overhead
	$(RUN) -m benchmarks.dit
	$(RUN) -m benchmarks.population
	$(RUN) -m benchmarks.scaling_fit
	$(RUN) -m benchmarks.pictures
	$(RUN) -m benchmarks.mixer_step

$(VENV)/core.installed: setup.py pyproject.toml | $(VENV)
	$(PIP) -e .
	@touch $@

$(VENV)/test.installed: setup.py pyproject.toml | $(VENV)
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/core.installed

$(VENV)/docs.installed: setup.py pyproject.toml | $(VENV)
	$(PIP) -e ".[docs]"
	@touch $@ $(VENV)/core.installed

$(VENV)/targets.installed: $(VENV)/test.installed kernels_pallas/target_packages.py
	$(PIP) --no-deps --upgrade --target $(VENV)/targets $$($(RUN) -m kernels_pallas.target_packages)
	@touch $@

$(VENV):
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) runs build dist site *.egg-info .pytest_cache .ruff_cache
	@echo "the tests of all clones share their compiled programs: rm -rf $${XDG_CACHE_HOME:-~/.cache}/genai_jax/tests"
