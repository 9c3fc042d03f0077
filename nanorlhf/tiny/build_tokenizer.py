"""Trains the tiny world's tokenizer: sentencepiece BPE in which nearly every word is one piece.

    python -m nanorlhf.tiny.build_tokenizer

It reads any text (byte fallback) and gives it back unchanged, except for U+2581, the mark that sentencepiece itself
uses for a space. The model that lies beside this file was written by this script, and so was tokenizer_config.json,
which we do not read: it tells transformers and vLLM to put one BOS before a prompt and no space.
"""

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

from nanorlhf.data.tldr import format_query
from nanorlhf.run.streams import as_command
from nanorlhf.tiny.corpus import document
from nanorlhf.tiny.grammar import evenly
from nanorlhf.tiny.posts import make_post

VOCAB_SIZE = 1280  # 256 of them are the bytes of byte fallback
DOCUMENTS = 12_000
POSTS = 6_000
FOR_OTHERS = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": False,
    "add_bos_token": True,
    "add_eos_token": False,
    "add_prefix_space": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
}


def training_text() -> Iterator[str]:
    """What the model will read: pretraining documents, queries and responses (a response opens with a space)."""
    for index in range(DOCUMENTS):
        yield document(index)
    for index in range(POSTS):
        post = make_post("pretrain", index, evenly)
        yield format_query(post.subreddit, post.title, post.post) + " " + post.summary


def train_tokenizer(folder: str | Path) -> Path:
    """Trains the tokenizer and writes folder/tokenizer.model and tokenizer_config.json; the same bytes every time.
    Returns the model's path."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=training_text(),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=["\n\n"],  # the blank line between the fields of a query is one piece
        unk_id=0,  # never produced, thanks to byte fallback: it doubles as PAD
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path = Path(folder) / "tokenizer.model"
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, path)
    path.with_name("tokenizer_config.json").write_text(json.dumps(FOR_OTHERS, indent=2) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    as_command(lambda: print(train_tokenizer(Path(__file__).parent)))
