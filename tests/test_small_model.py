"""The driver of the real rung, without the model: shares of the time, a probe, going on, what failed, the report."""

import argparse
import json

import pytest
import torch

from experiments import small_model, small_model_report
from nanorlhf.errors import UserError

POST = {"step": 0, "id": "t3_1", "subreddit": "cats", "title": "My cat hates me", "post": "It hides and it hisses."}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """make(**args) -> an Experiment whose scripts are replaced by `fake`, which logs three steps, two seconds apart."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def fake(stage, on, **flags):
        calls.append((stage, flags))
        folder = tmp_path / "runs" / flags["run_name"]
        folder.mkdir(parents=True, exist_ok=True)
        steps = flags.get("max_updates", 3)
        rows = [{"step": i + 1, "time": 100.0 + 2 * i, "lr": flags.get("lr", 0)} for i in range(steps)]
        rows[-1] |= {"validation/sft/loss": 3 - flags.get("lr", 0), "validation/sft/rouge/rougeL": 0.2,
                     "validation/sft/eos_rate": 1.0}  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "config.json").write_text("{}", encoding="utf-8")
        return small_model.Done(folder, seconds=7.0, peak_gib=1.0)

    def make(**changes):
        args = dict(minutes=10, name="small", data=str(tmp_path), model=str(tmp_path), seed=1, device="cpu",
                    dtype="auto", sft_lrs=[1e-4], rm_lr=3e-5, ppo_lrs=[1e-5], steps={}, longest=None)  # fmt: skip
        made = small_model.Experiment(argparse.Namespace(**args | changes), tmp_path)
        made.calls = calls
        return made

    monkeypatch.setattr(small_model, "run", fake)
    monkeypatch.setattr(small_model, "write_short_posts", lambda data, folder, tokenizer, longest: {})
    monkeypatch.setattr(small_model, "load_tokenizer", lambda folder: None)
    return make


def test_a_part_takes_its_share_of_the_time_that_is_left(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(small_model.time, "monotonic", lambda: now[0])
    clock, shares = small_model.Clock(minutes=10), small_model.SHARES
    assert clock.share("lr") == pytest.approx(600 * shares["lr"] / sum(shares.values()))
    now[0] = 500.0
    last = list(shares)[-1]
    assert clock.share(last) == pytest.approx(100)
    now[0] = 700.0
    assert clock.share(last) == 0


def test_steps_are_what_fits_after_a_probe_that_is_made_once(experiment):
    made = experiment()
    steps, measured = made.steps_for(100, "rm", made.flags("rm"))
    assert measured == {"s_per_step": 2.0, "s_around": 7.0 - 2 - 2}  # 7 s for two steps of 2 s
    assert steps == int((100 - 3) / 2) or steps == int((100 - 3) / 2) - 1  # less what the probe took
    assert made.steps_for(1, "rm", made.flags("rm"))[0] == 1
    assert [stage for stage, _ in made.calls] == ["rm"]


def test_the_best_learning_rate_on_held_out_posts_is_taken(experiment):
    made = experiment(sft_lrs=[1e-4, 1e-3, 5e-4])
    made.do("lr")
    assert made.state["lr"]["chosen"] == 1e-3 and set(made.state["lr"]["runs"]) == {"0.0001", "0.001", "0.0005"}
    made.do("sft")
    assert made.calls[-1][1]["lr"] == 1e-3


def test_what_is_done_is_not_done_again_and_what_was_stopped_goes_on(experiment, tmp_path, capsys):
    made = experiment()
    made.do("lr")
    made.do("sft")
    again = experiment()
    count = len(again.calls)
    again.do("sft")
    assert len(again.calls) == count and "sft: done before" in capsys.readouterr().out
    (tmp_path / "runs" / "small_rm").mkdir(parents=True)
    (tmp_path / "runs" / "small_rm" / "config.json").write_text("{}", encoding="utf-8")  # begun, then killed
    again.do("rm")
    assert again.calls[-1][1] == {"run_name": "small_rm", "device": "cpu", "resume": True}


def test_a_part_that_fails_says_why_and_the_next_start_tries_it_again(experiment, monkeypatch):
    def refuse(self, seconds):
        raise UserError("data: none")

    made = experiment()
    monkeypatch.setattr(small_model.Experiment, "rm", refuse)
    made.do("rm")
    assert made.state["rm"] == {"failed": "data: none"}
    assert "- not reached: rm: data: none" in small_model_report.report(made.state, made.out)
    monkeypatch.setattr(small_model.Experiment, "rm", lambda self, seconds: {"rows": []})
    made.do("rm")
    assert made.state["rm"] == {"rows": []}


def test_a_pre_flight_that_refuses_is_kept_and_ppo_goes_on_without_it(experiment, monkeypatch):
    made, fake = experiment(), small_model.run

    def refusing(stage, on, **flags):
        if flags.get("preflight", True):
            folder = made.out / "runs" / flags["run_name"]
            folder.mkdir(parents=True, exist_ok=True)  # as the script leaves it: it was begun
            (folder / "config.json").write_text("{}", encoding="utf-8")
            raise UserError("pre-flight: reference score is 5.3 before update 1, expected at most 4: ...")
        return fake(stage, on, **flags)

    monkeypatch.setattr(small_model, "run", refusing)
    found = made.ppo(60)
    assert found["refused"] == ["pre-flight: reference score is 5.3 before update 1, expected at most 4: ..."]
    assert list(found["runs"]) == ["ppo"] and made.calls[-1][1]["preflight"] is False
    assert made.calls[-1][1]["overwrite"] and "resume" not in made.calls[-1][1]  # not on with what was refused
    monkeypatch.setattr(small_model, "run", lambda *a, **k: (_ for _ in ()).throw(UserError("data: gone")))
    with pytest.raises(UserError, match="data: gone"):
        experiment(name="other").ppo(60)


def test_flags_become_the_words_that_one_would_type(monkeypatch):
    seen = []
    monkeypatch.setattr(small_model, "parse", lambda config, presets, doc, words: seen.extend(words))
    monkeypatch.setattr(small_model.SCRIPTS["sft"], "main", lambda cfg: None)
    on = torch.device("cpu")
    small_model.run("sft", on, run_name="x", lr=1e-4, overwrite=True, preflight=False, policy=["base=a", "sft=b"])
    assert seen == ["--preset", "smollm2", "--run_name", "x", "--lr", "0.0001", "--overwrite", "--no_preflight",
                    "--policy", "base=a", "sft=b"]  # fmt: skip


def test_how_much_of_a_title_is_copied_is_counted_by_text_with_intervals():
    post = small_model_report.Post("1", "cats", "My cat hates me", "", "")
    nameless = small_model_report.Post("2", "cats", "...", "", "")
    texts = ["my cat hates me, help", "the cat me", "dogs", "anything"]
    lines, numbers = small_model_report.title_table({"ours": (texts, [post] * 3 + [nameless])})
    assert numbers["ours"]["n"] == 3  # a title without words does not count
    assert numbers["ours"]["mean"][0] == pytest.approx((1 + 0.5 + 0) / 3)
    assert numbers["ours"]["at least 50%"][0] == pytest.approx(2 / 3)
    assert numbers["ours"]["at least 80%"][0] == pytest.approx(1 / 3) == numbers["ours"]["at least 100%"][0]
    low, high = numbers["ours"]["mean"][1:]
    assert 0 <= low < 0.5 < high <= 1 and len(lines) == 4


def test_each_part_has_its_seconds_its_speed_and_its_peak():
    rows = [{"perf/tokens_per_s": speed} for speed in (10.0, 30.0, 20.0)] + [{"validation/sft/loss": 3.0}]
    run = {"rows": rows, "s": 50.04, "peak_gib": 6.5}
    lines = small_model_report.stages({"sft": run, "ppo": {"runs": {"ppo": run, "ppo_3e-05": run}}, "eval": {}},
                                      {"sft": 61, "ppo": 120, "eval": 12.3})  # fmt: skip
    of_run = " | 3 | 50 | 20 | 6.5 |"
    assert lines[5:9] == [f"| sft{of_run}", f"| ppo{of_run}", f"| ppo_3e-05{of_run}", "| eval |  | 12 |  |  |"]
    assert small_model_report.stages({}, {}) == []


def test_the_steps_of_a_part_may_be_given_in_place_of_measured_ones(experiment):
    made = experiment(steps={"sft": 7, "ppo": 5, "ppo_1e-05": 3, "lr": 2}, sft_lrs=[1e-4, 1e-3], ppo_lrs=[3e-5, 1e-5])
    for part in ("lr", "sft", "ppo"):
        made.do(part)
    names = [(flags["run_name"], flags["max_updates"]) for _, flags in made.calls]
    assert names == [("small_lr", 2), ("small_lr", 2), ("small_sft", 7), ("small_ppo", 5), ("small_ppo_1e-05", 3)]
    assert small_model._steps("rm=112") == ("rm", 112)
    for word in ("rm=0", "foo=3", "rm", "rm=x"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{word} is not lr, sft, rm or ppo"):
            small_model._steps(word)


def test_the_first_rate_of_ppo_is_the_last_policy_which_is_compared_with_all_others(experiment, monkeypatch):
    made = experiment()
    made.state["ppo"] = {"runs": {"ppo": {}, "ppo_1e-05": {}}}
    monkeypatch.setattr(small_model, "run", lambda stage, on, **flags: made.calls.append(flags) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.eval(0)
    assert [word.partition("=")[0] for word in made.calls[-1]["policy"]] == ["base", "sft", "ppo_1e-05", "ppo"]


def test_samples_are_shown_with_every_policy_on_one_line_each():
    lines = small_model_report.samples([POST | {"base": "a\nb", "sft": ""}], ["base", "sft"])
    assert "- base: a b" in lines and "- sft: (nothing)" in lines
