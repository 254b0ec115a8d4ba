# make quickstart PROMPT="..."   a video from a sentence, in out/
# make edit VIDEO=... PROMPT="..." [CONDITIONS=canny,softedge] [STYLE=...] [CONDITION_MODELS=depth=FOLDER]
#                                re-renders your own video, in out/
# make test                      every check, as continuous integration runs it
# make check                     lint, sync, layout, and the tests of the rooms that have changed
# make lab                       JupyterLab on the notebooks
# make results [ONLY=RUN]        trains the embedded model and measures it again (hours, continues after a stop),
#                                or repeats one run of results/; prints which numbers changed
# make results-gpu               after make results: the trainings and measurements on a GPU (an H200)
# make readme                    rebuilds the tables of README.md and results/README.md from the records
# Each target first creates .venv if it is missing; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
RUN := $(BIN)/versvideo run
TWO := OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node 2 -m versvideo run

# Only values on make's command line count, in capitals or not, no exported shell variables. $(value) keeps $ signs.
given = $(if $(filter command line,$(origin $(1))),$(value $(1)),$(if $(2),$(call given,$(2))))
unexport PROMPT VIDEO CONDITIONS STYLE CONDITION_MODELS prompt video conditions style condition_models
export GIVEN_PROMPT := $(call given,PROMPT,prompt)
export GIVEN_VIDEO := $(call given,VIDEO,video)
export GIVEN_CONDITIONS := $(call given,CONDITIONS,conditions)
export GIVEN_STYLE := $(call given,STYLE,style)
export GIVEN_CONDITION_MODELS := $(call given,CONDITION_MODELS,condition_models)

.PHONY: help quickstart edit test check lab results results-gpu readme install clean
help:
	@sed -n '1,/^$$/s/^# //p' Makefile

install: $(INSTALLED)

$(INSTALLED): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else \
	    "Python 3.10 or newer is needed, this is " + sys.version.split()[0] + \
	    ": choose another with make PYTHON=python3.12 ...")'
	@index=$$($(PYTHON) .ci/index.py) && echo "Installing into .venv (once; several minutes)" && $(PYTHON) -m venv .venv && \
	    PIP_EXTRA_INDEX_URL="$$index" $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)
	@$(RUN) nbs/30_generate.ipynb --out out/quickstart.ipynb $${GIVEN_PROMPT:+"prompt=$$GIVEN_PROMPT"} out=out name=quickstart

edit: $(INSTALLED)
	@$(RUN) nbs/32_edit.ipynb --out out/edit.ipynb $${GIVEN_VIDEO:+"video=$$GIVEN_VIDEO"} $${GIVEN_PROMPT:+"prompt=$$GIVEN_PROMPT"} \
	    $${GIVEN_CONDITIONS:+"conditions=$$GIVEN_CONDITIONS"} $${GIVEN_STYLE:+"style=$$GIVEN_STYLE"} \
	    $${GIVEN_CONDITION_MODELS:+"condition_models=$$GIVEN_CONDITION_MODELS"} out=out

test: $(INSTALLED)
	$(BIN)/python tests/check.py sync
	$(BIN)/ruff check nbs versvideo tests setup.py
	$(BIN)/python tests/check.py notebooks
	$(BIN)/python tests/check.py installed

check: $(INSTALLED)
	$(BIN)/python tests/check.py sync
	$(BIN)/ruff check nbs versvideo tests setup.py
	$(BIN)/python -m pytest -q tests/test_layout.py tests/test_measures.py -rP -p no:cacheprovider
	$(BIN)/python tests/check.py changed

readme: $(INSTALLED)
	$(BIN)/versvideo results readme

lab: ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)
lab: $(INSTALLED)
	@[ -z "$(ROOT)" ] || echo "You are root: JupyterLab needs $(ROOT), and whoever gets its token is root as well"
	$(BIN)/jupyter lab $(ROOT) --LabApp.default_url=/lab/tree/nbs

