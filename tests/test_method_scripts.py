"""train_dpo, train_rloo, best_of_n and train_ppo's ensembles, end to end on a small tiny world, and with bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from stages import ROOT, Killed, assert_same_weights, start
from stages import SCRIPTS as STAGES
from stages import run as run_stage

from experiments import best_of_n, train_dpo, train_rloo
from experiments.methods import ADVANTAGES
from experiments.metric_ranges import PAGE, names, pattern, sections
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.evaluation.judge import gold_scores
from nanorlhf.evaluation.summaries import read_samples
from nanorlhf.models import reward_model_from
from nanorlhf.run.config import parse, unread_fields
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.run.run_folder import resume_command
from nanorlhf.storage.checkpoint import load_policy, save_scalar
from nanorlhf.storage.jsonl import read_jsonl

SCRIPTS = {"train_dpo": train_dpo, "train_rloo": train_rloo, "best_of_n": best_of_n}
SMALL = {
    "train_dpo": "--batch_size 4 --eval_pairs 16 --max_updates 4",
    "train_rloo": "--batch_size 8 --total_episodes 32 --response_length 24 --num_minibatches 2",
    "best_of_n": "--posts 6 --response_length 24",
}
OWN = "experiments.train_dpo, experiments.train_rloo, experiments.best_of_n"  # a heading of docs/metrics.md
CLOCKS = ("time", "perf/", "preflight/")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def inputs(models):
    """Flags that name the small models, for each script."""
    sft, rm = models["train_ppo"].split("--reward_model ")
    policy = sft.replace("--sft_model", "--policy")
    return {"train_dpo": sft, "train_rloo": f"{sft} --reward_model {rm}", "best_of_n": f"{policy} --reward_model {rm}"}


@pytest.fixture
def another(world, models, tmp_path):
    """A second reward model, of another seed."""
    folder = Path(models["train_ppo"].split("--reward_model ")[1])
    second, tokenizer = reward_model_from(load_policy(models["train_rm"].split()[1]), seed=5), load_tokenizer(folder)
    references = zip(*encode_posts(load_posts(world, "train"), tokenizer, 104), strict=True)
    second.score_shift = second.scores([query + reference for query, reference in references]).mean().item()
    save_scalar(second, tmp_path / "rm2", tokenizer)
    return tmp_path / "rm2"


def start_script(name: str, flags: str) -> Path:
    script = SCRIPTS[name]
    cfg = parse(script.Config, script.PRESETS, script.__doc__, flags.split())
    script.main(cfg)
    return Path("runs") / cfg.run_name


def run(name: str, world: Path, more: str = "") -> Path:
    return start_script(name, f"--preset tiny --device cpu --data {world} {SMALL[name]} {more}")


def values(folder: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in read_metrics(folder)]


# -- what they write


def test_dpo_learns_from_comparisons_and_leaves_a_policy(world, inputs):
    folder = run("train_dpo", world, f"{inputs['train_dpo']} --num_epochs 8 --max_updates 48 --lr 3e-3")
    rows = read_metrics(folder)
    assert rows[0]["train/dpo/loss"] == pytest.approx(np.log(2), abs=1e-6) and rows[0]["train/dpo/margin"] == 0
    assert np.mean([row["train/dpo/loss"] for row in rows[40:48]]) < 0.6 and rows[47]["train/dpo/accuracy"] > 0.5
    assert 0 <= rows[-1]["eval/dpo/validation/accuracy"] <= 1
    assert "eval/dpo/validation/accuracy/batch/batch9" in rows[-1]
    assert load_policy(folder / "final").config.tie_word_embeddings and (folder / "final" / "README.md").is_file()
    for row in rows[:-1]:
        margin = row["train/dpo/chosen_rewards"] - row["train/dpo/rejected_rewards"]
        assert row["train/dpo/margin"] == pytest.approx(margin, abs=1e-6)


@pytest.mark.parametrize("algorithm", ADVANTAGES)
@pytest.mark.parametrize("kl", ["reward", "loss"])
def test_rloo_and_grpo_run_and_their_first_update_begins_at_sft(algorithm, kl, world, inputs):
    folder = run("train_rloo", world, f"{inputs['train_rloo']} --algorithm {algorithm} --kl {kl}")
    first, *_, last = read_metrics(folder)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5) and last["objective/kl"] != 0
    assert first["preflight/ratio_in_the_loss"] == pytest.approx(1, abs=1e-5)
    assert first["objective/scores_std_within"] > 0 and last["loss/kl_avg"] > 0
    load_policy(folder / "final")


def test_the_names_that_rloo_shares_with_ppo_are_ppos(world, models, inputs):
    flags = f"{models['train_ppo']} --max_updates 1 --critic_warmup 0"
    of_ppo = set(read_metrics(run_stage("train_ppo", world, flags))[0])
    of_rloo = set(read_metrics(run("train_rloo", world, f"{inputs['train_rloo']} --max_updates 1"))[0])
    assert of_rloo - of_ppo == {"objective/scores_std_within", "loss/kl_avg"}
    assert {"objective/scores", "objective/kl", "objective/gold", "val/ratio", "hack/length", "lr"} <= of_rloo


def test_the_k_responses_to_a_post_differ_and_stand_together(world, inputs, monkeypatch):
    seen = []
    generate = train_rloo.generate

    def watch(policy, queries, *more):
        out = generate(policy, queries, *more)
        seen.append((queries, out[0]))
        return out

    monkeypatch.setattr(train_rloo, "generate", watch)
    run("train_rloo", world, f"{inputs['train_rloo']} --max_updates 1 --no_preflight")
    ((queries, responses),) = seen
    assert queries[0] == queries[3] != queries[4] == queries[7]
    assert len({tuple(row) for row in responses.tolist()}) == 8


@pytest.mark.parametrize(
    "name, metrics",
    [
        ("train_dpo", ["train/dpo/loss", "train/dpo/margin", "grad_norm"]),
        ("train_rloo", ["loss/policy_avg", "loss/kl_avg", "val/ratio", "grad_norm"]),
    ],
)
def test_microbatch_tokens_change_no_metric_beyond_rounding(name, metrics, world, inputs):
    flags = f"{inputs[name]} --max_updates 2" + (" --kl loss --algorithm grpo" if name == "train_rloo" else "")
    small, large = (
        values(run(name, world, f"{flags} --run_name run_{tokens} --microbatch_tokens {tokens}"))[:2]
        for tokens in (150, 8192)
    )
    for a, b in zip(small, large, strict=True):
        for metric in metrics:
            assert a[metric] == pytest.approx(b[metric], rel=1e-3, abs=1e-6), metric


@pytest.mark.parametrize("name", ["train_dpo", "train_rloo"])
def test_a_run_that_is_killed_resumes_exactly(name, world, inputs, monkeypatch):
    straight = run(name, world, f"{inputs[name]} --run_name straight")
    log = Run.log

    def die_after_step_3(self, step, metrics):
        log(self, step, metrics)
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die_after_step_3)
        with pytest.raises(Killed):
            run(name, world, f"{inputs[name]} --save_every 2 --run_name resumed")
    resumed = start_script(name, "--run_name resumed --resume --device cpu")
    assert_same_weights(straight, resumed)
    assert values(straight) == values(resumed)


def test_best_of_n_writes_figures_and_winners_that_agree(world, inputs):
    folder = run("best_of_n", world, f"{inputs['best_of_n']} --n 4 1 2")
    found = json.loads((folder / "best_of_n.json").read_text(encoding="utf-8"))
    assert [row["n"] for row in found["rows"]] == [1, 2, 4] and found["about"]["samples"] == 5
    proxies = [row["proxy"] for row in found["rows"]]
    assert proxies == sorted(proxies)  # each n chooses from more of the same samples
    assert found["rows"][0]["win_rate"] == pytest.approx(0.5) and found["rows"][0]["kl"] == 0
    posts = load_posts(world, "valid")[:6]
    scores = []
    for row in found["rows"]:
        assert row["kl"] <= row["kl_bound"] + 1e-9 and row["gold_interval"][0] <= row["gold"] <= row["gold_interval"][1]
        path = folder / f"best_of_{row['n']}.jsonl"
        winners = read_jsonl(path, having="id")
        texts = read_samples(path, "best", posts).texts  # what eval.py reads
        assert [w["gold"] for w in winners] == pytest.approx(gold_scores(posts, texts))
        scores.append([w["score"] for w in winners])
    assert (np.diff(scores, axis=0) >= 0).all()  # nested sets


def test_the_samples_of_best_of_n_are_the_same_whatever_the_largest_n(world, inputs):
    few, many = (run("best_of_n", world, f"{inputs['best_of_n']} --n {n} --run_name n{n[-1]}") for n in ("2", "2 5"))
    assert (few / "best_of_2.jsonl").read_bytes() == (many / "best_of_2.jsonl").read_bytes()


# -- ensembles


@pytest.mark.parametrize("rule", ["mean", "min", "mean_minus_std"])
def test_ppo_learns_from_several_reward_models(rule, world, models, another):
    folder = run_stage("train_ppo", world, f"{models['train_ppo']} {another} --ensemble {rule} --max_updates 2")
    first = read_metrics(folder)[0]
    assert first["objective/scores_std_between"] > 0 and first["preflight/v_after_eos_score"] < 1e-3
    assert "preflight/reference_score_2" in first


def test_one_reward_model_gives_the_same_weights_whatever_the_rule(world, models):
    flags = f"{models['train_ppo']} --max_updates 2"
    plain = run_stage("train_ppo", world, flags)
    for rule in ("min", "mean_minus_std"):
        assert_same_weights(plain, run_stage("train_ppo", world, f"{flags} --ensemble {rule} --run_name {rule}"))
    assert "objective/scores_std_between" not in read_metrics(plain)[0]


def test_a_run_with_an_ensemble_resumes_with_it_and_refuses_another(world, models, another):
    flags = f"{models['train_ppo']} {another} --max_updates 2 --save_every 1"
    run_stage("train_ppo", world, flags)
    folder = start("train_ppo", "--resume --device cpu")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
    assert config["reward_model"] == [models["train_ppo"].split()[3], str(another)]
    with pytest.raises(UserError, match="--reward_model .* is not .* as when"):
        start("train_ppo", f"--resume --device cpu --reward_model {another}")


# -- bad input


@pytest.mark.parametrize("name", ["train_rloo", "best_of_n", "train_ppo"])
def test_an_ensemble_of_different_tokenizers_is_refused_before_anything_is_loaded(
    name, world, models, inputs, another, monkeypatch
):
    def load(folder):
        tokenizer = load_tokenizer(folder)
        if Path(folder).name == "rm2":
            tokenizer._tokens[-1] += b"x"
        return tokenizer

    module = STAGES["train_ppo"] if name == "train_ppo" else SCRIPTS[name]
    monkeypatch.setattr(module, "load_tokenizer", load)
    monkeypatch.setattr(module, "load_policy", None)
    with pytest.raises(UserError, match="that of the reward model .*rm2 has other tokens"):
        if name == "train_ppo":
            run_stage("train_ppo", world, f"{models['train_ppo']} {another}")
        else:
            run(name, world, f"{inputs[name]} {another}")
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    "name, flags, said",
    [
        ("best_of_n", "--n 0", "n 0 is not at least 1 each"),
        ("best_of_n", "--n 4 -1", "unexpected argument|n 4 -1 is not at least 1"),
        ("best_of_n", "--posts 100000", "posts 100000 is not at most the 32"),
        ("best_of_n", "--temperature 0", "temperature 0.0 is not greater than 0"),
        ("train_rloo", "--samples_per_query 1", "samples_per_query 1 is not at least 2"),
        ("train_rloo", "--samples_per_query 3", "batch_size 8 is not a multiple of samples_per_query 3"),
        ("train_rloo", "--algorithm ppo", "algorithm ppo is not one of rloo, grpo"),
        ("train_rloo", "--kl both", "kl both is not one of reward, loss"),
        ("train_rloo", "--ensemble max", "ensemble max is not one of mean, min, mean_minus_std"),
        ("train_dpo", "--beta 0", "beta 0.0 is not greater than 0"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(name, flags, said, world, inputs):
    with pytest.raises(UserError, match=said):
        run(name, world, f"{inputs[name]} {flags}")
    assert not Path("runs").exists()


def test_a_dpo_pair_without_a_difference_is_refused_by_its_post(world, inputs, tmp_path):
    shutil.copytree(world, tmp_path / "data")
    path = tmp_path / "data" / "comparisons" / "batch1.json"
    lines = path.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[0])
    text = row["summaries"][0]["text"].strip()
    row["summaries"][0]["text"], row["summaries"][1]["text"] = text, " " + text  # other texts, the same tokens
    path.write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"comparison of post {row['info']['id']} with the same tokens twice"):
        run("train_dpo", tmp_path / "data", inputs["train_dpo"])
    assert not Path("runs").exists()


# -- house


def test_every_name_that_they_log_has_a_row_in_the_page_of_metrics(world, inputs):
    tables = sections(PAGE.read_text(encoding="utf-8"))
    known = [pattern(name) for rows in tables.values() for row in rows for name in names(row)]
    own = [name for row in tables[OWN] for name in names(row)]
    flags = inputs | {"best_of_n": f"{inputs['best_of_n']} --n 1 2"}
    logged = {name for script in SCRIPTS for row in read_metrics(run(script, world, flags[script])) for name in row}
    assert [name for name in sorted(logged) if not any(form.fullmatch(name) for form in known)] == []
    assert [name for name in own if not any(pattern(name).fullmatch(key) for key in logged)] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_does_something(name):
    readers = [SCRIPTS[name].__file__, ROOT / "nanorlhf/run/run.py", ROOT / "nanorlhf/monitoring/preflight.py"]
    assert unread_fields(SCRIPTS[name].Config, *readers) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_numbers_in_a_docstring_are_the_numbers_in_the_code(name):
    doc, code = Path(SCRIPTS[name].__file__).read_text(encoding="utf-8").split('"""', 2)[1:]
    steps = [f"{i}." for i in range(1, 10)]
    announced = [line.strip()[:2] for line in doc.splitlines() if line.strip()[:2] in steps]
    assert announced == [line.strip()[2:4] for line in code.splitlines() if line.strip()[2:4] in steps]


