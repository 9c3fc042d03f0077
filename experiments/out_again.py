"""Greedy text of one folder by three programs in fp32: our decoder, transformers, and llama.cpp from a GGUF of it."""

import importlib.util
import tempfile
from pathlib import Path

import torch

from experiments.gguf_folder import folder_from_gguf, gguf_from_folder, llama_cpp_answers
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.rollout import generate, read_responses
from nanorlhf.storage.checkpoint import load_policy


def out_again(folder: str, queries: list[list[int]], tokens: int, device: torch.device) -> dict:
    """-> posts: how many queries; same_greedy_text: those for which transformers writes our `tokens` tokens, up to EOS;
    gguf_same_tensors: whether every tensor comes back from a GGUF; same_in_llama_cpp, where xllamacpp is installed.
    """
    tokenizer, policy = load_tokenizer(folder), load_policy(folder, device, torch.float32)
    ours = generate(policy, queries, tokens, temperature=0.0)[0].tolist()
    found = {"posts": len(ours), "same_greedy_text": same_in_transformers(folder, queries, ours, device)}
    with tempfile.TemporaryDirectory() as name:
        file, back = Path(name) / "model.gguf", Path(name) / "back"
        gguf_from_folder(folder, file, "f32")
        folder_from_gguf(file, back, torch.float32)
        pairs = zip(load_policy(back).state_dict().items(), policy.state_dict().items(), strict=True)
        found["gguf_same_tensors"] = all(a == b and torch.equal(x, y.cpu()) for (a, x), (b, y) in pairs)
        if importlib.util.find_spec("xllamacpp"):
            texts = [summary.text for summary in read_responses(tokenizer, torch.tensor(ours))]
            answers = [answer.strip() for answer in llama_cpp_answers(file, queries, tokens)]
            found["same_in_llama_cpp"] = sum(_shown(a) == _shown(b) for a, b in zip(answers, texts, strict=True))
    return found


def same_in_transformers(folder: str, queries: list[list[int]], ours: list[list[int]], device: torch.device) -> int:
    """For how many queries transformers' `generate` writes `ours`, up to its EOS."""
    from transformers import AutoModelForCausalLM

    theirs, same = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device), 0
    for query, response in zip(queries, ours, strict=True):
        asked = torch.tensor([query], device=device)
        written = theirs.generate(asked, max_new_tokens=len(response), do_sample=False)[0, len(query) :].tolist()
        same += written == response[: len(written)]  # theirs stops at EOS
    return same


def _shown(text: str) -> str:
    """Without half characters, which the two show in different ways."""
    return text.replace("\ufffd", "")
