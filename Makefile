# The same targets a person and CI use. `make` alone lists them.
SHELL := /bin/bash
PYTHON ?= python3.11
# What is exported and served; `perf` measures at a size of its own.
CONFIG ?= $(if $(filter perf,$@),bench,demo)
MODELS ?= ranker
REPOSITORY ?= model_repository
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
WEIGHTS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready
LIBB64 := build/perf-libraries/.ready
DEPLOY_TOOLS := build/deploy-tools/.ready
DEPLOY_PACKAGES := haproxy liblua5.3-0 libopentracing-c-wrapper0 libopentracing1 prometheus kubernetes-client
NUMPY2_TESTS = $(addprefix tests/unit/test_,$(addsuffix .py,client contract http_inference kv_memory probe runtime)) \
	tests/parity/test_resident.py tests/e2e/test_server.py::test_numpy_2_is_refused_by_a_server_that_cannot_use_it
PORTS = --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT)

.DEFAULT_GOAL := help
# Known vulnerabilities that are accepted, a line each: its id, and in a comment the date and the reason.
ACCEPTED_VULNERABILITIES :=

.PHONY: help setup setup-perf setup-deploy export serve demo test test-fast test-chaos test-deploy test-numpy2 perf check format clean
.PHONY: check-manifests check-pins check-vulnerabilities

help: ## this list
	@echo "make TARGET [CONFIG=demo|tiny|bench|seed|path.toml] [MODELS=\"ranker ranker_full\"] [REPOSITORY=DIR]"
	@echo "            [HTTP_PORT=8000] [GRPC_PORT=8001] [METRICS_PORT=8002] [WEIGHTS=FILE.safetensors]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  %-12s %s\n", $$1, $$2 }'

setup: $(READY) ## make the virtual environment .venv with everything, tritonserver included

$(READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(DEMO_READY)

# Of all that, what the demo needs: no linters, schemas, plots or training.
$(DEMO_READY): pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "make: installing tritonserver, torch and ONNX Runtime into $(VENV): some minutes, once"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[server,export]'
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) is not installed: install Python 3.11, or set PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "make: kvcast is pinned to Python 3.11, and $(PYTHON) is another: set PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make virtual environments: install its venv package (Debian: python3.11-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

setup-perf: $(READY) $(LIBB64) ## bring what perf_analyzer links to (no root needed)

# Debian's package, unpacked where perf/analyzer.py looks; a machine that has the library needs none of it.
$(LIBB64):
	@mkdir -p $(@D)
	@if ldconfig -p | grep -q 'libb64\.so\.0d'; then touch $@; else \
		cd $(@D) && { apt-get download -qq libb64-0d || { apt-get update -qq && apt-get download -qq libb64-0d; }; } \
		&& dpkg -x libb64-0d_*.deb . && rm libb64-0d_*.deb && touch $(notdir $@); fi 2>/dev/null \
		|| { echo "make: cannot fetch libb64-0d, which perf_analyzer needs: install it (Debian: apt-get install libb64-0d)" >&2; exit 1; }

setup-deploy: $(READY) $(DEPLOY_TOOLS) ## bring haproxy, prometheus and kubectl for the tests of deploy/ (no root needed)

# Debian's packages, unpacked where tests/deploy/tools.py looks; programs that the machine has are used without.
$(DEPLOY_TOOLS):
	@mkdir -p $(@D)
	@cd $(@D) && { { apt-get download -qq $(DEPLOY_PACKAGES) || { apt-get update -qq && apt-get download -qq $(DEPLOY_PACKAGES); }; } \
		&& for package in *.deb; do dpkg -x $$package . || exit 1; done && rm -f *.deb && touch $(notdir $@); } 2>/dev/null \
		|| { rm -f *.deb; echo "make: cannot fetch $(DEPLOY_PACKAGES): install what is missing (Debian 12: apt-get install haproxy prometheus kubernetes-client)" >&2; exit 1; }

export: $(READY) ## export CONFIG into REPOSITORY, proved exact (WEIGHTS=file, else its own or random)
	$(BIN)/kvcast export --config $(CONFIG) --repository $(REPOSITORY) $(if $(WEIGHTS),--weights $(WEIGHTS))

serve: $(READY) ## serve REPOSITORY with tritonserver in the foreground
	@exec $(BIN)/kvcast serve --repository $(REPOSITORY) --config $(CONFIG) --models "$(MODELS)" $(PORTS)

demo: $(DEMO_READY) ## export if need be, serve, rank for a user of a small shop, show it, stop
	@$(BIN)/kvcast demo --repository $(REPOSITORY) --config $(CONFIG) $(PORTS)

test: $(READY) ## every test, those against a real tritonserver included
	@$(MAKE) --no-print-directory setup-perf || echo "make: the test that runs perf_analyzer will be skipped" >&2
	@$(MAKE) --no-print-directory setup-deploy || echo "make: tests that run haproxy, prometheus or kubectl will be skipped" >&2
	@$(MAKE) --no-print-directory test-fast
	$(BIN)/python -m pytest tests/e2e tests/chaos tests/deploy

