"""Seconds of one update of TRL's PPOTrainer on the embedded tiny models: what bench.against starts with --trl_python.

    VENV/bin/python -P bench/trl_ppo.py --settings ... --queries FILE

Needs trl (0.29 to 1.12, where it is trl.experimental.ppo), and nothing of nanorlhf, which that environment does not
have: it reads posts as token ids from a file that bench.against writes. One JSON line last.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

CHECKPOINTS = Path(__file__).parents[1] / "nanorlhf" / "tiny" / "checkpoints"


class Clock(TrainerCallback):
    """When each update ended."""

    def __init__(self):
        self.times: list[tuple[float, float]] = []  # (on the wall, of the CPU)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.times.append((time.perf_counter(), time.process_time()))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--updates", type=int, default=3, help="the first warms up")
    parser.add_argument("--settings", type=json.loads, required=True, help="of train_ppo.Config, as JSON")
    parser.add_argument("--queries", type=Path, required=True, help="a JSON list of lists of token ids")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cfg, queries = args.settings, json.loads(args.queries.read_text(encoding="utf-8"))
    words = {f"t{n}": n for n in range(1280)}  # only PAD and EOS of a tokenizer are used
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="t0")), pad_token="t0",
                                        bos_token="t1", eos_token="t2", padding_side="left")  # fmt: skip
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(CHECKPOINTS / "sft", dtype=torch.float32) for _ in range(2)
    )
    reward_model, critic = (AutoModelForSequenceClassification.from_pretrained(CHECKPOINTS / "rm", dtype=torch.float32)
                            for _ in range(2))  # fmt: skip
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, report_to="none", save_strategy="no", eval_strategy="no",
            disable_tqdm=True, num_sample_generations=0, logging_strategy="no", gradient_checkpointing=False,
            per_device_train_batch_size=args.rows, gradient_accumulation_steps=args.batch_size // args.rows,
            local_rollout_forward_batch_size=args.rows, num_mini_batches=1, num_ppo_epochs=cfg["num_ppo_epochs"],
            total_episodes=args.updates * args.batch_size, response_length=cfg["response_length"], stop_token="eos",
            temperature=cfg["temperature"], kl_coef=cfg["kl_coef"], lam=cfg["lam"], learning_rate=cfg["lr"],
        )  # fmt: skip
        trainer = PPOTrainer(
            args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward_model,
            value_model=critic, train_dataset=Dataset.from_dict({"input_ids": queries}), callbacks=[clock],
            eval_dataset=Dataset.from_dict({"input_ids": queries[:2]}),
        )  # fmt: skip
        trainer.train()
    took = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(clock.times, clock.times[1:], strict=False)]
    wall, busy = (median(column) for column in zip(*took, strict=True))
    print(json.dumps({"trl": trl.__version__, "threads": args.threads, "seconds": wall, "cpu": busy}))


if __name__ == "__main__":
    main()
