"""Speed costs no exactness: 50 updates of each stage log what they log through the references, to rounding.

The fast paths of a CPU: oneDNN, gradients by hand, the two summaries of a pair in one sequence, policy and critic side
by side. Those of a GPU run in Triton's interpreter (interpreter/test_training.py).
"""

import pytest
import torch
from stages import run

import train_rm
from kernels import runtime
from nanorlhf.packing import pack
from nanorlhf.run.run import read_metrics

FLAGS = {
    "train_sft": "--max_updates 50 --lr 1e-3 --num_epochs 7",
    "train_rm": "--max_updates 50 --lr 1e-3 --num_epochs 7",
    "train_ppo": "--total_episodes 400 --lr 1e-4 --sample_every 0 --num_ppo_epochs 2 --response_length 12"
    " --num_minibatches 1 --critic_warmup 0 --critic_lr None --lr_warmup 0 --kl_coef 0.15",
}
LOSSES = {
    "train_sft": ["train/sft/loss", "grad_norm"],
    "train_rm": ["train/rm/loss", "train/rm/margin", "grad_norm"],
    "train_ppo": ["loss/policy_avg", "loss/value_avg", "objective/kl", "objective/scores", "policy/approxkl_avg"],
}


def two_sequences(queries, chosen, rejected, device):
    """The pairs as the paper's code packs them: every query twice."""
    return pack([q + s for side in (chosen, rejected) for q, s in zip(queries, side, strict=True)], device)


@pytest.mark.parametrize("name", FLAGS)
def test_50_updates_agree_with_the_reference_path(name, world, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads, rows = torch.get_num_threads(), []
    for fast in (True, False):
        with monkeypatch.context() as patch:
            torch.set_num_threads(2 if fast else 1)  # two: policy and critic side by side
            if not fast:
                patch.setattr(runtime, "MODE", "torch")
                patch.setattr(train_rm, "pack_pairs", two_sequences)
            folder = run(
                name, world, f"{models[name]} {FLAGS[name]} --save_every 0 --run_name {'fast' if fast else 'slow'}"
            )
            rows.append([row for row in read_metrics(folder) if LOSSES[name][0] in row])
    torch.set_num_threads(threads)
    assert len(rows[0]) == len(rows[1]) == 50
    different = 0
    for ours, plain in zip(*rows, strict=True):
        for metric in LOSSES[name]:
            assert ours[metric] == pytest.approx(plain[metric], rel=1e-3, abs=1e-4), (ours["step"], metric)
            different += ours[metric] != plain[metric]
    assert different  # two paths, not one twice
    first, last = rows[0][0], rows[0][-1]
    assert abs(first[LOSSES[name][0]] - last[LOSSES[name][0]]) > 1e-3  # and they go somewhere
