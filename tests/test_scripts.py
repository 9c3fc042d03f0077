"""The scripts, end to end on the tiny world for a few steps: alone, resumed, into transformers, and with bad input."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stages import ROOT, SCRIPTS, SMALL, Killed, assert_same_weights, files, run, start

import eval as eval_script
import train_ppo
import train_rm
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.evaluation import hacks
from nanorlhf.run.config import unread_fields
from nanorlhf.run.run import Run, read_metrics
from nanorlhf.storage.checkpoint import load_policy, load_scalar
from nanorlhf.storage.jsonl import read_jsonl
from nanorlhf.storage.resume import latest_checkpoint


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_stage_runs_alone_from_the_embedded_checkpoints_and_says_so(world, capsys):
    for name in SCRIPTS:
        folder = run(name, world)
        assert "embedded" in capsys.readouterr().out
        assert len(read_metrics(folder)) >= 4
        for final in folder.glob("final*"):
            assert (final / "model.safetensors").is_file() and (final / "README.md").is_file()
        assert len(list(folder.glob("final*"))) == (2 if name == "train_ppo" else 1)
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert record["config"]["preset"] == "tiny" and record["config"]["seed"] == 1
        Path("runs").rename(f"{name}_alone")  # the next stage would go on from this one


def test_a_stage_continues_from_the_run_of_the_stage_before(world, capsys):
    run("train_sft", world, "--lr 2e-3")  # in 4 steps it has to learn to stop
    run("train_rm", world)
    assert "the sft run" in capsys.readouterr().out
    run("train_ppo", world)
    out = capsys.readouterr().out
    assert "the sft run" in out and "the rm run" in out


@pytest.mark.parametrize(
    "accuracy, longer_wins, pairs, hardly",
    [
        (0.630, 0.600, 1024, True),  # three standard errors are 0.047
        (0.650, 0.600, 1024, False),
        (0.650, 0.400, 1024, False),  # the shorter one wins: as much is told by length
        (0.640, 0.400, 1024, True),
        (0.630, 0.600, 8000, False),
        (0.750, 0.600, 64, True),
    ],
)
def test_a_reward_model_hardly_above_length_is_told_from_one_that_knows_more(accuracy, longer_wins, pairs, hardly):
    assert train_rm.hardly_above_length(accuracy, longer_wins, pairs) == hardly


def test_a_reward_model_that_has_learned_nothing_yet_says_so(world, capsys):
    run("train_rm", world, "--lr 1e-9")
    assert "note    hardly above what length alone tells" in capsys.readouterr().out


def test_final_folders_load_in_transformers_with_equal_outputs(world):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

    rm, ppo = run("train_rm", world), run("train_ppo", world)
    ids = [1, 50, 60, 70, 300, 2]
    theirs = AutoModelForCausalLM.from_pretrained(ppo / "final", attn_implementation="eager", dtype=torch.float32)
    ours = load_policy(ppo / "final").logits([ids])[0]
    torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], ours, rtol=1e-4, atol=1e-5)

    theirs = AutoModelForSequenceClassification.from_pretrained(rm / "final", attn_implementation="eager")
    ours = load_scalar(rm / "final")
    assert ours.score_shift != 0
    score = theirs(torch.tensor([ids])).logits[0, 0] - ours.score_shift
    torch.testing.assert_close(score, ours.scores([ids])[0], rtol=1e-4, atol=1e-5)

    theirs = AutoModelForTokenClassification.from_pretrained(ppo / "final_critic", attn_implementation="eager")
    values = theirs(torch.tensor([ids])).logits[0, :, 0]
    torch.testing.assert_close(values, load_scalar(ppo / "final_critic").values([ids])[0], rtol=1e-4, atol=1e-5)


def test_before_the_first_update_ratio_is_one_and_kl_is_zero(world):
    first = read_metrics(run("train_ppo", world, "--max_updates 1 --critic_warmup 0"))[0]
    assert first["preflight/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["preflight/kl"] == pytest.approx(0, abs=1e-5)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert first["preflight/v_after_eos_score"] < 1e-4


def test_before_the_second_update_the_sampler_and_the_loss_still_agree(world, models):
    flags = f"{models['train_ppo']} --max_updates 2 --critic_warmup 0"
    second = read_metrics(run("train_ppo", world, flags))[1]
    assert second["preflight/approxkl_of_the_sampler"] < 1e-6 and second["preflight/approxkl_in_the_loss"] < 1e-6
    assert second["objective/kl"] != 0 and "preflight/kl" not in second


def test_the_exact_kl_can_be_the_penalty(world):
    rows = read_metrics(run("train_ppo", world, "--kl_estimator full --max_updates 3"))
    assert rows[0]["objective/kl_full"] == pytest.approx(0, abs=1e-4)
    assert rows[2]["objective/kl_full"] > 0 and rows[2]["objective/kl_full"] != rows[2]["objective/kl"]
    for row in rows:
        expected = row["objective/scores"] - 0.05 * row["objective/kl_full"]
        assert row["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-5)


def test_rlhf_reward_is_score_minus_kl_penalty_in_every_update(world):
    for row in read_metrics(run("train_ppo", world)):
        expected = row["objective/scores"] - 0.05 * row["objective/kl"]  # the tiny preset's kl_coef
        assert row["objective/rlhf_reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "name, metrics",
    [
        ("train_sft", ["train/sft/loss", "grad_norm"]),
        ("train_rm", ["train/rm/loss", "train/rm/margin", "grad_norm"]),
        ("train_ppo", ["loss/policy_avg", "loss/value_avg", "policy/approxkl_avg", "objective/scores", "grad_norm"]),
    ],
)
def test_microbatch_tokens_change_no_metric_beyond_rounding(name, metrics, world, models):
    flags = f"{models[name]} --max_updates 2" + (" --critic_warmup 0" if name == "train_ppo" else "")
    rows = [
        read_metrics(run(name, world, f"{flags} --run_name run_{tokens} --microbatch_tokens {tokens}"))
        for tokens in (150, 8192)
    ]
    for small, large in zip(*(found[:2] for found in rows), strict=True):
        for metric in metrics:
            assert small[metric] == pytest.approx(large[metric], rel=1e-3, abs=1e-6), metric


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_ends_bit_identical_to_an_uninterrupted_one(name, world, monkeypatch):
    straight = run(name, world, "--save_every 2 --run_name straight")
    log = Run.log

    def die_after_step_3(self, step, metrics):
        log(self, step, metrics)
        if step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die_after_step_3)
        with pytest.raises(Killed):
            run(name, world, "--save_every 2 --run_name resumed")
    resumed = start(name, "--run_name resumed --resume --device cpu")  # every setting and input is remembered

    assert_same_weights(straight, resumed)
    clocks = ("time", "perf/", "preflight/")  # what differs between any two runs; what is checked again after a resume

    def values(folder):
        return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in read_metrics(folder)]

    assert values(straight) == values(resumed)
    if name == "train_ppo":  # what must hold in any update is checked again at the first one after a resume
        checked = [[key for key in row if key.startswith("preflight/")] for row in read_metrics(resumed)]
        assert [len(keys) for keys in checked] == [11, 8, 8, 0] and "preflight/ratio" in checked[2]


def test_every_flag_is_read():
    for script in (*SCRIPTS.values(), eval_script):
        readers = script.__file__, ROOT / "nanorlhf/run/run.py", ROOT / "nanorlhf/monitoring/preflight.py"
        readers += (ROOT / "nanorlhf/monitoring/log_update.py",)
        assert unread_fields(script.Config, *readers) == []


def test_the_numbers_in_a_docstring_are_the_numbers_in_the_code():
    for script in (*SCRIPTS.values(), eval_script):
        source = Path(script.__file__).read_text(encoding="utf-8")
        doc, code = source.split('"""', 2)[1:]
        announced = [line.split(".")[0].strip() for line in doc.splitlines() if line.strip()[:2].rstrip(".").isdigit()]
        headings = [line for line in code.splitlines() if line.strip()[:3] in NUMBERS]
        in_code = [line.split("#")[1].split(".")[0].strip() for line in headings]
        assert announced == in_code, script.__file__


