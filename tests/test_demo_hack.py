"""The verdict of `make demo-hack`, and the figure of several KL coefficients, on made-up runs."""

import json
import sys
from pathlib import Path

import pytest
from test_report import write_lines

from experiments import overoptimisation
from nanorlhf.evaluation import figures
from nanorlhf.tiny import demo_hack


def curve(proxy: float, gold: float, updates: int = 12) -> list[dict]:
    """Proxy from 0, gold from 3.5, in equal steps to these ends."""
    parts = [i / (updates - 1) for i in range(updates)]
    return [
        {"step": i + 1, "objective/scores": proxy * p, "objective/gold": 3.5 + (gold - 3.5) * p, "objective/kl": 30 * p,
         "hack/length": 12 + 12 * p}
        for i, p in enumerate(parts)
    ]  # fmt: skip


def write_runs(folder: Path, rows: list[dict], gold_ppo: float) -> list[str]:
    write_lines(folder / "ppo" / "metrics.jsonl", rows)
    write_lines(folder / "eval" / "samples.jsonl", [
        {"step": 0, "score/ppo": float(i), "gold/ppo": -1.0, "ppo": f"text number {i}"} for i in range(9)
    ])  # fmt: skip
    results = {
        "policies": {"sft": {"gold": 3.6}, "ppo": {"gold": gold_ppo}},
        "win_rates": [{"ours": "ppo", "theirs": "sft", "rate": 0.12, "interval": [0.1, 0.14]}],
    }
    (folder / "eval" / "metrics.json").write_text(json.dumps(results), encoding="utf-8")
    return ["--ppo", str(folder / "ppo"), "--eval", str(folder / "eval")]


def test_over_optimisation_is_shown_with_its_alarms_and_favourites(tmp_path, capsys):
    demo_hack.main(write_runs(tmp_path, curve(3.0, -1.0), gold_ppo=-0.8))
    printed = capsys.readouterr().out
    # the last five of twelve updates: 9/11 of the way on average
    for text in ("0.00 -> 2.45", "3.50 -> -0.18, best 3.50", "3.60 -> -0.80", "0.120 (0.100 to 0.140)", "update 7"):
        assert text in printed, text
    assert "grown by half" in printed and "text number 8" in printed and "text number 2" not in printed
    assert (tmp_path / "eval" / "hack.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("proxy, gold_ppo", [(0.4, -0.8), (3.0, 3.7)])
def test_nothing_to_see_exits_with_1(tmp_path, capsys, proxy, gold_ppo):
    with pytest.raises(SystemExit) as stop:
        demo_hack.main(write_runs(tmp_path, curve(proxy, 1.0), gold_ppo))
    assert stop.value.code == 1 and "nothing to see" in capsys.readouterr().out


def test_without_runs_it_says_what_to_type(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        demo_hack.main(["--ppo", str(tmp_path), "--eval", str(tmp_path)])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("lacking", ["gold", "game", "updates"])
def test_runs_without_the_truth_or_without_the_game_end_in_a_sentence(tmp_path, capsys, lacking):
    flags = write_runs(tmp_path, [] if lacking == "updates" else curve(3.0, -1.0), gold_ppo=-0.8)
    path = tmp_path / "eval" / "metrics.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    if lacking == "gold":
        results["policies"] = {"sft": {}, "ppo": {}}
    if lacking == "game":
        results["win_rates"] = []
    path.write_text(json.dumps(results), encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        demo_hack.main(flags)
    assert stop.value.code == 2 and "expected a PPO run on the tiny world" in capsys.readouterr().err


def test_the_point_of_a_coefficient_is_the_mean_of_its_seeds_ends_with_their_spread():
    groups = {0.0: [curve(2.0, 1.0), curve(4.0, 2.0)], 0.2: [curve(1.0, 4.0)]}
    proxy, gold = figures.overoptimisation_figure(groups).axes
    ends = [container.lines[0].get_xydata().tolist()[0] for container in proxy.containers]
    at = 9 / 11  # mean of the last five of twelve
    assert ends[0] == pytest.approx([30 * at, 3.0 * at]) and ends[1] == pytest.approx([30 * at, 1.0 * at])
    assert len(proxy.lines) > len(groups) and len(gold.containers) == 2
    row = overoptimisation.summary(0.0, groups[0.0])
    assert row["scores"] == pytest.approx(3 * at) and row["scores +-"] == pytest.approx(12.706 * at, rel=1e-4)
    assert row["best gold"] == 3.5 and row["seeds"] == 2


def test_the_sweep_runs_what_is_missing_and_nothing_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "kl0_seed1_12" / "final").mkdir(parents=True)
    write_lines(tmp_path / "runs" / "kl0_seed1_12" / "metrics.jsonl", curve(2.0, 1.0))
    started = []

    def run(command, **_):
        name = command[command.index("--run_name") + 1]
        started.append((name, command[command.index("--kl_coef") + 1], command[command.index("--total_episodes") + 1]))
        write_lines(tmp_path / "runs" / name / "metrics.jsonl", curve(1.0, 4.0))

    monkeypatch.setattr(overoptimisation.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["x", "--kl_coefs", "0", "0.2", "--seeds", "1", "--updates", "12"])
    overoptimisation.main()
    assert started == [("kl0.2_seed1_12", "0.2", str(12 * 128))]
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["kl_coef"], row["kl +-"]) for row in last["rows"]] == [(0.0, None), (0.2, None)]  # one seed: no spread
    assert (tmp_path / "runs" / "overoptimisation.png").is_file()
