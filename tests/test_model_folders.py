"""Model folders as people have them: padded vocabularies, files left over, facts said twice, broken weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from stages import assert_same_weights, run

from nanorlhf.data.tokenizer import llama3_specials, load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.run.config import parse
from nanorlhf.run.run import read_metrics
from nanorlhf.storage import checkpoint
from nanorlhf.storage.checkpoint import check_folder, load_policy, load_scalar, save_policy
from nanorlhf.storage.model_config import read_config
from nanorlhf.storage.weights import check_weights

TINY = Path(__file__).parents[1] / "nanorlhf" / "tiny"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def flag(models: dict[str, str], script: str, name: str) -> Path:
    """The folder that a script's flags name."""
    words = models[script].split()
    return Path(words[words.index(f"--{name}") + 1])


def padded(folder: Path, to: Path, rows: int) -> Path:
    """A copy with more rows: each is the row of EOS, the likeliest token there is."""
    shutil.copytree(folder, to)
    name = "model.embed_tokens.weight"
    edit_tensors(to, lambda t: t.update({name: torch.cat([t[name], t[name][2:3].repeat(rows, 1)])}))
    edit_config(to, vocab_size=read_config(folder).vocab_size + rows)
    return to


# --- rows that no token has -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train_sft", "train_rm", "train_ppo"])
def test_rows_that_no_token_has_change_nothing_in_any_script(script, world, models, tmp_path, capsys):
    """Bit for bit: a policy with 64 likely rows more, beside a reward model without them (and with 7 others)."""
    name = "model" if script == "train_sft" else "sft_model"
    more = padded(flag(models, script, name), tmp_path / "padded", 64)
    flags = f"--{name} {more}"
    if script == "train_ppo":
        flags += f" --reward_model {padded(flag(models, script, 'reward_model'), tmp_path / 'padded_rm', 7)}"
    straight = run(script, world, f"{models[script]} --max_updates 2 --run_name straight")
    capsys.readouterr()
    other = run(script, world, f"{flags} --max_updates 2")
    assert f"{more} has 64 rows that no token has: they are left out" in capsys.readouterr().out
    assert_same_weights(straight, other)
    assert read_config(other / "final").vocab_size == load_tokenizer(TINY).vocab_size
    ours, theirs = ([{k: v for k, v in row.items() if not k.startswith(("time", "perf"))} for row in read_metrics(f)]
                    for f in (straight, other))  # fmt: skip
    assert ours == theirs


def test_a_model_of_an_odd_number_of_rows_is_cut_to_its_tokens_and_saved_so(make_policy, tokenizer, tmp_path):
    policy = make_policy(vocab_size=97, tie_word_embeddings=False)
    save_policy(policy, tmp_path / "whole", tokenizer)
    tokenizer.vocab_size = 89
    cut = load_policy(tmp_path / "whole", tokenizer=tokenizer)
    assert torch.equal(cut.head_weight, policy.head_weight[:89])
    save_policy(cut, tmp_path / "cut", tokenizer)
    assert torch.equal(load_policy(tmp_path / "cut").model.embed_tokens.weight, policy.model.embed_tokens.weight[:89])


# --- two sources for a fact -------------------------------------------------------------------------------------------


def sharded(policy, folder: Path, tokenizer, monkeypatch) -> Path:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "MAX_SHARD_BYTES", 20_000)
        save_policy(policy, folder, tokenizer)
    return folder


def test_an_index_whose_shards_are_gone_does_not_hide_the_file(make_policy, tokenizer, tmp_path, monkeypatch):
    policy = make_policy(seed=1)
    old, new = sharded(make_policy(seed=0), tmp_path / "old", tokenizer, monkeypatch), tmp_path / "new"
    save_policy(policy, new, tokenizer)
    shutil.copy(old / "model.safetensors.index.json", new)
    assert torch.equal(load_policy(new).head_weight, policy.head_weight)
    for path in old.glob("model-*.safetensors"):
        shutil.copy(path, new)
    with pytest.raises(UserError, match=r"holds the weights twice, in model.safetensors and in the \d+ files"):
        load_policy(new)
    (new / "model.safetensors").unlink()
    assert not torch.equal(load_policy(new).head_weight, policy.head_weight)