# Each run keeps its checkpoints in its folder and continues from them, so make results can be stopped and
# started again. The checkpoints are deleted at the end. The trained parts become the embedded pipeline.
ifdef ONLY
results: $(INSTALLED)
	$(BIN)/versvideo results again $(ONLY)
else
results: $(INSTALLED)
	$(RUN) nbs/21_train_vae.ipynb --out results/21_train_vae-XS-s0.ipynb \
	    size=XS out=results/21_train_vae-XS-s0
	$(TWO) nbs/21_train_vae.ipynb --out results/21_train_vae-styles-XS-s0.ipynb \
	    size=XS vae=results/21_train_vae-XS-s0/weights steps=2000 out=results/21_train_vae-styles-XS-s0
	$(RUN) nbs/24_train_clip.ipynb --out results/24_train_clip-XS-s0.ipynb \
	    size=XS out=results/24_train_clip-XS-s0
	$(RUN) nbs/24_train_clip.ipynb --out results/24_train_clip-vision-XS-s0.ipynb \
	    size=XS stage=vision model=results/24_train_clip-XS-s0/weights out=results/24_train_clip-vision-XS-s0
	$(RUN) nbs/25_train_classifier.ipynb --out results/25_train_classifier-XS-s0.ipynb \
	    size=XS out=results/25_train_classifier-XS-s0
	$(RUN) nbs/21_train_vae.ipynb --out results/21_train_vae-tcm-XS-s0.ipynb \
	    size=XS stage=tcm perceptual=clip vae=results/21_train_vae-styles-XS-s0/weights out=results/21_train_vae-tcm-XS-s0
	$(RUN) nbs/21_train_vae.ipynb --out results/21_train_vae-tcm2-XS-s1.ipynb \
	    size=XS stage=tcm perceptual=clip vae=results/21_train_vae-styles-XS-s0/weights \
	    decoder=results/21_train_vae-tcm-XS-s0/weights seed=1 steps=6000 out=results/21_train_vae-tcm2-XS-s1
	$(RUN) nbs/20_train_unet.ipynb --out results/20_train_unet-XS-s0.ipynb \
	    size=XS start=scaled out=results/20_train_unet-XS-s0 \
	    vae=results/21_train_vae-XS-s0/weights clip=results/24_train_clip-XS-s0/weights
	$(TWO) nbs/20_train_unet.ipynb --out results/20_train_unet-styles-XS-s0.ipynb \
	    size=XS init=results/20_train_unet-XS-s0/weights pretrained_share=1 styles=flat,outline,gradient steps=1200 \
	    start=scaled out=results/20_train_unet-styles-XS-s0 \
	    vae=results/21_train_vae-styles-XS-s0/weights clip=results/24_train_clip-XS-s0/weights
	$(TWO) nbs/20_train_unet.ipynb --out results/20_train_unet-styles2-XS-s1.ipynb \
	    size=XS init=results/20_train_unet-styles-XS-s0/weights pretrained_share=1 styles=flat,outline,gradient \
	    start=scaled style_dropout=0.3 image_steps=600 steps=1800 seed=1 out=results/20_train_unet-styles2-XS-s1 \
	    vae=results/21_train_vae-styles-XS-s0/weights clip=results/24_train_clip-XS-s0/weights
	$(TWO) nbs/20_train_unet.ipynb --out results/20_train_unet-centred-XS-s2.ipynb \
	    size=XS init=results/20_train_unet-styles2-XS-s1/weights pretrained_share=1 without=moe start=centred+images \
	    styles=flat,flat,flat,outline,gradient style_dropout=0.3 \
	    motions=left,right,up,down,grow,shrink,spin,spin,spin,bounce,orbit image_rank_fraction=0.1 clips=8192 lr=6e-4 \
	    optimizer=muon steps=2300 seed=2 out=results/20_train_unet-centred-XS-s2 \
	    vae=results/21_train_vae-styles-XS-s0/weights clip=results/24_train_clip-XS-s0/weights
	$(RUN) nbs/22_train_controlnet.ipynb --out results/22_train_controlnet-XS-s0.ipynb \
	    size=XS model=results/20_train_unet-styles-XS-s0/weights out=results/22_train_controlnet-XS-s0
	$(RUN) nbs/22_train_controlnet.ipynb --out results/22_train_controlnet-styles2-XS-s1.ipynb \
	    size=XS model=results/20_train_unet-styles2-XS-s1/weights controlnet=results/22_train_controlnet-XS-s0/weights \
	    steps=900 seed=1 out=results/22_train_controlnet-styles2-XS-s1
	$(RUN) nbs/23_train_style.ipynb --out results/23_train_style-styles2-XS-s1.ipynb \
	    size=XS model=results/20_train_unet-styles2-XS-s1/weights seed=1 \
	    image_encoder=results/24_train_clip-vision-XS-s0/weights/image_encoder out=results/23_train_style-styles2-XS-s1
	$(RUN) nbs/23_train_style.ipynb --out results/23_train_style-styles2-XS-s2.ipynb \
	    size=XS stage=captions style_dropout=0.3 model=results/20_train_unet-styles2-XS-s1/weights adapter=results/23_train_style-styles2-XS-s1/weights seed=2 \
	    image_encoder=results/24_train_clip-vision-XS-s0/weights/image_encoder out=results/23_train_style-styles2-XS-s2
	$(TWO) nbs/20_train_unet.ipynb --out results/20_train_unet-flat-XS-s3.ipynb \
	    size=XS init=results/20_train_unet-centred-XS-s2/weights pretrained_share=1 without=moe \
	    styles=flat,flat,flat,outline,gradient motions=left,right,up,down,grow,shrink,spin,spin,spin,spin,bounce,orbit \
	    image_rank_fraction=0.1 clips=4096 lr=4e-4 optimizer=muon steps=900 seed=3 out=results/20_train_unet-flat-XS-s3 \
	    vae=results/21_train_vae-styles-XS-s0/weights clip=results/24_train_clip-XS-s0/weights
	$(RUN) nbs/23_train_style.ipynb --out results/23_train_style-flat-XS-s4.ipynb \
	    size=XS stage=captions even=True style_dropout=0 model=results/20_train_unet-flat-XS-s3/weights \
	    adapter=results/23_train_style-styles2-XS-s2/weights steps=800 batch=6 seed=4 out=results/23_train_style-flat-XS-s4 \
	    image_encoder=results/24_train_clip-vision-XS-s0/weights/image_encoder
	$(RUN) nbs/22_train_controlnet.ipynb --out results/22_train_controlnet-flat-XS-s3.ipynb \
	    size=XS model=results/23_train_style-flat-XS-s4/weights controlnet=results/22_train_controlnet-styles2-XS-s1/weights \
	    optimizer=muon lr=5e-4 steps=750 seed=3 out=results/22_train_controlnet-flat-XS-s3
	$(RUN) nbs/27_distill.ipynb --out results/27_distill-XS-s0.ipynb \
	    size=XS model=results/20_train_unet-flat-XS-s3/weights frozen=experts,cross_attention guidance=2 grid=25 \
	    optimizer=muon style_dropout=0 styles=flat,flat,flat,outline,gradient \
	    motions=left,right,up,down,grow,shrink,spin,spin,spin,spin,bounce,orbit steps=900 sample_every=450 seed=3 \
	    out=results/27_distill-XS-s0
	$(BIN)/versvideo results ship results/20_train_unet-flat-XS-s3/weights results/21_train_vae-tcm2-XS-s1/weights \
	    results/21_train_vae-styles-XS-s0/weights results/24_train_clip-vision-XS-s0/weights \
	    results/25_train_classifier-XS-s0/weights \
	    results/22_train_controlnet-flat-XS-s3/weights results/23_train_style-flat-XS-s4/weights results/27_distill-XS-s0/weights \
	    to_q,to_k,to_v
	$(RUN) nbs/33_judge.ipynb --out results/33_judge-XS-s0.ipynb prompts=256 out=results/33_judge-XS-s0
	$(RUN) nbs/33_judge.ipynb --out results/33_judge-student-XS.ipynb \
	    prompts=256 student=True out=results/33_judge-student-XS
	$(RUN) nbs/42_reconstruction.ipynb --out results/42_reconstruction-XS.ipynb \
	    size=XS n=256 perceptual=clip out=results/42_reconstruction-XS
	$(RUN) nbs/42_reconstruction.ipynb --out results/42_reconstruction-XS-s1.ipynb \
	    size=XS n=64 seed=1 perceptual=clip out=results/42_reconstruction-XS-s1
	$(RUN) nbs/43_follow.ipynb --out results/43_follow-XS.ipynb size=XS n=16 guidance=2 out=results/43_follow-XS
	$(RUN) nbs/44_style.ipynb --out results/44_style-XS.ipynb size=XS n=96 out=results/44_style-XS
	$(RUN) nbs/40_table1_msrvtt.ipynb --out results/40_table1_msrvtt-XS.ipynb size=XS out=results/40_table1_msrvtt-XS
	$(RUN) nbs/41_table2_ucf101.ipynb --out results/41_table2_ucf101-XS.ipynb size=XS out=results/41_table2_ucf101-XS
	$(RUN) nbs/45_court.ipynb --out results/45_court-XS.ipynb n=256 sizes=16,32,64 doses=0.3,1 faults= repeats=12 paired=32 \
	    out=results/45_court-XS
	OMP_NUM_THREADS=1 $(RUN) nbs/55_ablation_start.ipynb --out results/55_ablation_start-XS.ipynb size=XS seeds=3 at_once=2 \
	    runs=results/50_ablation_unet-XS/trainings out=results/55_ablation_start-XS
	OMP_NUM_THREADS=1 $(RUN) nbs/50_ablation_unet.ipynb --out results/50_ablation_unet-XS.ipynb size=XS seeds=4 at_once=2 \
	    runs=results/50_ablation_unet-XS/trainings out=results/50_ablation_unet-XS
	OMP_NUM_THREADS=1 $(RUN) nbs/50_ablation_unet.ipynb --out results/50_ablation_unet-full-XS.ipynb size=XS seeds=4 at_once=2 \
	    world=full runs=results/50_ablation_unet-XS/trainings out=results/50_ablation_unet-full-XS
	OMP_NUM_THREADS=1 $(RUN) nbs/51_ablation_moe.ipynb --out results/51_ablation_moe-XS.ipynb size=XS seeds=2 at_once=2 \
	    runs=results/50_ablation_unet-XS/trainings out=results/51_ablation_moe-XS
	OMP_NUM_THREADS=1 $(RUN) nbs/52_ablation_mec.ipynb --out results/52_ablation_mec-XS.ipynb size=XS seeds=2 at_once=2 \
	    runs=results/50_ablation_unet-XS/trainings out=results/52_ablation_mec-XS
	$(RUN) nbs/54_excitations.ipynb --out results/54_excitations-XS.ipynb \
	    n=24 clips=24 steps=10 start_seed=0 out=results/54_excitations-XS
	$(RUN) nbs/54_excitations.ipynb --out results/54_excitations-centred-XS.ipynb \
	    n=24 clips=24 steps=10 out=results/54_excitations-centred-XS
	OMP_NUM_THREADS=1 $(RUN) nbs/56_ablation_decoder.ipynb --out results/56_ablation_decoder-XS.ipynb size=XS steps=2000 batch=2 \
	    seeds=3 at_once=2 only="image decoder, trained on; without TCM; without refinement; all" \
	    out=results/56_ablation_decoder-XS
	$(RUN) nbs/60_cost.ipynb --out results/60_cost-H.ipynb \
	    size=H apart=L learner=S latent=8x16x16 batch=8 channels=320 rounds=9 compiled=True out=results/60_cost-H
	$(RUN) nbs/62_decoder_cost.ipynb --out results/62_decoder_cost-SD.ipynb \
	    widths=SD latent=16x4x4 rounds=7 long=128 lengths=24,32,64 out=results/62_decoder_cost-SD
	$(RUN) nbs/62_decoder_cost.ipynb --out results/62_decoder_cost-XS.ipynb \
	    widths=XS latent=16x8x8 rounds=15 long=128 lengths=24,64,128 out=results/62_decoder_cost-XS
	$(RUN) nbs/61_scale.ipynb --out results/61_scale-XS.ipynb size=XS steps=6 out=results/61_scale-XS
	$(RUN) nbs/63_loading.ipynb --out results/63_loading-XS.ipynb size=XS n=64 height=256 width=256 rounds=5 out=results/63_loading-XS
	$(RUN) nbs/63_loading.ipynb --out results/63_loading-XS-one.ipynb size=XS n=64 height=256 width=256 rounds=5 workers=1 out=results/63_loading-XS-one
	$(RUN) nbs/64_broken.ipynb --out results/64_broken.ipynb n=10000 out=results/64_broken
	$(RUN) nbs/65_startup.ipynb --out results/65_startup.ipynb rounds=5 steps=4 out=results/65_startup
	$(RUN) nbs/66_roofline.ipynb --out results/66_roofline-H.ipynb \
	    sizes="L H" batches="16 4" compiled=L measured=results/h200/61_gpu-H out=results/66_roofline-H
	$(BIN)/nbdev_clean --fname results
	rm -rf results/*-XS-s?/checkpoints results/*/cache results/*/trainings
	$(BIN)/versvideo results drift
endif

# Continues from the trainings of make results: trains the ControlNet and the style adapter on more clips
# on a GPU and puts them into the embedded model, then measures both, and the cost of the larger sizes.
# (Records that name the embedded model as their start began with the same weights.)
# The records in results/h200 were made before the last two rounds of the UNet, which the ControlNet and the adapter then had
# a last round on; 54_excitations-XS was measured before them as well.
XS := versvideo/weights/XS
results-gpu: $(INSTALLED)
	@$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make results-gpu needs a GPU")'
	$(RUN) nbs/22_train_controlnet.ipynb --out results/h200/22_train_controlnet-styles2-XS-s2.ipynb \
	    size=XS controlnet=results/22_train_controlnet-styles2-XS-s1/weights steps=1300 batch=32 workers=11 seed=2 style=0 \
	    out=results/h200/22_train_controlnet-styles2-XS-s2
	$(RUN) nbs/23_train_style.ipynb --out results/h200/23_train_style-styles2-XS-s3.ipynb \
	    size=XS stage=captions even=True style_dropout=0.3 adapter=results/23_train_style-styles2-XS-s2/weights steps=1500 batch=64 workers=12 seed=3 \
	    out=results/h200/23_train_style-styles2-XS-s3
	$(BIN)/versvideo results ship $(XS) $(XS)/vae $(XS)/image_vae $(XS) $(XS)/classifier \
	    results/h200/22_train_controlnet-styles2-XS-s2/weights results/h200/23_train_style-styles2-XS-s3/weights \
	    results/27_distill-XS-s0/weights to_q,to_k,to_v
	$(RUN) nbs/43_follow.ipynb --out results/h200/43_follow-XS.ipynb size=XS n=96 batch=96 guidance=2 out=results/h200/43_follow-XS
	$(RUN) nbs/44_style.ipynb --out results/h200/44_style-XS.ipynb size=XS n=96 batch=96 out=results/h200/44_style-XS
	$(RUN) nbs/61_gpu.ipynb --out results/h200/61_gpu-H.ipynb sizes="L H" batches="16 4" forms="eager layers whole" \
	    steps=50 rounds=3 processes="1 2 4 8" out=results/h200/61_gpu-H
	$(BIN)/nbdev_clean --fname results
	rm -rf results/h200/*-XS-s?/checkpoints results/h200/*/cache
	$(BIN)/versvideo results drift

clean:
	rm -rf out build dist *.egg-info .pytest_cache .ruff_cache
