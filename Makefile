# Everything here needs only python3 (3.10 or newer, with venv and pip) and make. Each target makes
# or refreshes its virtual environment first. PYTHON= names another Python, VENV= another folder,
# TORCH_INDEX= the URL of an index with PyTorch's CPU build, for where pip's own sources lack it.
# MODEL= is what `make chat-demo` converts and talks with: a folder, a GGUF file or a hub id.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
MODEL ?= HuggingFaceTB/SmolLM2-135M-Instruct
CHAT_FILE ?= demo/$(notdir $(patsubst %/,%,$(MODEL))).cvxq
RUN = $(VENV)/bin
C_SOURCES = $(wildcard kernels/cvxq_kernels/cpu/native/*.[chi]*) $(wildcard tests/kernels/cpu/*.c)
# A worker holds PyTorch and a share of the tests' models: more than a few would want much memory.
WORKERS = --numprocesses auto --maxprocesses 4 --dist loadscope

.PHONY: help environment demo chat-demo test static wheel bundle check hashes audit release clean

help:
	@echo 'make demo     convert the demo model to 3 bits, measure what was lost, write some text'
	@echo 'make chat-demo [MODEL=folder or hub id]'
	@echo '              convert that model to 4 bits, unless that was done before, and talk with it'
	@echo 'make test     run the tests'
	@echo 'make wheel    build the sdist and, from it, the wheel for this platform, into dist/'
	@echo 'make bundle   what benchmarks/gpu.py takes on a machine without network, into dist/'
	@echo 'make check    everything CI does: style, types, documents, tests'
	@echo 'make audit    look for known weaknesses in the packages that are pinned; asks the network'
	@echo 'make release  check, build twice, compare, list what is inside, and tag (DRY_RUN=1: no tag)'
	@echo 'make clean    remove the environment and whatever was made'

environment:
	@$(PYTHON) tools/make_environment.py --venv $(VENV) --torch-index '$(TORCH_INDEX)'

demo: environment
	$(RUN)/cvxq convert demo/model -o demo/demo.cvxq --bits 3 --report demo/report
	$(RUN)/cvxq perplexity demo/demo.cvxq --text demo/evaluation.txt --no-bos --against demo/model
	$(RUN)/cvxq generate demo/demo.cvxq "The old house stood at the end of the lane," --max-tokens 120 --seed 1

$(CHAT_FILE): | environment
	$(RUN)/cvxq convert $(MODEL) -o $@ --bits 4

chat-demo: environment $(CHAT_FILE)
	$(RUN)/cvxq chat $(CHAT_FILE)

test: environment
	$(RUN)/python -m pytest $(WORKERS)

static: environment
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(RUN)/mypy
	$(RUN)/mypy tools benchmarks demo
	$(RUN)/python tools/check_documents.py

check: static test

# On Linux the wheel is named after the oldest C library that it runs with, as indexes require.
wheel: environment
	rm -rf dist
	$(RUN)/python -m build --no-isolation
	if [ `uname` = Linux ]; then \
	  PATH=$(abspath $(RUN)):$$PATH auditwheel repair --wheel-dir dist dist/*-linux_*.whl && \
	  rm dist/*-linux_*.whl; \
	fi
	ls -l dist

# The last commit, the wheel, and what is pinned for this Python but torch and triton, which are bound
# to the machine's driver.
bundle: wheel
	rm -rf build/bundle
	mkdir -p build
	git archive --prefix=bundle/ HEAD | tar -x -C build
	$(RUN)/pip download --quiet --no-deps --prefer-binary --require-hashes -r hashes.txt \
	  --dest build/bundle/wheels
	cp dist/*.whl build/bundle/wheels
	tar -C build -cf dist/cvxq-bundle.tar bundle
	ls -l dist

# Both fetch a tool into an environment of its own, beside the one that everything else runs in.
TOOLS = $(VENV)-tools

hashes:
	$(PYTHON) -m venv $(TOOLS) && $(TOOLS)/bin/pip install --quiet uv
	printf '%s\n' '# What constraints.txt pins, by the SHA-256 of every file that it may come in; without torch and' \
	  '# triton, whose builds are many. Made by `make hashes`.' > hashes.txt
	grep -vE '^(#|torch==|triton==)' constraints.txt | $(TOOLS)/bin/uv pip compile --quiet --universal \
	  --no-deps --generate-hashes --no-annotate --no-header --python-version 3.10 - >> hashes.txt

audit:
	$(PYTHON) -m venv $(TOOLS) && $(TOOLS)/bin/pip install --quiet pip-audit
	$(TOOLS)/bin/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

release: check
	$(PYTHON) -m venv $(TOOLS) && $(TOOLS)/bin/pip install --quiet cyclonedx-bom
	PATH=$(abspath $(RUN)):$(abspath $(TOOLS)/bin):$$PATH $(RUN)/python tools/release.py \
	  $(if $(DRY_RUN),--dry-run)

clean:
	rm -rf $(VENV) $(TOOLS) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf demo/*.cvxq demo/report