test-fast: $(READY) ## unit and parity tests, which need no server: 5 minutes on 2 cores
	$(BIN)/python -m pytest -q -n 2 --dist worksteal tests/unit tests/parity

# Of constraints-numpy2.txt, what differs from constraints.txt; the rest is seen in $(VENV). Its server refuses numpy 2.
test-numpy2: $(READY) ## what meets numpy, tested with numpy 2 and the newest client of Triton
	@$(BIN)/python -m venv --clear build/numpy2
	@comm -13 <(LC_ALL=C sort constraints.txt) <(LC_ALL=C sort constraints-numpy2.txt) > build/numpy2.txt
	@build/numpy2/bin/pip install --quiet --no-deps --requirement build/numpy2.txt
	@echo "import site; site.addsitedir('$(CURDIR)/$(VENV)/lib/python3.11/site-packages')" \
		> build/numpy2/lib/python3.11/site-packages/all-else.pth
	build/numpy2/bin/python -m pytest -q -n 2 --dist worksteal $(NUMPY2_TESTS)

test-chaos: $(READY) ## tens of thousands of hostile requests, and faults for longer than `test` takes
	KVCAST_THOROUGH=1 KVCAST_FUZZ_REQUESTS=20000 KVCAST_OVERLOAD_SECONDS=120 $(BIN)/python -m pytest tests/chaos

test-deploy: $(READY) ## deploy/ against real haproxy, prometheus and kubectl, for longer than `test` takes
	@$(MAKE) --no-print-directory setup-deploy || true  # the tests name what is missing
	KVCAST_THOROUGH=1 KVCAST_REQUIRE_DEPLOY_TOOLS=1 KVCAST_AFFINITY_VISITS=4000 $(BIN)/python -m pytest tests/deploy

perf: $(READY) $(LIBB64) ## measure CONFIG (bench) side by side, with report and plots (QUICK=1: 4 minutes)
	@$(BIN)/python -m perf run --config $(CONFIG) --repository $(REPOSITORY) $(PORTS) $(if $(QUICK),--quick --results build/perf) \
		$(PERF_FLAGS)

check: $(READY) ## formatting, lint, types, import directions, Kubernetes' schemas, pins, known vulnerabilities of what is pinned
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo
	@$(MAKE) --no-print-directory check-manifests check-pins check-vulnerabilities

# What kustomize makes of deploy/kubernetes, or its files where there is no kubectl, against the newest Kubernetes and
# the oldest that is supported. Every line is an error, but for the PodMonitor, whose schema is not Kubernetes' own.
check-manifests: $(READY)
	@rm -rf build/manifests && mkdir -p build/manifests
	@if kubectl=$$(PATH="build/deploy-tools/usr/bin:$$PATH" command -v kubectl); then \
		for folder in overlays/cpu overlays/gpu haproxy repository; do \
			$$kubectl kustomize deploy/kubernetes/$$folder 2>/dev/null > build/manifests/$$(basename $$folder).yaml \
				|| { echo "make: kubectl kustomize deploy/kubernetes/$$folder fails" >&2; exit 1; }; \
		done; \
	else \
		for file in $$(ls deploy/kubernetes/{base,haproxy,repository}/*.yaml | grep -v kustomization.yaml); do \
			cp $$file build/manifests/$$(basename $$(dirname $$file))-$$(basename $$file); \
		done; \
	fi
	@for version in 1.35.0 1.37.0; do \
		! $(BIN)/kubernetes-validate --strict --quiet -k $$version build/manifests/*.yaml 2>&1 \
			| grep -v "kind PodMonitor" >&2 || exit 1; \
	done
	@echo "manifests: $$(cat build/manifests/*.yaml | grep -c ^kind:) objects fit Kubernetes 1.35 and 1.37"

check-pins: $(READY)
	@$(BIN)/pip check
	@$(BIN)/pip freeze --exclude-editable | sed 's/+.*//' \
		| diff --label installed --label constraints.txt -U0 - constraints.txt \
		|| { echo "make: what is installed is not what is pinned: make clean setup, or renew constraints.txt" >&2; exit 1; }

# pip-audit ends with 1 for a vulnerability and for a service that does not answer; it writes a report for the first.
check-vulnerabilities: $(READY)
	@mkdir -p build && rm -f build/audit.txt
	@timeout 120 $(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --progress-spinner off \
		--vulnerability-service osv --timeout 10 --output build/audit.txt \
		$(ACCEPTED_VULNERABILITIES:%=--ignore-vuln %) 2>build/audit.log && tail -n 1 build/audit.log || \
	if [ -s build/audit.txt ]; then cat build/audit.txt >&2; exit 1; else \
		echo "known vulnerabilities: skipped, no service answers ($$(tail -n 1 build/audit.log | cut -c 1-80)…)"; fi

format: $(READY) ## rewrite the code in the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what was built: the environment, exports, caches
	[ ! -d build ] || chmod -R u+w build  # published releases are read-only
	rm -rf $(VENV) build *.egg-info src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f model_repository/*/1/model.onnx model_repository/*/1/weights.data model_repository/*/1/manifest.json model_repository/*/1/golden.json
	find . -name __pycache__ -prune -exec rm -rf {} +
