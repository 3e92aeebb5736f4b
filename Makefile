# The vocabulary of this repository. `make demo` and `make test` set up all they need in .venv.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help install demo test drills soak lab check export docs bench bench-drift bench-packaging loop clean
RUN := . .venv/bin/activate &&
export DVC_NO_ANALYTICS := 1
# .venv is ours: Python keeps the bytecode there, or each of the many processes below would compile a million lines again
unexport PYTHONDONTWRITEBYTECODE

help:      ## this list
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

install: .venv/.installed  ## the environment, complete, in .venv
.venv/.installed: requirements.lock pyproject.toml tools/install.sh
	@PYTHON='$(PYTHON)' sh tools/install.sh

demo: .venv/.installed  ## from this clone to a registered model, with its reports and its card
	@$(RUN) dvc repro && mlops-nb registry card && mlops-nb summary

loop: demo  ## a year of flights through the whole loop, with the loop and without: some minutes
	@$(RUN) mlops-nb loop

test: .venv/.installed  ## everything quick: gates, notebooks, tests; ends in one line of counts
	@$(RUN) python tools/test.py

drills: .venv/.installed  ## everything long: fresh clones, long simulations, soaks
	@$(RUN) pytest -q -p no:cacheprovider -n 2 --dist loadfile -m "drill and not soak" --durations 25 tests/repo tests/faults tests/code tests/model

soak: .venv/.installed  ## what takes longest: the loop with retraining, the API server killed in every state, versions brought back
	@$(RUN) pytest -q -p no:cacheprovider -n 2 --dist loadfile -m soak --durations 25 tests/repo tests/faults tests/code

check: .venv/.installed  ## only the gates: exports in sync, notebooks clean, README current, ruff
	@$(RUN) python tools/test.py --gates

lab: .venv/.installed  ## JupyterLab on the notebooks
	@$(RUN) jupyter lab nbs/index.ipynb

export: .venv/.installed  ## notebooks to modules, README, the measures' page and the dependencies in dvc.yaml
	@$(RUN) nbdev_export && nbdev_clean && python tools/readme.py && python tools/measures.py && python tools/dvc_deps.py

docs: .venv/.installed  ## the site of notebooks, modules, runbooks, in _docs/html
	@$(RUN) python tools/docs.py

bench-drift: .venv/.installed  ## drift and validation beside their peers
	@$(RUN) python benchmarks/drift.py && python benchmarks/validation.py

bench-packaging: .venv/.installed
	@$(RUN) python benchmarks/bundles.py

bench-%: .venv/.installed
	@$(RUN) python benchmarks/$*.py

bench: .venv/.installed  ## all measurements of benchmarks/; bench-NAME for one
	@$(RUN) for b in benchmarks/*.py; do [ $$b = benchmarks/common.py ] || python $$b || exit 1; done

clean:     ## remove what can be made again, except the environment and the project's state
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis _docs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
