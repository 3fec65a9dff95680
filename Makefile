# `make demo` shows the worker at work; `make test` proves it. Both set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# uv as it is on the machine, else the one that pip puts into the environment.
UV = $(shell command -v uv || echo $(BIN)/uv)

# A release is taken into the lock when it is this old: most that are malicious are found out before.
AGE_DAYS ?= 14

.PHONY: help setup demo test test-fast fuzz chaos soak acceptance-full lint format bench screens sam2-proof audit licences wheelhouse lock clean

help:
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.installed ## environment in .venv, locked with hashes

$(VENV)/.installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed; name one by PYTHON=python3.11"; exit 1; }
	@missing=; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	command -v bwrap >/dev/null || missing="$$missing bubblewrap"; \
	command -v setpriv >/dev/null && command -v prlimit >/dev/null || missing="$$missing util-linux"; \
	ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || \
	  missing="$$missing postgresql"; \
	[ -z "$$missing" ] || echo "missing, install with:  sudo apt install$$missing"; \
	case "$$missing" in *venv*) exit 1;; esac
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@command -v uv >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements.lock
	$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: setup ## a training, then inferences, on an embedded RVM-Server; DATASET=path IMG_SIZE=320 EPOCHS=3 for your own data, SAM2=path, SEGMENT=1 fine-tunes SAM2
	$(BIN)/rvmcv-worker demo $(if $(DATASET),--dataset '$(DATASET)') $(if $(EPOCHS),--epochs $(EPOCHS)) \
	  $(if $(IMG_SIZE),--img-size $(IMG_SIZE)) $(if $(SAM2),--sam2 '$(SAM2)') \
	  $(if $(filter-out 0,$(SEGMENT)),--segment) --json summary.json

# Two files of tests at a time: most of them wait for others. In the order of their names the short ones come last.
SIDE_BY_SIDE := -n $(or $(PROCESSES),2) --no-loadscope-reorder

test: setup ## the whole suite, in PROCESSES=2
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: setup ## what is quick, for while one works
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow'

acceptance-full: setup ## a training in an installed service of a booted system, with everything; takes root and some gigabytes
	RVMCV_ACCEPTANCE_FULL=1 $(BIN)/python -m pytest tests/acceptance/booted/test_full.py

fuzz: setup ## feed every reader of others' data with rubbish for MINUTES=10
	RVMCV_FUZZ_MINUTES=$(or $(MINUTES),10) $(BIN)/python -m pytest tests/security/test_fuzz.py tests/security/test_fuzzed_daemon.py

chaos: setup ## kill daemons over a bad network and count what went wrong; JOBS=1000 KILLS=1000 SEED=…
	$(BIN)/python -m tests.chaos $(if $(JOBS),--jobs $(JOBS)) $(if $(KILLS),--kills $(KILLS)) $(if $(SEED),--seed $(SEED))

soak: setup ## mixed jobs for MINUTES=60; tells whether the daemon grows
	$(BIN)/python -m tests.soak $(if $(MINUTES),--minutes $(MINUTES))

lint: setup ## ruff, mypy strict, import-linter; shellcheck where it is installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@command -v shellcheck >/dev/null || { echo "shellcheck is not installed: no shell script was looked at"; exit 0; }; \
	find . -name '*.sh' -not -path './.*' -not -path './installer/*' -exec shellcheck --external-sources --check-sourced {} +

format: setup ## ruff's formatter
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup ## every benchmark; writes benchmarks/latest.json
	$(BIN)/python -m benchmarks

screens: setup ## the screens in README.md anew, from a worker that has jobs
	$(BIN)/python -m benchmarks.screens

sam2-proof: setup ## what fine-tuning pretrained weights is worth: BASE=sam2.1_hiera_tiny.pt DATASET=path EPOCHS= IMG_SIZE= TRAIN=all
	@[ -n '$(BASE)' ] && [ -n '$(DATASET)' ] || \
	  { echo "name both: make sam2-proof BASE=sam2.1_hiera_tiny.pt DATASET=a folder or zip with polygons"; exit 2; }
	$(BIN)/python -m benchmarks.sam2_proof '$(BASE)' '$(DATASET)' $(if $(EPOCHS),--epochs $(EPOCHS)) \
	  $(if $(IMG_SIZE),--img-size $(IMG_SIZE)) $(if $(TRAIN),--train '$(TRAIN)')

audit: setup ## licences, a bill of materials (sbom.cdx.json), known holes; SERVICE=osv asks another database, none asks nobody
	$(BIN)/python -m audit --uv $(UV) $(if $(SERVICE),--service '$(SERVICE)')

licences: setup ## under which licences all packages are; fails for one that does not go with the AGPL
	$(BIN)/python -m audit --licences-only

wheelhouse: setup ## all that install.sh --wheelhouse needs offline, into WHEELHOUSE=wheelhouse; EXTRAS=compute for what trains
	$(BIN)/python -m installer.wheelhouse '$(or $(WHEELHOUSE),wheelhouse)' --uv $(UV) $(if $(EXTRAS),--extra '$(EXTRAS)')

lock: ## resolve requirements.lock anew, from releases at least AGE_DAYS=14 old
	$(UV) pip compile --universal --python-version 3.10 --generate-hashes --no-emit-index-url --all-extras \
	  --upgrade --exclude-newer "$$(date --utc --date '$(AGE_DAYS) days ago' +%Y-%m-%dT%H:%M:%SZ)" \
	  --custom-compile-command 'make lock' --quiet pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) wheelhouse demo-out sam2-proof summary.json sbom.cdx.json .pytest_cache .mypy_cache .ruff_cache
