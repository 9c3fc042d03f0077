"""The model card: README.md beside a run's weights, so that a folder that travels still says what it is.

It holds how to load and serve the model, the run's last metrics and its whole config, all read from the run folder.
"""

import json
import shlex
from pathlib import Path

from nanorlhf import parallel
from nanorlhf.data.hub import hub_id_of
from nanorlhf.run.run_folder import launcher, program
from nanorlhf.storage.jsonl import read_jsonl, write_whole

WHAT = {  # architecture -> what it is, transformers' class, the hub's name for the task
    "LlamaForCausalLM": ("A policy: it continues a post that ends in `TL;DR:` with a summary and EOS.",
                         "AutoModelForCausalLM", "text-generation"),
    "LlamaForSequenceClassification": ("A reward model: one number for a post and its summary, read at EOS.",
                                       "AutoModelForSequenceClassification", "text-classification"),
    "LlamaForTokenClassification": ("A critic: the expected score of a response, at each of its tokens.",
                                    "AutoModelForTokenClassification", "token-classification"),
}  # fmt: skip
SHOWN = ("train/sft/loss", "train/rm/loss", "train/dpo/loss", "validation/", "eval/rm/validation/accuracy",
         "eval/dpo/validation/accuracy", "objective/", "val/eos_rate", "episode")  # fmt: skip

QUERY = "SUBREDDIT: r/...\\n\\nTITLE: ...\\n\\nPOST: ...\\n\\nTL;DR:"


def write_card(run_folder: Path, final: str = "final") -> None:
    """Write README.md into a finished run's `final` folder; of several processes 0 does it."""
    if not parallel.first():
        return
    record = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
    metrics = {}
    for row in read_jsonl(run_folder / "metrics.jsonl"):
        metrics |= row
    write_whole(run_folder / final / "README.md", card(record, metrics, run_folder / final))


def card(record: dict, metrics: dict, folder: Path) -> str:
    """The text of a card. record: the run's config.json; metrics: the last value of each; folder: the model's."""
    model, settings = json.loads((folder / "config.json").read_text(encoding="utf-8")), record["config"]
    what, auto, task = WHAT[model["architectures"][0]]
    commit = (record.get("git") or {}).get("commit") or "unknown"
    start = [Path(word).name for word in program(record["argv"][0])]
    kept = {name: value for name, value in metrics.items() if name.startswith(SHOWN) and "accuracy/" not in name}
    command = shlex.join([*launcher(record), *start, *record["argv"][1:]])
    front = ["---", "library_name: transformers", f"pipeline_tag: {task}", "tags: [rlhf, ppo, tldr, nanorlhf]"]
    if base := _base_of(settings.get("model") or settings.get("sft_model") or ""):
        front.append(f"base_model: {base}")
    lines = [
        *front,
        "---",
        f"# {settings['run_name']}: stage {record['stage']} of nanorlhf",
        "",
        f"{what} Made by `{command}` at commit {commit}; preset {settings['preset']}, "
        f"{record['device']}, {record['dtype']}. The licences of its base model and its data apply.",
        "",
        "## Use",
        "",
        *_use(model, auto, folder),
        "",
        "## Last metrics",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.6g} |" for name, value in kept.items() if isinstance(value, int | float)),
        "",
        "## Config",
        "",
        "| flag | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
    ]
    return "\n".join(lines) + "\n"


def _base_of(folder: str) -> str | None:
    """The hub's id of the model that training began from: of the hub's cache, or handed on by the card of a stage."""
    there = Path(folder) / "README.md"
    lines = there.read_text(errors="replace", encoding="utf-8").splitlines() if there.is_file() else []
    handed_on = (line.removeprefix("base_model: ") for line in lines if line.startswith("base_model: "))
    return hub_id_of(folder) or next(handed_on, None)


def _use(model: dict, auto: str, folder: Path) -> list[str]:
    """The paragraph of a kind of model that says how its output is read."""
    load = ["```python", f'model = transformers.{auto}.from_pretrained("{folder.name}")', "```", ""]
    if auto == "AutoModelForCausalLM":
        return load + [
            f'The prompt is `"{QUERY}"`: no chat template, no space at its end, '
            "and no BOS: the tokenizer puts it there. "
            f"`generation_config.json` samples as in training and stops at EOS ({model['eos_token_id']}). To serve it:",
            "",
            "```",
            f"vllm serve {folder.name} --max-model-len 1024      # then POST /v1/completions",
            f"python convert_hf_to_gguf.py {folder.name}         # llama.cpp",
            "```",
        ]
    if auto == "AutoModelForSequenceClassification":
        shift = model["score_shift"]
        return load + [
            f"The score is `model(ids).logits[0, 0]` minus config.json's `score_shift`, {shift!r}: then the authors' "
            "own summaries have mean 0. The input is the prompt, one space, the summary and EOS.",
        ]
    return load + ["The value of the state after token t is `model(ids).logits[0, t, 0]`."]