def test_a_run_of_an_experiment_says_how_it_is_resumed():
    record = {"argv": [str(ROOT / "experiments" / "train_rloo.py")], "stage": "rloo", "config": {"run_name": "mine"}}
    assert resume_command(record) == "python -m experiments.train_rloo --resume --run_name mine"


def test_the_weights_that_reach_a_reward_model_are_frozen(world, inputs, monkeypatch):
    kept = []
    monkeypatch.setattr(train_rloo, "Ensemble", lambda members: kept.append(Keep(members)) or kept[-1])
    run("train_rloo", world, f"{inputs['train_rloo']} --max_updates 1")
    assert kept and not any(p.requires_grad for p in kept[0].parameters())


class Keep(train_rloo.Ensemble):
    pass


def test_the_first_gradient_of_rloo_is_the_policy_gradient_written_out(world, inputs, monkeypatch):
    """Sequence by sequence, token by token, from the whole softmax in float64 behind the trunk."""
    found = {}
    step = train_rloo.AdamW.step

    def keep(self, *args):
        if "grads" not in found:
            found["grads"] = [p.grad.clone() for p in self.parameters]
        return step(self, *args)

    rolled = {}
    learn = train_rloo.learn

    def watch(policy, groups, *args):
        if not rolled:
            rolled.update(groups=groups, policy=[p.detach().clone() for p in policy.parameters()], model=policy)
        return learn(policy, groups, *args)

    monkeypatch.setattr(train_rloo.AdamW, "step", keep)
    monkeypatch.setattr(train_rloo, "learn", watch)
    run("train_rloo", world, f"{inputs['train_rloo']} --max_updates 1 --num_minibatches 1 --max_grad_norm None")
    g, model = rolled["groups"], rolled["model"]
    for p, before in zip(model.parameters(), rolled["policy"], strict=True):
        p.data = before
    rewards = (g.scores - 0.15 * (g.logprobs - g.ref_logprobs).masked_fill(~g.action_mask, 0).sum(1)).double()
    objective = torch.zeros((), dtype=torch.float64)
    for i, sequence in enumerate(g.sequences):
        others = [rewards[j] for j in range(len(rewards)) if j // 4 == i // 4 and j != i]
        packed = train_rloo.pack([sequence])
        logits = (model.hidden(packed).double() @ model.head_weight.double().T / 0.7)[: len(sequence)]
        logp = logits.log_softmax(-1)
        R = g.responses.shape[1]
        for t in range(int(g.action_mask[i].sum())):
            row = len(sequence) - R + t - 1
            objective = objective + (rewards[i] - sum(others) / 3) * logp[row, sequence[row + 1]]
    loss = -objective / g.action_mask.sum()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for got, want in zip(found["grads"], expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-3)
