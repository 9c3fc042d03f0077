"""config.json in and out: every spelling of a Llama is read, and anything else is refused by the name of its field."""

import json
from dataclasses import replace

import pytest
import torch

from nanorlhf.errors import UserError
from nanorlhf.llama import rope_frequencies
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.storage.model_config import read_config

SCALED = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if key not in remove}), encoding="utf-8")


def test_transformers_5s_rope_parameters_mean_the_same_as_the_hubs_fields(saved):
    policy, folder = saved
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert raw["rope_theta"] == 500000.0 and raw["rope_scaling"]["rope_type"] == "llama3"
    rope = raw["rope_scaling"] | {"rope_theta": raw["rope_theta"]}
    edit_config(folder, remove=("rope_theta", "rope_scaling"), rope_parameters=rope)
    assert read_config(folder) == policy.config
    edit_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert read_config(folder) == replace(policy.config, rope_theta=10000.0, rope_scaling=None)


def test_fields_that_old_configs_leave_out_have_their_old_meaning(saved):
    policy, folder = saved
    left_out = ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "rope_scaling", "pad_token_id")
    edit_config(folder, remove=(*left_out, "hidden_act"), eos_token_id=[2, 5])
    expected = replace(policy.config, num_key_value_heads=4, head_dim=8, rope_scaling=None, pad_token_id=None)
    assert read_config(folder) == expected


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"model_type": "mistral"}, r"model_type is 'mistral', expected 'llama'"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        ({"attention_bias": True}, r"attention_bias is True, expected false"),
        ({"mlp_bias": True}, r"mlp_bias is True"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0.1"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads is 3, expected a divisor of num_attention_heads = 4"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is {'bits': 4}, expected no such field"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0.5"),
        ({"hidden_size": "32"}, r"hidden_size is '32', expected a whole number"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers is 0, expected a whole number"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, r"rope_scaling is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 32.0}}, r"low_freq_factor"),
        ({"rope_scaling": {"rope_type": "llama3"} | SCALED | {"factor": "32"}}, r"expected four positive numbers"),
        ({"rope_scaling": {"rope_type": "llama3"} | SCALED | {"low_freq_factor": 4.0}}, r"low_freq_factor below"),
        ({"rope_scaling": "llama3"}, r"rope_scaling is 'llama3', expected null or an object"),
        ({"rope_theta": "500000"}, r"rope_theta is '500000', expected a number"),
        ({"rope_theta": -1.0}, r"rope_theta is -1.0, expected a number"),
        ({"num_key_value_heads": "2"}, r"num_key_value_heads is '2', expected a whole number"),
        ({"num_key_value_heads": -2}, r"num_key_value_heads is -2, expected a whole number"),
        ({"head_dim": 0}, r"head_dim is 0, expected a whole number"),
        ({"head_dim": 9}, r"head_dim is 9, expected an even number"),
        ({"max_position_embeddings": "2048"}, r"max_position_embeddings is '2048', expected a whole number"),
        ({"rms_norm_eps": -1e-5}, r"rms_norm_eps is -1e-05, expected a number"),
        ({"tie_word_embeddings": "no"}, r"tie_word_embeddings is 'no', expected true or false"),
        ({"eos_token_id": []}, r"eos_token_id is \[\], expected a token id"),
        ({"eos_token_id": None}, r"eos_token_id is None, expected a token id"),
        ({"remove": ("rope_theta",)}, r"rope_theta is missing"),
        ({"remove": ("model_type",)}, r"model_type is None"),
        ({"remove": ("rms_norm_eps",)}, r"rms_norm_eps is missing"),
        ({"remove": ("hidden_size",)}, r"hidden_size is missing"),
    ],
)
def test_a_config_that_is_no_llama_is_refused_by_field(saved, changes, named):
    edit_config(saved[1], **changes)
    with pytest.raises(UserError, match=named) as caught:
        load_policy(saved[1])
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "content, named", [("{", "not valid JSON"), ("[1]", "expected an object"), (None, "not found")]
)
def test_a_config_that_cannot_be_read_is_refused(saved, content, named):
    path = saved[1] / "config.json"
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=named):
        load_policy(saved[1])


# --- published configs ------------------------------------------------------------------------------------------------

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
PUBLISHED = {  # as on the hub, without fields that shape nothing
    "Llama-2-7b": dict(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=32,
                       num_key_value_heads=32, max_position_embeddings=4096, rope_scaling=None, vocab_size=32000),
    "TinyLlama": dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_hidden_layers=22,
                      num_key_value_heads=4, max_position_embeddings=2048, rope_scaling=None, rope_theta=10000.0,
                      vocab_size=32000),
    "Llama-3-8B": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32,
                       num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, vocab_size=128256),
    "Llama-3.1-8B": dict(hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_hidden_layers=32,
                         num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, vocab_size=128256,
                         rope_scaling={"rope_type": "llama3", "factor": 8.0} | LLAMA3),
    "Llama-3.2-1B": dict(hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_hidden_layers=16,
                         num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rope_theta=500000.0,
                         rope_scaling={"rope_type": "llama3", "factor": 32.0} | LLAMA3, vocab_size=128256),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotary_frequencies_of_every_published_llama_are_those_of_transformers(name, tmp_path):
    from transformers import LlamaConfig as TheirConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    raw = PUBLISHED[name] | {"model_type": "llama", "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    config = read_config(tmp_path)
    assert config.head_dim == raw["hidden_size"] // raw["num_attention_heads"]
    oracle = LlamaRotaryEmbedding(TheirConfig(**raw))
    assert oracle.attention_scaling == 1
    torch.testing.assert_close(rope_frequencies(config), oracle.inv_freq, rtol=1e-6, atol=0)


def test_only_llama_1_and_2_may_leave_out_rope_theta(saved):
    _, folder = saved
    edit_config(folder, remove=("rope_theta", "rope_scaling"), max_position_embeddings=4096)
    assert read_config(folder).rope_theta == 10000.0
    edit_config(folder, max_position_embeddings=8192)
    with pytest.raises(UserError, match="rope_theta is missing .* only for Llama 1 and 2"):
        read_config(folder)
