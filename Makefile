# make demo · make test · make bench · make lint · make wheel: each sets .venv up first. TORCH= chooses another torch.
TORCH ?= torch==2.13.0
CUTLASS := nvidia-cutlass==4.2.0.0
LINT := ruff==0.17.5 clang-format==23.1.5
PY := .venv/bin/python
SOURCES := $(shell find csrc nvfp4_moe -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml

.PHONY: demo test bench wheel lint format clean

demo: .venv/built
	$(PY) examples/demo.py

test: .venv/built
	$(PY) -m pytest

bench: .venv/built
	$(PY) bench/gemm.py

wheel: .venv/torch
	rm -rf dist build/lib* build/bdist*
	NVFP4_CHIPS=$${NVFP4_CHIPS:-all} $(PY) -m pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist .
	@! $(PY) -m zipfile -l dist/*.whl | grep _cute  # it is for one Python only, and the wheel is for all

lint: .venv/lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs .venv/bin/clang-format --dry-run -Werror

format: .venv/lint
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs .venv/bin/clang-format -i

.venv/torch:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nvfp4_moe needs Python >= 3.10, this is " + sys.version)'
	python3 -m venv .venv
	$(PY) -m pip install -q --disable-pip-version-check '$(TORCH)' numpy 'setuptools>=77' wheel ninja pybind11
	$(PY) -m pip install -q --disable-pip-version-check --no-deps $(CUTLASS)
	touch $@

.venv/built: .venv/torch $(SOURCES)
	@echo 'building the libraries (log: .venv/build.log)'
	@$(PY) -m pip install -v --disable-pip-version-check --no-build-isolation --config-settings editable_mode=compat \
		-e '.[test]' > .venv/build.log 2>&1 || { tail -n 60 .venv/build.log; exit 1; }
	@grep -oh 'nvfp4_moe: building.*' .venv/build.log | tail -n 1
	@touch $@

.venv/lint: .venv/torch Makefile
	$(PY) -m pip install -q --disable-pip-version-check $(LINT)
	touch $@

clean:
	rm -rf .venv build dist *.egg-info nvfp4_moe/*.so
