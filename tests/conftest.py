"""What the tests share: small random models, and a tokenizer that is only its special ids."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: how long a CPU thread waits awake for the others
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as the scripts: graphs are captured in it too
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the oracle is built from random weights; nothing may be downloaded
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes side by side: each keeps to one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from types import SimpleNamespace

import pytest
import torch

from nanorlhf.llama import LlamaConfig
from nanorlhf.models import Policy, ScalarModel
from nanorlhf.storage.checkpoint import save_policy

# A shell starts what it puts into the background with SIGINT ignored, and children inherit that: back to a terminal's.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup does that
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# These need processes of their own, which test_triton.py starts: Triton decides once whether kernels are interpreted.
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreter"]


def pytest_xdist_auto_num_workers(config) -> int:
    """`-n auto`: a process a core, 8 at most (a gigabyte each); on a GPU one, because tests measure its memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if torch.cuda.is_available() else min(cores, 8)


# The files with the longest single tests. They go first, so that no process waits for another's at the end.
LONGEST = ("test_triton.py", "test_faults.py", "test_trackers.py", "test_plan.py", "test_llama.py", "test_real_text.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))  # stable: the others keep their order


# Two query heads for each key/value head, and a rotary context so short that all regimes of Llama 3's scaling occur.
TINY = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling={
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


@torch.no_grad()
def scramble(model: torch.nn.Module, seed: int) -> None:
    """Random weights; no parameter is left at a value where a mistake would not show (a norm of 1, a bias of 0)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_(1 + 0.1 * noise)
        else:
            parameter.copy_(noise * (0.5 if "embed" in name else 1.5 * parameter.shape[1] ** -0.5))


@pytest.fixture
def make_config():
    """make_config(**changes) -> the tiny LlamaConfig with some fields changed."""
    return lambda **changes: LlamaConfig(**{**vars(TINY), **changes})


@pytest.fixture
def make_policy(make_config):
    """make_policy(seed=0, **changes to the config) -> a random Policy."""

    def make(seed: int = 0, **changes) -> Policy:
        policy = Policy(make_config(**changes))
        scramble(policy, seed)
        return policy

    return make


@pytest.fixture
def make_scalar(make_config):
    """make_scalar(bias, score_shift=0.0, seed=0) -> a random reward model (no bias) or critic (bias)."""

    def make(bias: bool, score_shift: float = 0.0, seed: int = 0) -> ScalarModel:
        model = ScalarModel(make_config(), bias=bias, score_shift=score_shift)
        scramble(model, seed)
        return model

    return make


@pytest.fixture
def make_sequences():
    """make_sequences(lengths, seed=0) -> token lists of those lengths, without PAD, BOS and EOS."""

    def make(lengths: list[int], seed: int = 0) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(3, TINY.vocab_size, (length,), generator=generator).tolist() for length in lengths]

    return make


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small tiny world on disk."""
    from stages import write_small_world  # here: few tests need the scripts

    return write_small_world(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def models(tmp_path_factory, world):
    """Flags that name a small random base model, SFT model and reward model, for each script."""
    from stages import write_small_models

    return write_small_models(tmp_path_factory.mktemp("models"), world)


@pytest.fixture
def tokenizer():
    """What saving a model needs of a tokenizer."""
    return SimpleNamespace(bos_id=1, eos_id=2, pad_id=0, save=lambda folder: None)


@pytest.fixture
def saved(make_policy, tokenizer, tmp_path):
    """(a policy with a head of its own, the folder it was saved to)."""
    policy = make_policy(tie_word_embeddings=False)
    save_policy(policy, tmp_path / "final", tokenizer)
    return policy, tmp_path / "final"
