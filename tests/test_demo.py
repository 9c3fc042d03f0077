"""The demo's verdict on made-up runs."""

import json
from pathlib import Path

import pytest
from test_report import results, write_lines

from nanorlhf.tiny import demo


@pytest.fixture
def runs(tmp_path):
    """Run folders of a demo that passes every bar."""

    def write(found=None, ppo_changes=(), root=tmp_path / "runs"):
        ppo = [
            {
                "step": i,
                "time": 100.0 + i,
                "objective/scores": 0.1 * i,
                "objective/kl": 0.3 * i,
                "perf/tokens_per_s": 900 + i,
            }
            for i in range(1, 6)
        ]
        ppo[0] |= {"preflight/ratio": 1.00001, "preflight/kl": -1e-5}
        ppo[-1] |= {"time/total_s": 61.0}
        for index, name, value in ppo_changes:
            ppo[index][name] = value
        logs = {
            "sft": [
                {"step": 1, "time": 5.0, "train/sft/loss": 4.2},
                {"step": 2, "time": 6.0, "train/sft/loss": 0.5, "validation/sft/loss": 0.4},
            ],
            "rm": [{"step": 1, "train/rm/loss": 0.7, "time/total_s": 30.5}],
            "ppo": ppo,
            "eval": [{"step": 0, "time": 10.0, "time/total_s": 9.0}],
        }
        for stage, rows in logs.items():
            write_lines(root / f"demo_{stage}" / "metrics.jsonl", rows)
            (root / f"demo_{stage}" / "config.json").write_text(
                json.dumps({"stage": stage, "started": "1970-01-01T00:00:01+00:00"}),
                encoding="utf-8",
            )
        (root / "demo_eval" / "metrics.json").write_text(json.dumps(found or results()), encoding="utf-8")
        return root

    return write


def verdict(root: Path, *flags: str) -> int:
    try:
        demo.main(["--runs", str(root), *flags])
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_demo_that_passes_every_bar_exits_0_and_says_what_it_reached(runs, capsys):
    assert verdict(runs()) == 0
    printed = capsys.readouterr().out
    expected = ["all 11 bars passed", "4.20 -> 0.50", "0.200 -> 0.600", "0.720 (0.660 to 0.770)", "0.600 -> 0.840"]
    expected += [
        "0.10 -> 0.50",
        "3.50 -> 4.20",
        "0.650 (0.560 to 0.740)",
        "1.50",
        "61.0",
        "30.5",
        "903",
        "eval/report.html",
    ]
    for text in expected:
        assert text in printed, text
    assert "MISSED" not in printed


def changed(path: str, value) -> dict:
    """The results with one number changed; path such as "policies.ppo.gold" or "win_rates.0.rate"."""
    found = json.loads(json.dumps(results()))
    *parents, name = path.split(".")
    place = found
    for parent in parents:
        place = place[int(parent) if parent.isdigit() else parent]
    place[name] = value
    return found


@pytest.mark.parametrize(
    "path, value, bar",
    [
        ("policies.sft.rougeL", 0.419, "SFT ROUGE-L"),
        ("policies.sft.gold", 3.39, "gold score of SFT"),
        ("reward_model.accuracy", 0.679, "reward model's accuracy"),
        ("policies.ppo.gold", 3.89, "gold score, PPO - SFT"),
        ("win_rates.0.rate", 0.599, "gold win rate, PPO vs SFT"),
        ("win_rates.0.interval", [0.55, 0.74], "its 95% interval's lower end"),
        ("win_rates.1.rate", 0.579, "gold win rate, PPO vs reference"),
        ("policies.ppo.eos_rate", 0.949, "share of PPO's summaries that stop"),
        ("policies.ppo.eos_rate", None, "share of PPO's summaries that stop: -"),
    ],
)
def test_each_bar_of_the_evaluation_can_be_missed(runs, capsys, path, value, bar):
    assert verdict(runs(changed(path, value))) == 1
    printed = capsys.readouterr().out.split("missed bars:\n")[1].splitlines()
    assert len(printed) == 1 and printed[0].strip().startswith(bar)


@pytest.mark.parametrize(
    "index, name, value, bar",
    [
        (0, "preflight/ratio", 1.0002, "|ratio - 1| before"),
        (0, "preflight/ratio", None, "|ratio - 1| before"),
        (0, "preflight/kl", -0.002, "|KL| before"),
        (2, "objective/kl", 10.0, "largest objective/kl"),
        (2, "objective/kl", None, "largest objective/kl"),  # it was not finite
    ],
)
def test_each_bar_of_the_ppo_run_can_be_missed(runs, capsys, index, name, value, bar):
    assert verdict(runs(ppo_changes=[(index, name, value)])) == 1
    printed = capsys.readouterr().out.split("missed bars:\n")[1].splitlines()
    assert len(printed) == 1 and printed[0].strip().startswith(bar)


def test_every_bar_is_measured():
    nothing = {"ppo": [{}], "results": {}}
    assert {name for name, *_ in demo.BARS} == set(demo.measure(nothing))
    assert len(demo.BARS) == 11


def test_wins_by_another_judge_pass_no_bar(runs, capsys):
    assert verdict(runs(changed("about.judge", "rm"))) == 1
    assert "gold win rate, PPO vs SFT: -" in capsys.readouterr().out


def test_runs_of_other_names_can_be_judged(runs):
    root = runs()
    for stage in demo.STAGES:
        (root / f"demo_{stage}").rename(root / stage)
    assert verdict(root) == 2
    assert verdict(root, "--prefix", "") == 0


def test_an_unfinished_demo_exits_2_with_a_sentence(runs, tmp_path, capsys):
    (runs() / "demo_eval" / "metrics.json").unlink()
    assert verdict(tmp_path / "runs") == 2
    assert verdict(tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.count("error: ") == 2
