# make train   makes .venv on first use, trains the quick-start model and prints where its report is
# make test    makes .venv with the test extras on first use and runs the suite
# make check   formatting, lint and types            make slow   the long learning and fault tests
# PYTHON=...   the interpreter to make .venv with (any from 3.11 on; found by itself otherwise)

VENV ?= .venv
RUN = $(VENV)/bin/python
FIND = for p in $(PYTHON) python3 python3.13 python3.12 python3.11 python $$HOME/.pyenv/versions/3.1[1-9]*/bin/python; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done

.PHONY: train test slow check newest clean
.DELETE_ON_ERROR:

train: $(VENV)/base.done
	$(RUN) launch.py train lm_quick --resume

test: $(VENV)/test.done
	$(RUN) -m pytest -n auto

slow: $(VENV)/test.done
	$(RUN) -m pytest -m slow

check: $(VENV)/dev.done
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/plait
	MYPYPATH=$(VENV)/types $(RUN) -m mypy -p plait.kernels -p plait.models -p plait.configs -p plait.data -p plait.train -m plait.launch

# The Pallas kernels on the newest JAX, which needs Python 3.12: its own environment beside .venv. Of the GPU kernels, whose interpreter
# older ones lack, it is every case; of each TPU kernel one with its gradients. The other cases, and the chunked paths, run in `make test`.
newest:
	@python=$$(for p in python3.12 python3.13 $$HOME/.pyenv/versions/3.1[2-9]*/bin/python; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done); \
	if [ -z "$$python" ]; then echo "no Python 3.12 found: the kernel suite was run on the JAX of $(VENV) only"; \
	else $(MAKE) --no-print-directory VENV=.venv-newest PYTHON=$$python .venv-newest/test.done && \
	  .venv-newest/bin/python -m pytest -n auto -m "newest and not slow" tests/kernels; fi

$(VENV)/bin/python:
	@python=$$($(FIND)); \
	if [ -z "$$python" ]; then echo "plait needs Python 3.11 or newer; install one or give it with PYTHON=..." >&2; exit 1; fi; \
	echo "making $(VENV) with $$($$python --version)"; $$python -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip

$(VENV)/base.done: $(VENV)/bin/python pyproject.toml setup.py constraints.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# What is installed with the tests is the base too, and what is with the checks, the tests too.
$(VENV)/test.done $(VENV)/dev.done: $(VENV)/%.done: $(VENV)/bin/python pyproject.toml setup.py constraints.txt
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	@touch $(VENV)/base.done $(VENV)/test.done $@

clean:
	rm -rf $(VENV) .venv-newest build *.egg-info
