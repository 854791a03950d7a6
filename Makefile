# make demo: build the demo's data, run every stage on it, print the results and draw explanations.
# make test: linter, type checker, all tests.   make test-fast: linter, and the tests that take about a minute in total.
# WORKERS processes run the tests; those of a file stay together, since they share what is slow to make.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
RUN = $(VENV)/bin/python
NODE_MODULES = $(if $(shell command -v npm 2> /dev/null),tests/browser/node_modules/.package-lock.json)
DEMO = DNCBM_CONFIG=examples/openmoji/config.py $(RUN)

.PHONY: demo test test-fast install clean

demo: $(VENV)/.installed
	$(RUN) examples/openmoji/build.py
	$(DEMO) scripts/run_pipeline.py --overwrite
	$(DEMO) scripts/07_train_linear_probe.py --overwrite --probe_on_features --probe_lr 1e-3
	$(DEMO) scripts/08_zero_shot.py --overwrite
	$(DEMO) scripts/10_accuracy_at_nec.py --overwrite --max_concepts 64
	$(DEMO) scripts/02_train_sae_img.py --overwrite --seed 50
	$(DEMO) scripts/02_train_sae_img.py --overwrite --seed 51
	$(DEMO) scripts/14_seed_stability.py --overwrite --seed 49
	$(DEMO) scripts/04_assign_names.py --overwrite --seed 50
	$(DEMO) scripts/06_save_concept_strengths.py --overwrite --seed 50
	$(DEMO) scripts/05_save_probe_features.py --overwrite --probe_dataset openmoji_outlines
	$(DEMO) scripts/06_save_concept_strengths.py --overwrite --probe_dataset openmoji_outlines
	$(DEMO) examples/openmoji/summarise.py
	$(DEMO) examples/openmoji/name_truth.py
	$(DEMO) examples/openmoji/explain.py
	$(DEMO) scripts/15_report.py --seed 49
	$(DEMO) scripts/11_export_model.py --overwrite --license cc-by-sa-4.0 --output examples/openmoji/run/model
	$(DEMO) scripts/16_browse.py --overwrite --seed 49 --beside seed=50

test: $(VENV)/.installed $(NODE_MODULES)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(VENV)/.installed $(NODE_MODULES)
	$(RUN) -m ruff check .
	$(RUN) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

install: $(VENV)/.installed

# Made again when the requirements change.
$(VENV)/.installed: requirements.txt examples/openmoji/requirements.txt examples/distributed/requirements.txt tests/requirements.txt setup.py sparse_autoencoder/pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip setuptools wheel
	$(RUN) -m pip install -r requirements.txt -r examples/openmoji/requirements.txt -r tests/requirements.txt
	$(RUN) -m pip install -e sparse_autoencoder/
	$(RUN) -m pip install --no-build-isolation -e .
	touch $@

# Made where there is npm, and again when the lock file changes.
tests/browser/node_modules/.package-lock.json: tests/browser/package-lock.json
	npm ci --prefix tests/browser --no-audit --no-fund
	touch $@

# Remove the demo's output and the environment.
clean:
	rm -rf $(VENV) tests/browser/node_modules examples/openmoji/run
