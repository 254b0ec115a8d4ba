# make quickstart PROMPT="..."   a video from a sentence, in out/
# make test                      every check, under 20 minutes on 2 cores
# make lab                       JupyterLab on the notebooks
# make results                   the embedded model and its results again (hours, continues after a stop)
# Each one first makes the .venv that it needs; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
RUN := $(BIN)/python tests/run_notebook.py
TWO := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 --no_python $(RUN)

# Only a prompt given to make counts: an exported PROMPT is a shell's own. $(value) keeps $ signs.
ifneq ($(origin PROMPT),command line)
PROMPT := a red circle moving left on a navy background
endif
unexport PROMPT
export QUICKSTART_PROMPT := $(value PROMPT)

.PHONY: help quickstart test lab results install clean
help:
	@sed -n '1,/^$$/s/^# //p' Makefile

install: $(INSTALLED)

$(INSTALLED): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else \
	    "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + \
	    ": choose another with make PYTHON=python3.12 ...")'
	@echo "Installing into .venv (once; several minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	@$(RUN) nbs/30_generate.ipynb out/quickstart.ipynb \
	    "prompt=$$QUICKSTART_PROMPT" out=out name=quickstart

test: $(INSTALLED)
	$(BIN)/python tests/check.py sync
	$(BIN)/ruff check nbs versvideo tests setup.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python tests/check.py installed
	$(BIN)/python tests/check.py runs

lab: $(INSTALLED)
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/nbs

# Each run leaves its checkpoints in its folder and continues from them, so that make results can be
# stopped and started again; they go when all is done. What was trained becomes the pipeline that the
# package ships.
results: $(INSTALLED)
	$(TWO) nbs/21_train_vae.ipynb results/21_train_vae-XS-s0.ipynb \
	    size=XS out=results/21_train_vae-XS-s0
	$(RUN) nbs/24_train_clip.ipynb results/24_train_clip-XS-s0.ipynb \
	    size=XS out=results/24_train_clip-XS-s0
	$(RUN) nbs/24_train_clip.ipynb results/24_train_clip-vision-XS-s0.ipynb \
	    size=XS stage=vision model=results/24_train_clip-XS-s0/weights out=results/24_train_clip-vision-XS-s0
	$(RUN) nbs/21_train_vae.ipynb results/21_train_vae-tcm-XS-s0.ipynb \
	    size=XS stage=tcm perceptual=clip vae=results/21_train_vae-XS-s0/weights out=results/21_train_vae-tcm-XS-s0
	$(TWO) nbs/20_train_unet.ipynb results/20_train_unet-XS-s0.ipynb \
	    size=XS out=results/20_train_unet-XS-s0 \
	    vae=results/21_train_vae-XS-s0/weights clip=results/24_train_clip-XS-s0/weights
	$(BIN)/python tests/check.py ship results/20_train_unet-XS-s0/weights results/21_train_vae-tcm-XS-s0/weights \
	    results/21_train_vae-XS-s0/weights results/24_train_clip-vision-XS-s0/weights
	$(RUN) nbs/33_judge.ipynb results/33_judge-XS-s0.ipynb prompts=64 out=results/33_judge-XS-s0
	$(RUN) nbs/42_reconstruction.ipynb results/42_reconstruction-XS.ipynb \
	    size=XS n=256 perceptual=clip out=results/42_reconstruction-XS
	$(BIN)/nbdev_clean --fname results
	rm -rf results/*-XS-s0/checkpoints

clean:
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache
