"""The fused PPO loss as the Triton kernel computes it, on a CPU: in Triton's interpreter, in a process of its own.

The kernel gives gradients of the hidden states and of the head, not of the logits. With the identity for a head the
hidden states *are* the logits, and their gradient is the one we want to see.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from kernels import linear_ppo_loss
from kernels.runtime import triton
from nanorlhf.run.streams import as_command

ROOT = Path(__file__).parents[2]


def start() -> subprocess.Popen | None:
    """The process with the interpreter, which gets ready while the walk goes on; None where Triton is not installed."""
    if triton is None:
        return None
    environment = os.environ | {"NANORLHF_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "docs.walking.fused"]
    streams = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, **streams, text=True, env=environment, cwd=ROOT, encoding="utf-8")


def gradient_of_logits(
    interpreter: subprocess.Popen | None, logits: Tensor, labels: Tensor, old_logprobs: Tensor, advantages: Tensor,
    weights: Tensor, **options: float,
) -> Tensor:  # fmt: skip
    """d loss / d logits (M, V) by the Triton kernel; nan where Triton is not installed. options: temperature, cliprange."""
    if interpreter is None:
        return torch.full_like(logits, float("nan"))
    rows = dict(logits=logits, labels=labels, old_logprobs=old_logprobs, advantages=advantages, weights=weights)
    sent = json.dumps([{name: tensor.tolist() for name, tensor in rows.items()}, options])
    made, said = interpreter.communicate(sent)
    if interpreter.returncode:
        raise RuntimeError(f"the fused kernel in Triton's interpreter: {said.strip().splitlines()[-1]}")
    return torch.tensor(json.loads(made))


def main() -> None:
    rows, options = json.load(sys.stdin)
    tensors = {name: torch.tensor(values) for name, values in rows.items()}
    logits = tensors.pop("logits").requires_grad_()
    identity = torch.eye(logits.shape[1])
    arguments = (tensors[name] for name in ("labels", "old_logprobs", "advantages", "weights"))
    linear_ppo_loss(logits, identity, *arguments, **options).loss.backward()
    json.dump(logits.grad.tolist(), sys.stdout)


if __name__ == "__main__":
    as_command(main)
