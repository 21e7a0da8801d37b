# make workbook: the six notebooks on the embedded model.   make test: all tests.   make bench: timings, as ratios.
# make study: what takes hours.   Each makes .venv first when it is missing. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN = .venv/bin
NOTEBOOKS = notebooks

.PHONY: workbook test test-browser bench faults fuzz mutants study pages lab report

workbook: .venv/made
	$(BIN)/python -m jqlib run -f runs/smollm2-135m.yaml

# nbval reads a cell's output when the cell has ended, and more than a thousand lines of progress would push its end out
test: .venv/made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify notebooks/*.ipynb
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
	JUPYTER_PREFER_ENV_PATH=1 JOINTQUANT_OUTPUT=$(CURDIR)/.nbval_output TQDM_DISABLE=1 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -n 2 --dist loadfile -p no:warnings --nbval-lax --nbval-current-env --nbval-cell-timeout=3600 notebooks

# on the artifacts that `make test` left, else it takes ten minutes more; says so and passes where there is no Chromium
test-browser: .venv/made
	$(BIN)/python -c "import playwright" 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[browser]"
	JOINTQUANT_OUTPUT=$(CURDIR)/.nbval_output OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rsP tests/browser

bench: .venv/made
	$(BIN)/python tests/bench/solvers.py
	$(BIN)/python tests/bench/cost.py
	$(BIN)/python tests/bench/speed.py
	$(BIN)/python tests/bench/stages.py

# kills the pipeline at a hundred moments, then full disks, flipped bits and more; counts what is lost or wrong: 20 minutes
faults: .venv/made
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kills.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/faults.py

# run files, flags, GGUF headers and results files as nobody should write them. EXAMPLES=2000: more than 300 of each kind
fuzz: .venv/made
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/fuzz/fuzz.py

# changes the numerical core in 200 small places, one at a time: do its tests notice? Goes on where it stopped
mutants: .venv/made
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/mutants.py $(COUNT)

# figures/study.json: hours; goes on where it stopped. MINUTES=60: begins no row after them
study: .venv/made
	$(BIN)/python -c "import lm_eval" 2>/dev/null || $(BIN)/python -m pip install --quiet -c constraints.txt -e ".[lm-eval]"
	$(BIN)/python -m jqlib study $(if $(MINUTES),--minutes $(MINUTES))

# figures/pages: the last `make workbook` as pages that can be read on a web site of the repository
pages: .venv/made
	$(BIN)/python -m jqlib pages

lab: .venv/made
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab $(NOTEBOOKS)

report: .venv/made
	$(BIN)/python -m jqlib report

.venv/made: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24.1"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@