def test_a_tensor_that_the_index_does_not_name_or_that_two_files_hold_is_named(
    make_policy, tokenizer, tmp_path, monkeypatch
):
    folder = sharded(make_policy(), tmp_path / "final", tokenizer, monkeypatch)
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    whole = load_file(first)
    save_file(whole | {"model.extra": torch.zeros(2)}, first)
    with pytest.raises(UserError, match=rf"{first.name}: holds tensor model.extra, which .*index.json does not name"):
        load_policy(folder)
    save_file(whole, first)
    name = next(iter(whole))
    save_file(load_file(second) | {name: whole[name]}, second)
    with pytest.raises(UserError, match=rf"{second.name}: holds tensor {name}, as {first.name} does"):
        load_policy(folder)


def test_a_head_beside_tied_embeddings_has_to_be_equal_to_them(make_policy, tokenizer, tmp_path):
    policy = make_policy()
    folder = tmp_path / "final"
    save_policy(policy, folder, tokenizer)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].half()}))
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_policy(folder)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].double()}))
    assert torch.equal(load_policy(folder).head_weight, policy.head_weight)


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": SCALED},
         r"rope_parameters default and rope_scaling \{'rope_type': 'llama3'"),
        ({"rope_parameters": SCALED, "rope_scaling": SCALED | {"factor": 32.0}}, "'factor': 8.0.*'factor': 32.0"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 5e5, "rope_scaling": None},
         "rope_theta in rope_parameters 10000.0 and rope_theta 500000.0"),
        ({"rope_scaling": SCALED | {"type": "linear"}}, "expected one rope_type"),
        ({"rope_scaling": SCALED | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor of 1.0 or none"),
        ({"rope_parameters": {"full_attention": SCALED}}, "the same for all layers"),
    ],
)  # fmt: skip
def test_rotary_positions_that_are_said_twice_have_to_agree(saved, changes, said):
    edit_config(saved[1], **changes)
    with pytest.raises(UserError, match=said):
        load_policy(saved[1])


def test_rotary_positions_may_be_said_twice(saved):
    edit_config(saved[1], rope_parameters=SCALED | {"rope_theta": 5e5}, rope_scaling=SCALED | {"type": "llama3"},
                rope_theta=500000)  # fmt: skip
    config = read_config(saved[1])
    assert config.rope_scaling == SCALED and config.rope_theta == 5e5


def test_an_adapter_beside_the_weights_is_refused(saved):
    (saved[1] / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="adapter_config.json: an adapter .LoRA. lies beside the model"):
        load_policy(saved[1])


# --- EOS and PAD ------------------------------------------------------------------------------------------------------


def test_an_eos_among_several_is_accepted_and_the_one_that_is_used_is_saved(models, tmp_path):
    folder, tokenizer = tmp_path / "several", load_tokenizer(TINY)
    shutil.copytree(flag(models, "train_sft", "model"), folder)
    edit_config(folder, eos_token_id=[5, 2], pad_token_id=-1)
    (note,) = check_folder(folder, tokenizer)
    assert note.startswith(f"note    {folder} also ends at 5, as instruct models do; summaries end at 2 alone")
    save_policy(load_policy(folder, tokenizer=tokenizer), tmp_path / "saved", tokenizer)
    raw = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert raw["eos_token_id"] == 2 and raw["pad_token_id"] == tokenizer.pad_id
    edit_config(folder, eos_token_id=[5, 6])
    with pytest.raises(UserError, match="tokenizer: its EOS is 2, expected the model's eos_token_id 5, 6"):
        check_folder(folder, tokenizer)


def test_an_eos_that_only_generation_config_names_is_said_too(saved, tokenizer):
    """As Meta-Llama-3-8B-Instruct was published: one EOS in config.json, two in generation_config.json."""
    tokenizer.vocab_size, folder = 97, saved[1]
    assert check_folder(folder, tokenizer) == []
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7, None]}), encoding="utf-8")
    (note,) = check_folder(folder, tokenizer)
    assert f"{folder} also ends at 7, as instruct models do; summaries end at 2 alone" in note


