# make report: the default sweep and its report. make test: the tests. Both make the environment first, and need
# Python 3.11 or newer and nothing else. make test-slow: the tests that take minutes. make lab: JupyterLab on the notebooks. make bench: speeds as
# ratios. make studies: every small study, its runs and verdicts. make check: formatting, style, types. make gpu-check: forecasts held against the GPU that is here. make clean: start over.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
# bytecode is made when something is first imported, and kept: pip would take half a minute for what nobody imports
export PYTHONDONTWRITEBYTECODE :=
# the environment's own kernel, whatever kernels the user has
export JUPYTER_PREFER_ENV_PATH := 1

.PHONY: env report test test-slow lab studies bench check gpu-check clean
env: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[torch,test]'
	touch $@

report: env
	$(BIN)/vramlab sweep params/quick.yml

test: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: env
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m slow

lab: env
	$(BIN)/jupyter lab --ServerApp.root_dir=. --LabApp.news_url=None notebooks/compare.ipynb

studies: env
	$(BIN)/vramlab studies --gallery outputs/gallery

bench: env
	PYTHONPATH=tests $(BIN)/python -m benchmarks.meter
	PYTHONPATH=tests $(BIN)/python -m benchmarks.peers

check: env
	$(BIN)/ruff format --check lib tests notebooks
	$(BIN)/ruff check lib tests notebooks
	$(BIN)/mypy

# without an environment of its own: any Python that has torch, transformers, peft, pandas and pyarrow; GPU_CHECK are its options
gpu-check:
	PYTHONPATH=lib:tests $(PYTHON) -m vramlab.gpu_check --peers benchmarks.trainer_peers $(GPU_CHECK)

clean:
	rm -rf .venv
	find outputs -mindepth 1 -maxdepth 1 -type d ! -name reference ! -name gallery -exec rm -rf {} +
