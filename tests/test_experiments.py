"""The experiments' own arithmetic: tables over seeds, what is run again and what is not, and what the demo costs."""

import json
import subprocess
from pathlib import Path

import pytest

import train_ppo
import train_rm
import train_sft
from experiments import demo_cost, seeds
from nanorlhf.monitoring.flops import head_flops, trunk_flops
from nanorlhf.tiny.demo import BARS

GOOD = {
    "sft_rouge": 0.5, "gold_sft": 3.6, "rm_accuracy": 0.72, "preflight_ratio_error": 0.0,
    "preflight_kl_error": 0.0, "max_kl": 2.0, "gold_gain": 0.9, "ppo_vs_sft": 0.7, "ppo_vs_sft_low": 0.66,
    "ppo_vs_reference": 0.71, "eos_rate": 0.99,
}  # fmt: skip


def rows(**changes) -> list[dict]:
    """Two results, the second with these values in place of the good ones."""
    more = {"gold_ppo": 4.5, "words": 15.0, "commit": "abc"}
    first = {"seed": 2, "rounding": "avx2"} | GOOD | more
    return [first, first | {"seed": 1, "rounding": "default"} | changes]


def cells(text: str, words: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if words in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_mean_deviation_worst_and_distance_of_every_bar():
    text = seeds.table(rows(ppo_vs_sft=0.8, max_kl=4.0))
    assert all(words.replace("|", r"\|") in text for *_, words in BARS)  # a bar of its own is not the end of a cell
    # 0.7 and 0.8: mean 0.75, deviation 0.0707, (0.75 - 0.65) / 0.0707 = 1.41
    bound = next(bound for name, _, bound, _ in BARS if name == "ppo_vs_sft")
    far = f"{(0.75 - bound) / 0.0707107:.1f}"
    assert cells(text, "PPO vs SFT") == ["gold win rate, PPO vs SFT", f">= {bound:g}", "0.75", "0.071", "0.7", far]
    # an upper bar: the worst is the largest, the distance is counted downwards
    assert cells(text, "largest objective/kl")[2:] == ["3", "1.4", "4", f"{(10 - 3) / 1.41421:.1f}"]
    assert cells(text, "EOS" if "EOS" in text else "share of PPO's")[-1] == "-"  # no spread, no distance


def test_a_result_is_green_when_every_bar_is_passed():
    good, bad = rows(eos_rate=0.9)
    assert seeds.passes(good) and not seeds.passes(bad)


def test_older_results_are_held_against_the_bars_that_they_know():
    older = [{name: value for name, value in row.items() if name != "sft_rouge"} for row in rows(eos_rate=0.9)]
    assert "SFT ROUGE-L" not in seeds.table(older) and "gold score of SFT" in seeds.table(older)
    assert seeds.every_result(older).splitlines()[-1].split(" | ")[2] == "-"
    assert [seeds.passes(row) for row in older] == [True, False]


def test_the_figure_is_drawn_from_curves_of_different_lengths():
    curve = {"explained_variance": [-1.0, 0.5, 0.6]}
    assert seeds.figure([curve, curve], [{"explained_variance": [-1.9, -0.5]}]).startswith(b"\x89PNG")


def test_every_result_is_a_line_in_the_order_of_seeds_and_roundings():
    lines = seeds.every_result(rows()).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["1", "2"]
    assert "| avx2 |" in lines[1]


def test_an_experiment_that_was_stopped_runs_only_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "abc\n")
    found, trained, ran = tmp_path / "results.jsonl", [], []
    monkeypatch.setattr(seeds, "models", trained.append)

    def result(seed, rounding):
        ran.append((seed, rounding))
        return rows()[0] | {"seed": seed, "rounding": rounding, "seconds": 1}

    monkeypatch.setattr(seeds, "result", result)
    there = rows()[0] | {"seed": 1, "rounding": "avx2"}
    found.write_text(json.dumps(there) + "\n", encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["seeds", "--seeds", "1", "2", "--processes", "1", "--results", str(found)])
    seeds.main()
    assert trained == [1, 2]
    assert ran == [(seed, name) for name in seeds.ROUNDINGS for seed in (1, 2) if (seed, name) != (1, "avx2")]
    assert len(found.read_text(encoding="utf-8").splitlines()) == 2 * len(seeds.ROUNDINGS)
    ran.clear()
    seeds.main()
    assert ran == [] and json.loads(capsys.readouterr().out.splitlines()[-1])["results"] == 6


@pytest.mark.parametrize(("ends", "again"), [("done in 0:05: runs/x", 0), ("update 3/9", 1), (None, 1)])
def test_a_run_is_made_again_unless_its_log_says_that_it_ended(ends, again, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    final = Path("runs/x/final")
    final.mkdir(parents=True)
    (final / "config.json").write_text("{}", encoding="utf-8")
    if ends:
        Path("runs/x.log").write_text(f"step 1\n{ends}\n", encoding="utf-8")
    calls = []

    def run(command, env, **_):
        calls.append((command[1:], env["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    seeds.script("train_sft.py", "x", 7, {"OMP_NUM_THREADS": "1"}, "--model", "base")
    expected = ["train_sft.py", "--preset", "tiny", "--run_name", "x", "--seed", "7", "--overwrite", "--model", "base"]
    assert calls == [(expected, "1")] * again


# --- what the demo costs


def small() -> demo_cost.World:
    """A world of one length each: queries of 20 tokens, summaries of 10, and pairs of a query with 10 and 8."""
    return demo_cost.World(demo_cost.world().model, 8, 8, 4, [20, 20], [10, 10], [(20, 10, 8), (20, 10, 8)])


def test_a_step_of_sft_and_of_the_reward_model_by_hand():
    """trunk_flops and head_flops are held against torch's own count in test_flops.py."""
    w = small()
    trunk = lambda length, n, *read: trunk_flops(w.model, [length] * n, *read)  # noqa: E731
    sft = demo_cost.sft_flops(train_sft.Config(batch_size=4, max_updates=1, eval_posts=0), w)
    assert sft == pytest.approx(3 * (trunk(30, 4) + head_flops(w.model, 4 * 30)))
    evaluated = demo_cost.sft_flops(train_sft.Config(batch_size=4, max_updates=1, eval_posts=2, response_length=12), w)
    read, written = trunk(30, 2) + head_flops(w.model, 60), trunk(32, 2, 24) + head_flops(w.model, 24)
    assert evaluated - sft == pytest.approx(read + written)
    rm = demo_cost.rm_flops(train_rm.Config(batch_size=4, shift_posts=3, eval_pairs=2), w)  # 8 pairs: 2 steps
    assert rm == pytest.approx(3 * trunk(38, 8, 16) + trunk(30, 3, 3) + trunk(30, 2, 2) + trunk(28, 2, 2))


def test_a_warm_up_and_fewer_epochs_cost_less():
    w = small()

    def cost(**settings) -> float:
        return demo_cost.ppo_flops(train_ppo.Config(batch_size=2, total_episodes=8, response_length=12, **settings), w)

    assert cost(critic_warmup=2) < cost() and cost(num_ppo_epochs=1) < 0.5 * cost(num_ppo_epochs=4)
    assert cost(max_updates=2) == pytest.approx(cost() / 2)