def test_an_instruct_model_is_named_as_one_and_so_is_its_base(make_policy, tokenizer, tmp_path):
    from test_tokenizer import write_llama3_folders

    write_llama3_folders(tmp_path)
    real = load_tokenizer(tmp_path / "llama3")
    turn = llama3_specials(real.vocab_size - 256)["<|eot_id|>"]
    folder = tmp_path / "models--meta-llama--Llama-3.2-1B-Instruct" / "snapshots" / "0"
    save_policy(make_policy(vocab_size=real.vocab_size), folder, tokenizer)
    (folder / "generation_config.json").unlink()  # which names the EOS of another tokenizer
    edit_config(folder, eos_token_id=[real.eos_id, turn])
    (note,) = check_folder(folder, real)
    assert f"also ends at {turn}" in note and note.endswith("one begins with meta-llama/Llama-3.2-1B")
    edit_config(folder, eos_token_id=turn)
    with pytest.raises(
        UserError, match=rf"its eos_token_id is {turn}, .*: begin with meta-llama/Llama-3.2-1B|instruct"
    ):
        check_folder(folder, real)


# --- numbers that are not finite, or of another kind ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_model_and_tensor(bad, models, tmp_path):
    folder = tmp_path / "bad"
    shutil.copytree(flag(models, "train_ppo", "reward_model"), folder)
    edit_tensors(folder, lambda t: t["score.weight"].view(-1)[3:4].fill_(bad))
    for load in (load_scalar, check_weights):
        with pytest.raises(UserError, match=rf"{folder}: tensor score.weight holds {bad}, expected finite numbers"):
            load(folder)


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
def test_an_infinite_number_in_config_json_is_refused(field, saved):
    edit_config(saved[1], **{field: float("inf")})
    with pytest.raises(UserError, match=f"{field} is inf, expected a number like"):
        load_policy(saved[1])


@pytest.mark.parametrize("shift", [float("nan"), float("-inf"), "0.5", None, [1.0], True])
def test_a_score_shift_that_is_no_number_is_refused_before_anything_is_read(shift, models, tmp_path):
    folder, tokenizer = tmp_path / "rm", load_tokenizer(TINY)
    shutil.copytree(flag(models, "train_ppo", "reward_model"), folder)
    edit_config(folder, score_shift=shift)
    for look in (lambda: check_folder(folder, tokenizer, scalar=True), lambda: load_scalar(folder)):
        with pytest.raises(UserError, match=r"score_shift in config.json is .*, expected a finite number"):
            look()


def too_large(models, folder: Path) -> Path:
    """A reward model whose weights are finite, and whose scores are not."""
    shutil.copytree(flag(models, "train_ppo", "reward_model"), folder)
    edit_tensors(folder, lambda t: t["score.weight"].fill_(3e38))
    return folder


def test_scores_that_overflow_end_an_evaluation_before_anything_is_written(models, world, tmp_path, monkeypatch):
    import eval

    monkeypatch.setattr(eval, "write", None)  # what would take hours
    sft = flag(models, "train_ppo", "sft_model")
    flags = f"--preset tiny --device cpu --data {world} --policy sft={sft} --num_posts 8 --reward_model "
    flags += str(too_large(models, tmp_path / "rm"))
    with pytest.raises(UserError, match="reward model: its score of a summary of post tiny-.* is not finite"):
        eval.main(parse(eval.Config, eval.PRESETS, eval.__doc__, flags.split()))


def test_scores_that_overflow_in_every_sample_are_not_to_be_skipped(models, world, tmp_path):
    rm = too_large(models, tmp_path / "rm")
    with pytest.raises(UserError, match=r"update 1: scores \(.*so a model that was passed in is too large") as caught:
        run("train_ppo", world, f"{models['train_ppo']} --reward_model {rm}")
    assert "--on_nan" not in str(caught.value)


def test_float64_weights_are_read(saved):
    edit_tensors(saved[1], lambda t: t.update({name: tensor.double() for name, tensor in t.items()}))
    assert torch.equal(load_policy(saved[1]).head_weight, saved[0].head_weight)


def test_dropout_is_refused_for_what_it_is(saved):
    edit_config(saved[1], attention_dropout=0.1)
    with pytest.raises(UserError, match=r"attention_dropout is 0.1, expected 0.0: dropout is left out here") as caught:
        load_policy(saved[1])
    assert "only the Llama architecture" not in str(caught.value)