NUMBERS = [f"# {digit}" for digit in range(1, 10)]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train_ppo.py --batch_size 100 --num_minibatches 3", ["batch_size 100", "num_minibatches 3"]),
        ("train_ppo.py --temperature 0", ["temperature 0", "greater than 0"]),
        ("train_ppo.py --critic_warmup 5 --max_updates 4", ["critic_warmup 5", "at most the number of updates, 4"]),
        ("train_ppo.py --critic_warmup -1", ["critic_warmup -1", "0 or more"]),
        ("train_ppo.py --critic_lr 0", ["critic_lr 0", "greater than 0"]),
        ("train_ppo.py --lr_warmup -2", ["lr_warmup -2", "0 or more"]),
        ("train_ppo.py --learning_rate 1", ["--learning_rate", "--lr"]),
        ("train_rm.py --sft_model nowhere", ["sft_model", "nowhere"]),
        ("train_sft.py --data nowhere", ["data", "nowhere"]),
        ("train_sft.py --preset llama-1b --device cpu", ["--data", "--preset tiny"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(command, words, monkeypatch, capsys):
    script, *flags = command.split()
    preset = [] if "--preset" in flags else ["--preset", "tiny"]
    monkeypatch.setattr("sys.argv", [script, *preset, *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")  # a process each would import torch again
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert not Path("runs").exists()


def test_an_existing_run_is_kept_unless_told_otherwise(world):
    folder = run("train_sft", world)
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="--overwrite"):
        run("train_sft", world)
    assert (folder / "metrics.jsonl").read_bytes() == before
    run("train_sft", world, "--overwrite")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_may_be_given_the_same_flags_again_but_no_other_ones(name, world, models):
    folder = run(name, world, f"{models[name]} --max_updates 2 --save_every 1")
    before = files(folder)
    with pytest.raises(UserError, match=r"--lr 0.5 is not .*, as when runs/\w+ began"):
        run(name, world, f"{models[name]} --max_updates 2 --resume --lr 0.5")
    assert files(folder) == before
    run(name, world, f"{models[name]} --max_updates 2 --save_every 1 --resume")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["earlier"]


# -- the llama-1b preset, on small random models


def test_llama_1b_preset_runs_on_a_cpu_from_the_base_model_to_ppo(world, models, capsys):
    """The recipe as it is but for the number of steps, each stage from the run before it."""
    sft = run("train_sft", world, models["train_sft"], preset="llama-1b")
    rm = run("train_rm", world, preset="llama-1b")
    ppo = run("train_ppo", world, "--response_length 53", preset="llama-1b")
    printed = capsys.readouterr().out
    assert "the sft run" in printed and "the rm run" in printed and "embedded" not in printed
    for folder, name in ((sft, "train_sft"), (rm, "train_rm"), (ppo, "train_ppo")):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["config"]
        recipe = vars(SCRIPTS[name].Config())
        for field in ("lr", "max_grad_norm", "max_query_length", "microbatch_tokens", "lr_schedule"):
            assert config[field] == recipe[field], (name, field)
        found = {"sft_model": str(sft / "final"), "reward_model": [str(rm / "final")], "data": str(world)}
        assert all(config[key] == path for key, path in found.items() if key in config)  # what --resume goes on with
        assert all("not_finite" not in row for row in read_metrics(folder))
    first = read_metrics(ppo)[0]
    assert first["preflight/ratio"] == pytest.approx(1, abs=1e-4)
    assert first["objective/rlhf_reward"] == pytest.approx(first["objective/scores"] - 0.05 * first["objective/kl"])
    assert load_policy(ppo / "final").config == load_policy(sft / "final").config
    assert load_scalar(ppo / "final_critic").score.bias is not None


@pytest.mark.parametrize("name", SCRIPTS)
def test_llama_1b_preset_runs_the_code_of_the_tiny_one(name, world, models):
    """With its numbers given as flags, llama-1b logs the metrics and ends with the weights of tiny, bit for bit."""
    script = SCRIPTS[name]
    numbers = " ".join(f"--{field} {value}" for field, value in script.PRESETS["tiny"].items())
    flags = f"{models[name]} {numbers} {SMALL[name]}"  # the last of two equal flags counts
    tiny, llama = (run(name, world, f"{flags} --run_name {p}", preset=p) for p in ("tiny", "llama-1b"))
    assert_same_weights(tiny, llama)
    assert [row.keys() for row in read_metrics(tiny)] == [row.keys() for row in read_metrics(llama)]
    assert sorted(p.name for p in tiny.iterdir()) == sorted(p.name for p in llama.iterdir())


# -- bfloat16


def test_ppo_in_bfloat16_begins_with_ratio_1_and_stays_finite(world, models):
    folder = run("train_ppo", world, f"{models['train_ppo']} --dtype bfloat16 --max_updates 3 --save_every 1")
    rows = read_metrics(folder)
    assert len(rows) == 3 and all("not_finite" not in row for row in rows)
    assert rows[0]["preflight/ratio"] == pytest.approx(1, abs=2e-2)
    assert rows[0]["preflight/kl"] <= 1e-3 and rows[0]["preflight/v_after_eos_score"] <= 1e-1
    policy, critic = (load_file(folder / part / "model.safetensors") for part in ("final", "final_critic"))
    assert {tensor.dtype for tensor in policy.values()} == {torch.bfloat16}
    assert {name for name, tensor in critic.items() if tensor.dtype == torch.float32} == {"score.weight", "score.bias"}
    sft = load_file(Path(models["train_ppo"].split()[1]) / "model.safetensors")
    assert any(not torch.equal(policy[name], sft[name].bfloat16()) for name in sft)  # it has moved
    masters = load_file(latest_checkpoint(folder) / "state.safetensors")
    assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


# -- nothing is lost


@pytest.mark.parametrize("name, evaluates", [("train_sft", "summarise"), ("train_rm", "accuracy_by")])
def test_a_model_is_saved_before_it_is_evaluated(name, evaluates, world, models, monkeypatch):
    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(SCRIPTS[name], evaluates, die)
    with pytest.raises(Killed):
        run(name, world, models[name])
    final = next(Path("runs").iterdir()) / "final"
    model = load_policy(final) if name == "train_sft" else load_scalar(final)
    assert name == "train_sft" or model.score_shift != 0 and model.shift_posts  # with the shift that PPO needs


def test_a_ppo_that_fails_its_preflight_has_not_touched_the_run_it_was_to_overwrite(world, models, monkeypatch):
    folder = run("train_ppo", world, f"{models['train_ppo']} --max_updates 1")
    before = files(folder)

    def refuse(*_):
        raise UserError("pre-flight: the ratio is 2")

    monkeypatch.setattr(train_ppo.preflight, "report", refuse)
    with pytest.raises(UserError, match="the ratio is 2"):
        run("train_ppo", world, f"{models['train_ppo']} --max_updates 1 --overwrite")
    assert files(folder) == before


def test_only_the_newest_checkpoints_of_a_run_are_kept(world, models):
    folder = run("train_sft", world, f"{models['train_sft']} --max_updates 5 --save_every 1")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_4"]
    folder = run("train_sft", world, f"{models['train_sft']} --max_updates 5 --save_every 1 --keep 2 --overwrite")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_3", "step_4"]


def test_ppo_refuses_a_reward_model_with_another_tokenizer_before_it_loads_anything(world, models, monkeypatch):
    def load(folder):
        tokenizer = load_tokenizer(folder)
        if Path(folder).name == "rm":
            tokenizer._tokens[-1] += b"x"
        return tokenizer

    monkeypatch.setattr(train_ppo, "load_tokenizer", load)
    monkeypatch.setattr(train_ppo, "load_policy", None)
    with pytest.raises(UserError, match="that of the reward model .*rm has other tokens"):
        run("train_ppo", world, models["train_ppo"])
    assert not Path("runs").exists()


# -- what PPO watches


def test_ppo_writes_the_trace_of_an_episode_and_a_resume_drops_what_came_after_its_checkpoint(world, models):
    flags = f"{models['train_ppo']} --max_updates 4 --save_every 2 --sample_every 1"
    folder = run("train_ppo", world, flags)
    rows = read_jsonl(folder / "trace.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        n = sum(row["action_mask"])
        assert row["kl"] == pytest.approx([a - b for a, b in zip(row["logprobs"], row["ref_logprobs"], strict=True)][:n]
                                          + [0.0] * (len(row["ids"]) - n), abs=1e-6)  # fmt: skip
        paid = -0.05 * sum(row["kl"])  # the tiny preset's kl_coef
        assert sum(row["rewards"]) == pytest.approx(row["score"] + paid, abs=1e-5)
    (folder / "checkpoints" / "step_2").rename(folder / "checkpoints" / "kept")
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        shutil.rmtree(checkpoint)
    (folder / "checkpoints" / "kept").rename(folder / "checkpoints" / "step_2")
    start("train_ppo", "--resume --device cpu")
    assert read_jsonl(folder / "trace.jsonl") == rows


def test_ppo_says_an_alarm_aloud_and_knows_after_a_resume_how_the_run_began(world, models, monkeypatch, capsys):
    """Length is measured against the first update, also by a process that did not see it."""
    monkeypatch.setattr("nanorlhf.evaluation.hacks.ALARMS", (("hack/length", "times", 1.5, "they have grown"),))
    panel, grown = hacks.panel, [1.0]
    monkeypatch.setattr(hacks, "panel", lambda *args: panel(*args) | {"length": 10.0 * grown[0]})
    flags = f"{models['train_ppo']} --max_updates 3 --save_every 1"

    def die(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train_ppo, "save_policy", die)
        with pytest.raises(Killed):
            run("train_ppo", world, flags)
    assert "they have grown" not in capsys.readouterr().out
    grown[0] = 2.0
    start("train_ppo", "--resume --device cpu")
    assert "warning hack/length is 20, above 15: they have grown" in capsys.readouterr().out
