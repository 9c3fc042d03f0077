"""What we save is what others read: the same greedy text from transformers, and every field and name that vLLM and
llama.cpp's converter look for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_tokenizer import QUERY, train_sentencepiece, write_llama3_folders

from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.rollout import generate, read_responses
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.storage.checkpoint import load_policy, save_policy

READ_ELSEWHERE = {  # fields of config.json that transformers, vLLM or the converter read and that have no safe default
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "tie_word_embeddings", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype",
}  # fmt: skip


def bos_first(name: str, id: int) -> dict:
    """The post_processor of Llama 3's tokenizer.json: how a server comes to put BOS before a prompt."""
    a, b = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    bos = [{"SpecialToken": {"id": name, "type_id": of}} for of in (0, 1)]
    special = {name: {"id": name, "ids": [id], "tokens": [name]}}
    template = {"type": "TemplateProcessing", "single": [bos[0], a], "pair": [bos[0], a, bos[1], b]}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {"type": "Sequence", "processors": [byte_level, template | {"special_tokens": special}]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Tokenizer folders as of a Llama 3 and of a Llama 2."""
    root = tmp_path_factory.mktemp("bases")
    write_llama3_folders(root)
    train_sentencepiece(root / "llama2", add_dummy_prefix=True, byte_fallback=True, vocab_size=500)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>"}
    about |= {"eos_token": "<|end_of_text|>", "pad_token": "<|finetune_right_pad_id|>"}
    (root / "llama3" / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    as_on_the_hub = json.loads((root / "llama3" / "tokenizer.json").read_text(encoding="utf-8"))
    bos = next(token["id"] for token in as_on_the_hub["added_tokens"] if token["content"] == about["bos_token"])
    as_on_the_hub["post_processor"] = bos_first(about["bos_token"], bos)
    (root / "llama3" / "tokenizer.json").write_text(json.dumps(as_on_the_hub), encoding="utf-8")
    about = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    (root / "llama2" / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return root


@pytest.fixture
def final(bases, make_policy, tmp_path):
    """final(name, **changes) -> (folder that a run of ours would end with, its tokenizer, the policy)."""

    def make(name: str, **changes):
        shutil.copytree(bases / name, tmp_path / name)
        tokenizer = load_tokenizer(tmp_path / name)
        ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
        policy = make_policy(vocab_size=tokenizer.vocab_size, **ids, **changes)
        save_policy(policy, tmp_path / "final", tokenizer, temperature=0.9)
        shutil.rmtree(tmp_path / name)  # nothing may point back to the base model
        return tmp_path / "final", tokenizer, policy

    return make


@pytest.mark.parametrize("name, tied", [("llama3", True), ("llama2", False)])
def test_transformers_writes_the_same_greedy_text_from_our_folder(final, name, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, tokenizer, _ = final(name, tie_word_embeddings=tied)
    ids = [tokenizer.bos_id, *tokenizer.encode(QUERY)]
    responses, _ = generate(load_policy(folder), [ids], response_length=24, temperature=0.0)
    (ours,) = read_responses(tokenizer, responses)

    theirs = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked = theirs(QUERY, return_tensors="pt").input_ids  # as a server asks: BOS comes of itself, once
    assert asked[0].tolist() == ids
    written = model.generate(asked, max_new_tokens=24, do_sample=False)[0, len(ids) :].tolist()
    stopped = written[: written.index(tokenizer.eos_id)] if tokenizer.eos_id in written else written
    assert stopped == responses[0, : len(stopped)].tolist() and len(set(stopped)) > 3
    assert ours.text == tokenizer.decode(stopped)
    legible = [i for i in stopped if "\ufffd" not in tokenizer.decode([i])]  # half characters are shown in two ways
    assert theirs.decode(legible, skip_special_tokens=True).strip() == tokenizer.decode(legible).strip()


@pytest.mark.parametrize("stage", ["base", "sft", "rm", "ppo"])
def test_transformers_puts_one_bos_before_a_prompt_of_the_tiny_world(stage):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(EMBEDDED / stage), AutoTokenizer.from_pretrained(EMBEDDED / stage)
    for text in (QUERY, "naïve 🙂  two blanks\n\n", " a summary"):
        assert theirs(text).input_ids == [ours.bos_id, *ours.encode(text)]
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)


def test_generation_config_has_our_temperature_and_the_tokenizers_eos(final):
    folder, tokenizer, _ = final("llama3")
    raw = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert raw == {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id,
                   "do_sample": True, "temperature": 0.9, "top_p": 1.0, "top_k": 0}  # fmt: skip


@pytest.mark.parametrize("name, files", [("llama3", {"tokenizer.json", "tokenizer_config.json"}),
                                         ("llama2", {"tokenizer.model", "tokenizer_config.json"})])  # fmt: skip
def test_the_folder_has_what_a_server_reads_and_anyone_may_read_it(final, name, files):
    folder, _, _ = final(name)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert raw.keys() >= READ_ELSEWHERE and raw["architectures"] == ["LlamaForCausalLM"]
    found = {path.name for path in folder.iterdir()}
    assert found == {"config.json", "generation_config.json", "model.safetensors"} | files
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpps_converter_knows_every_tensor(final, tied):
    import gguf

    folder, _, policy = final("llama3", tie_word_embeddings=tied)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, policy.config.num_hidden_layers)
    theirs = {names.get_name(name, try_suffixes=(".weight",)) for name in load_file(folder / "model.safetensors")}
    layer = {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"}
    expected = {f"blk.{i}.{part}.weight" for i in range(policy.config.num_hidden_layers) for part in layer}
    expected |= {"token_embd.weight", "output_norm.weight"} | (set() if tied else {"output.weight"})
    assert theirs == expected
