# `make demo` and `make test` do all the set-up themselves; nothing outside this folder is written but pip's cache and temporary files.
PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable
# What pip would do on one core, on all; some of the files are for newer versions of Python.
COMPILE = $(BIN)/python -m compileall -qq -j 0 .venv/lib || true
export TORCHINDUCTOR_CACHE_DIR = $(CURDIR)/.cache/inductor
export MPLCONFIGDIR = $(CURDIR)/.cache/matplotlib

.PHONY: demo test torture bench bench-growth clean

demo: .venv/ready  ## Train two small networks, write a report, classify real photographs
	$(BIN)/resnet-cifar10 train settings/digits.toml --data digits --out runs/demo
	photos=$$($(BIN)/python -c 'import skimage; print(skimage.data_dir)') && \
	$(BIN)/resnet-cifar10 report runs/demo --out reports/demo --photo-model resnet32 --photo $$photos/chelsea.png \
		--photo $$photos/coffee.png --photo $$photos/astronaut.png --photo $$photos/rocket.jpg && \
	$(BIN)/resnet-cifar10 infer $$photos/chelsea.png $$photos/coffee.png $$photos/astronaut.png $$photos/rocket.jpg \
		--figure reports/demo/photos.png
	@echo "Open reports/demo/report.html in a browser; the photographs are in reports/demo/photos.png."

test: .venv/full  ## Style, types and behaviour; warnings are errors
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy
	$(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

torture: .venv/full  ## Kills, full disks, hostile files; minutes, with SCALE=1 the full form, an hour or so
	$(BIN)/python -m torture --report reports/reliability.md $(if $(SCALE),--scale $(SCALE)) $(if $(SEED),--seed $(SEED))

bench: .venv/ready  ## How fast it is here; DATA=folder measures on CIFAR-10 itself
	$(BIN)/python benchmarks/bench.py $(if $(DATA),--data $(DATA))

bench-growth: .venv/ready  ## Time of an epoch against depth, batch size and number of images
	$(BIN)/python benchmarks/growth.py

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(INSTALL) '.[train,report,demo,serve]'
	$(COMPILE)
	touch $@

.venv/full: .venv/ready
	$(INSTALL) '.[ray,tensorflow,dev]'
	$(COMPILE)
	touch $@

clean:
	rm -rf .venv .cache build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
