"""The card in a final folder says what the model is, how to use it, how it did and how it was made."""

import json

from nanorlhf.models import critic_from
from nanorlhf.run.card import card, write_card
from nanorlhf.storage.checkpoint import save_policy, save_scalar

RECORD = {
    "stage": "ppo", "argv": ["/home/me/nanorlhf/train_ppo.py", "--lr", "1e-6"], "git": {"commit": "abc123"},
    "device": "cpu (1 threads)", "dtype": "float32",
    "config": {"preset": "tiny", "run_name": "mine", "lr": 1e-6, "model": "/c/models--someone--llama-1b/snapshots/0/"},
}  # fmt: skip


def run_folder(tmp_path, rows):
    (tmp_path / "config.json").write_text(json.dumps(RECORD), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_a_card_is_written_beside_the_weights_with_the_last_of_each_metric(make_policy, tokenizer, tmp_path):
    folder = run_folder(
        tmp_path,
        [{"step": 1, "objective/scores": 0.25, "objective/kl": 1.0, "time/learn": 9.0},
         {"step": 2, "objective/scores": 0.5, "not_finite": {"objective/kl": "nan"}, "objective/entropy": None},
         {"step": 2, "eval/rm/validation/accuracy": 0.75, "eval/rm/validation/accuracy/batch/batch9": 0.6}],
    )  # fmt: skip
    save_policy(make_policy(), folder / "final", tokenizer)
    write_card(folder)
    text = (folder / "final" / "README.md").read_text(encoding="utf-8")
    front = text.split("---")[1]
    assert "base_model: someone/llama-1b" in front and "pipeline_tag: text-generation" in front
    assert "`python train_ppo.py --lr 1e-6` at commit abc123" in text and "| lr | 1e-06 |" in text
    for line in ("| objective/scores | 0.5 |", "| objective/kl | 1 |", "| eval/rm/validation/accuracy | 0.75 |"):
        assert line in text
    assert "time/learn" not in text and "batch9" not in text and "None |" not in text.split("## Config")[0]
    assert "no BOS: the tokenizer puts it there" in text
    assert "vllm serve final" in text and "stops at EOS (2)" in text and "AutoModelForCausalLM" in text


def test_a_later_stage_hands_the_base_model_on(make_policy, tokenizer, tmp_path):
    save_policy(make_policy(), tmp_path / "final", tokenizer)
    (tmp_path / "final" / "README.md").write_text(card(RECORD, {}, tmp_path / "final"), encoding="utf-8")
    later = RECORD | {"config": {"preset": "tiny", "run_name": "later", "sft_model": str(tmp_path / "final")}}
    assert "base_model: someone/llama-1b" in card(later, {}, tmp_path / "final").split("---")[1]
    alone = RECORD | {"config": {"preset": "tiny", "run_name": "alone", "sft_model": str(tmp_path / "nowhere")}}
    assert "base_model" not in card(alone, {}, tmp_path / "final")


def test_each_kind_of_model_says_how_its_output_is_read(make_scalar, tokenizer, tmp_path):
    reward_model = make_scalar(bias=False, score_shift=0.625)
    save_scalar(reward_model, tmp_path / "rm", tokenizer)
    text = card(RECORD, {}, tmp_path / "rm")
    assert (
        "AutoModelForSequenceClassification" in text
        and "minus config.json's `score_shift`, 0.625" in text
        and "vllm" not in text
    )
    save_scalar(critic_from(reward_model), tmp_path / "critic", tokenizer)
    text = card(RECORD | {"git": None}, {}, tmp_path / "critic")
    assert "AutoModelForTokenClassification" in text and "logits[0, t, 0]" in text and "commit unknown" in text
