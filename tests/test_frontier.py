"""The frontier's own arithmetic: its plan, what is run again and what is not, intervals, and the grades of alarms."""

import fcntl
import hashlib
import json
import math
import subprocess
from pathlib import Path

import pytest

import train_ppo
from experiments import details_worth, early_warning, frontier, frontier_plan, frontier_report, train_dpo, train_rloo
from experiments.details_worth import SWITCHES, switched
from experiments.early_warning import Grade, Turn
from experiments.frontier_measure import Judged, against
from experiments.frontier_plan import SEEDS, Run, Step, plan
from nanorlhf.errors import UserError
from nanorlhf.evaluation.hacks import ALARMS
from nanorlhf.run.config import parse

# --- the plan


def test_the_lines_that_are_there_are_not_continued_with_another_base_model(monkeypatch):
    monkeypatch.chdir(frontier.RESULTS.parents[2])
    said = "base model .* is not 55b9458a033d, on which the lines of frontier.jsonl stand"
    with pytest.raises(UserError, match=said):
        frontier.main(["--only", "mean_minus_std"])
    done = hashlib.sha256((frontier_plan.EMBEDDED / "base" / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(frontier, "BASE", done[:12])
    frontier.check_base()


def test_every_method_has_all_its_seeds_at_one_strength_before_the_next_strength_begins():
    groups = [(run.method, run.strength) for run in plan()]
    first = list(dict.fromkeys(groups))
    assert groups == [group for group in first for _ in SEEDS]
    assert [run.seed for run in plan()] == list(SEEDS) * len(first)
    names = [run.name for run in plan()]
    assert len(set(names)) == len(names)


def test_a_name_of_a_step_stands_for_one_command_and_models_come_before_what_reads_them():
    commands: dict[str, tuple] = {}
    for run in plan():
        made = set()
        for step in run.steps:
            assert commands.setdefault(step.name, step.words) == step.words
            read = {Path(word).parts[1] for word in step.words if word.startswith("runs/")}
            assert read <= made, f"{run.name}: {step.name} reads {read - made}"
            read = {word.split("=")[1].split("/")[1] for word in step.words if "=runs/" in word}
            assert read <= made
            made.add(step.name)
        for folder in (run.policy, run.reward_model):
            assert folder is None or folder.parts[1] in made or folder.is_dir()


def test_each_seed_has_models_of_its_own_and_those_of_seed_1_are_embedded():
    assert len({frontier_plan.sft(seed) for seed in SEEDS}) == len({frontier_plan.rm(seed) for seed in SEEDS}) == 3
    for run in plan():
        if run.seed == 1:
            assert frontier_plan.rm(1).is_dir() and not any(step.name in ("fr_sft1", "fr_rm1") for step in run.steps)
        else:
            assert [step.name for step in run.steps[:2]] == [f"fr_sft{run.seed}", f"fr_rm{run.seed}"]


CONFIGS = {"train_ppo.py": train_ppo, "experiments.train_dpo": train_dpo, "experiments.train_rloo": train_rloo}


@pytest.mark.parametrize("run", [run for run in plan() if run.seed == 2], ids=lambda run: run.name)
def test_the_flags_of_the_plan_are_those_of_the_scripts(run):
    program, *flags = [word for word in run.steps[-1].words if word != "-m"]
    if program == "experiments.details_worth":
        which = details_worth.switch(flags[1])
        program, flags = "train_ppo.py", [*flags[2:], *which.flags.split()]
    if program in CONFIGS:
        script = CONFIGS[program]
        cfg = parse(script.Config, script.PRESETS, script.__doc__, ["--preset", "tiny", *flags])
        assert cfg.sft_model == "runs/fr_sft2/final"


def test_a_detail_differs_from_the_recipe_in_its_switch_alone():
    recipe = next(run for run in plan() if run.name == "ppo kl 0.15 1")
    for run in plan():
        if run.part == "details" and run.seed == 1:
            assert run.steps[-1].words[:3] == ("-m", "experiments.details_worth", "--switch")
            assert set(run.steps[-1].words[4:]) == set(recipe.steps[-1].words[1:])


@pytest.mark.parametrize("which", SWITCHES, ids=lambda which: which.name)
def test_a_switch_changes_the_lesson_while_it_is_on_and_not_after(which):
    def code():
        functions = train_ppo.main, train_ppo.score, train_ppo.learn, details_worth_ppo.token_rewards
        return [function.__code__ for function in functions]

    from nanorlhf import ppo as details_worth_ppo

    before = code()
    with switched(which):
        assert (code() != before) == bool(which.lines)
    assert code() == before
    assert bool(which.lines) != bool(which.flags)


# --- what is run, and what is not run again


@pytest.fixture
def work(tmp_path, monkeypatch):
    """work(*flags) -> exit status of the frontier with a plan of three runs that share their first step."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "check_output", lambda *_, **__: "abc\n")
    Path("runs").mkdir()
    program = (
        "import sys; from pathlib import Path; name = sys.argv[sys.argv.index('--run_name') + 1];"
        "Path('calls').open('a').write(' '.join(sys.argv[1:]) + chr(10));"
        "sys.exit('bad' in name and not Path('mend').exists())"
    )
    Path("script.py").write_text(program, encoding="utf-8")
    shared = Step("fr_sft7", ("script.py", "--shared"), 60)

    def run(strength: str, seed: int) -> Run:
        step = Step(f"fr_x_{strength}", ("script.py", "--x"), 30)
        return Run("frontier", "x", strength, seed, (shared, step), Path("p"), Path("r"))

    monkeypatch.setattr(frontier, "plan", lambda: [run("good", 1), run("bad", 1), run("fine", 2)])
    numbers = {"gold": 1.0, "win_rate": 0.5, "kl": 2.0, "strength": "s"}
    monkeypatch.setattr(frontier, "measure", lambda run: [numbers])

    def call(*flags: str) -> int:
        try:
            frontier.main(["--results", "found.jsonl", *flags])
        except SystemExit as end:
            return end.code
        return 0

    return call


def calls() -> list[str]:
    return Path("calls").read_text(encoding="utf-8").splitlines() if Path("calls").exists() else []


def test_shared_steps_run_once_with_their_own_seed_and_a_finished_run_never_again(work, capsys):
    Path("mend").touch()
    assert work() == 0
    assert calls() == [
        "--shared --preset tiny --seed 7 --run_name fr_sft7 --overwrite",
        "--x --preset tiny --seed 1 --run_name fr_x_good --overwrite",
        "--x --preset tiny --seed 1 --run_name fr_x_bad --overwrite",
        "--x --preset tiny --seed 2 --run_name fr_x_fine --overwrite",
    ]
    rows = frontier.known(Path("found.jsonl"))
    assert [row["run"] for row in rows] == ["x good 1", "x bad 1", "x fine 2"]
    assert all(row["commit"] == "abc" and row["machine"] for row in rows)
    assert work() == 0 and len(calls()) == 4
    assert "3 of 3 runs are there" in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_the_others_go_on_and_it_alone_is_run_again(work, capsys):
    assert work() == 1
    out = capsys.readouterr().out
    assert "failed  fr_x_bad: status 1, see runs/fr_x_bad.log" in out
    assert json.loads(out.splitlines()[-1]) == {"experiment": "frontier", "ran": 3, "failed": ["x bad 1"], "not_run": 1}
    Path("mend").touch()
    assert work() == 0 and len(calls()) == 5
    assert len(frontier.known(Path("found.jsonl"))) == 3


def test_a_plan_that_was_stopped_goes_on_where_it_was(work):
    Path("mend").touch()
    assert work("--max_runs", "1") == 0 and len(frontier.known(Path("found.jsonl"))) == 1
    assert work("--minutes", "0") == 0 and len(calls()) == 2
    assert work("--only", "fine") == 0
    assert [row["run"] for row in frontier.known(Path("found.jsonl"))] == ["x good 1", "x fine 2"]


def test_a_run_that_another_process_holds_is_left_to_it(work):
    Path("mend").touch()
    import zlib

    with open(f"runs/run_{zlib.crc32(b'x good 1')}.lock", "w", encoding="utf-8") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        assert work() == 0
        assert [row["run"] for row in frontier.known(Path("found.jsonl"))] == ["x bad 1", "x fine 2"]
    assert work() == 0 and len(frontier.known(Path("found.jsonl"))) == 3  # the other one died: its lock is free


def test_the_budget_counts_a_shared_step_once_and_not_what_is_done(work, capsys):
    assert work("--plan") == 0 and not calls()
    out = capsys.readouterr().out
    assert "x: 3 runs, 3 min" in out  # 60 + 3 * (30 + 12) seconds
    assert frontier.budget(frontier.plan())["x"] == pytest.approx((60 + 3 * 30 + 3 * frontier.MEASURE_S) / 60)
    Path("runs/fr_sft7.done").touch()
    assert frontier.budget(frontier.plan())["x"] == pytest.approx((3 * 30 + 3 * frontier.MEASURE_S) / 60)


# --- numbers


def test_gains_and_win_rates_by_hand():
    ours = Judged(["a b", "a b c d", "a"], [3.0, 1.0, 2.0], [0.5, 0.5, 2.0], 1.0)
    theirs = Judged(["a b", "a b", "a"], [2.0, 1.0, 4.0], [0.0, 0.0, 1.0], 1.0)
    row = against(ours, theirs, seed=1)
    assert row["gold"] == 2.0 and row["gold_gain"] == pytest.approx((1 + 0 - 2) / 3)
    assert row["proxy"] == 1.0 and row["proxy_gain"] == pytest.approx(2 / 3)
    assert row["win_rate"] == pytest.approx((1 + 0.5 + 0) / 3) and row["length"] == pytest.approx(7 / 3)
    assert row["agreement"] == 0.5  # proxy prefers ours thrice; gold agrees once, once not, and once has no say
    low, high = row["gold_gain_interval"]
    assert -2 <= low < row["gold_gain"] < high <= 1


def row(method: str, strength: str, seed: int, gold: float, part: str = "frontier", **more) -> dict:
    numbers = {"gold_gain": gold - 3, "proxy_gain": gold, "proxy": gold - 1, "win_rate": gold / 10}
    numbers |= {"lc_win_rate": 0.5, "length": 12.0, "agreement": 0.7}
    about = {"run": f"{method} {strength} {seed}", "part": part, "commit": "abc", "machine": "m, 2 cores"}
    spent = {"seconds": 40, "measure_seconds": 20}
    named = {"method": method, "strength": strength, "seed": seed, "gold": gold, "kl": 1.0}
    return about | spent | named | numbers | more


def test_an_interval_over_three_seeds_is_students():
    # 4.0, 4.1, 4.5: mean 4.2, sd 0.2646; t(2, 0.975) = 4.303; half width 4.303 * 0.2646 / sqrt(3) = 0.657
    assert frontier_report.number([4.0, 4.1, 4.5]) == "4.20 ± 0.66"
    assert frontier_report.number([4.0]) == "4.00"  # one seed has none


def test_gains_are_over_the_seeds_own_mean_sft_where_best_of_one_was_measured():
    first = row("best of n", "n 1", 1, 3.5)
    rows = [first, row("ppo", "kl 0", 1, 4.5), row("ppo", "kl 0", 2, 4.5), row("x", "y", 1, 4.5, first_proxy_gain=0.1)]
    gains = [(found["gold_gain"], found["proxy_gain"]) for found in frontier_report.over_sft(rows)]
    assert gains == [(0.0, 0.0), (1.0, 1.0), (1.5, 4.5), (1.0, 4.5)]  # seed 2 has no such row, x another reward model


def test_a_detail_is_compared_with_the_recipe_seed_by_seed():
    base = [row("ppo", "kl 0.15", seed, gold) for seed, gold in ((1, 4.0), (2, 5.0), (3, 3.0))]
    off = [row("detail", "score_at_eos", seed, gold, "details") for seed, gold in ((1, 3.9), (2, 4.9), (3, 2.8))]
    text = frontier_report.details_table([*base, *off])
    (line,) = [line for line in text.splitlines() if "at EOS" in line]
    # differences -0.1, -0.1, -0.2: mean -0.133, sd 0.0577, half 0.143: 0 is inside; the levels alone say nothing
    assert "| 3 | 3.87 ± 2.61 | -0.13 ± 0.14 |" in line
    off[2] |= {"gold": 2.9, "win_rate": 0.29}
    (line,) = [line for line in frontier_report.details_table([*base, *off]).splitlines() if "at EOS" in line]
    assert "-0.10 ± 0.00 *" in line
    assert text.count("not run") == len(SWITCHES) - 1


def test_one_seed_is_never_called_a_difference():
    assert not frontier_report.apart([5.0]) and frontier_report.apart([5.0, 5.1, 5.2])
    assert not frontier_report.apart([5.0, -5.0, 0.1])


def test_what_was_not_run_is_named():
    runs = [run for run in plan() if (run.method, run.strength) != ("dpo", "beta 0.5")]
    rows = [{"run": run.name} for run in runs] + [{"run": "dpo beta 0.5 2"}]
    assert frontier_report.not_run(rows) == "- dpo, beta 0.5: seeds 1, 3"
    assert frontier_report.not_run([{"run": run.name} for run in plan()]).startswith("Nothing")


def test_tables_and_figures_are_made_from_whatever_is_there():
    curve = {"objective/gold": [3.0, 4.0, 3.9], "objective/scores": [0.0, 1.0, 2.0], "hack/length": [12.0, 13.0, 30.0]}
    some = ("sft", "-"), ("ppo", "kl 0.15"), ("ppo", "long, kl 0"), ("ppo, min of 3", "long, kl 0")
    rows = [row(*which, seed, 4.0 + seed / 10, kl=0.5 * seed, curve=curve) for which in some for seed in SEEDS]
    rows.append(row("best of n", "n 4", 1, 4.2))  # one seed, no curve
    filled = frontier_report.tables(rows)
    assert "| ppo, min of 3 | long, kl 0 | 3 | 0.00 ± 0.00 |" in filled["pairs"]
    assert "| ppo | long, kl 0 | 3 of 3, 3 of 3, 3 of 3 | 3.63 ± 0.00 |" in filled["turns"]
    rows.append(row("ppo, second round", "kl 0.05", 1, 4.0, first_agreement=0.6, first_proxy_gain=0.1))
    assert "| ppo, second round | kl 0.05 | 1 | 0.700 | 0.600 | 1.00 |" in frontier_report.tables(rows)["second"]
    rows.append(row("ppo", "kl 0.05", 1, 3.5, proxy_gain=0.4))  # whose reward model gives the second round's texts 0.1
    assert "| ppo, second round | kl 0.05 | 1 | 0.50 | 0.050 | 0.00 | -0.30 |" in frontier_report.tables(rows)["pairs"]
    for figure in (frontier_report.frontier_figure(rows), frontier_report.turning_figure(rows)):
        assert frontier_report.png(figure).startswith(b"\x89PNG")
    page = "".join(f"<!-- {name} -->stale<!-- /{name} -->" for name in filled)
    again = frontier_report.fill(page, filled)
    assert "stale" not in again and frontier_report.fill(again, filled) == again
    with pytest.raises(AssertionError, match="has no place"):
        frontier_report.fill("no places", filled)


def test_the_page_shows_the_results_that_are_in_the_repository():
    rows = frontier.known(frontier.RESULTS)
    page = frontier_report.PAGE.read_text(encoding="utf-8")
    made = frontier_report.fill(page, frontier_report.tables(rows))
    assert made == page, "run: python -m experiments.frontier_report --write"


def test_the_results_are_runs_of_the_plan_and_every_number_is_finite():
    rows, names = frontier.known(frontier.RESULTS), {run.name for run in plan()}
    keys = [(row["run"], row["strength"]) for row in rows]
    assert len(set(keys)) == len(keys) and {row["run"] for row in rows} <= names
    for found in rows:
        for name in ("gold", "proxy", "gold_gain", "proxy_gain", "win_rate", "lc_win_rate", "kl"):
            assert math.isfinite(found[name]), found["run"]
        assert found["posts"] == frontier.POSTS


# --- alarms, on made-up curves

FALLS = [3.0, 3.5, 4.0, 4.5, 4.5, 4.5, 4.0, 3.0, 2.0, 1.0]  # smoothed, best at update 6: 4.5
CALM = [3.0, 3.5, 4.0, 4.4, 4.5, 4.4, 4.5, 4.4, 4.5, 4.4]


def test_a_turn_is_where_the_smoothed_truth_was_best_and_a_fall_where_it_is_well_below():
    # smoothed over the last 3: 4.5 at update 6, 4.33 at 7, 3.83 at 8
    assert early_warning.turn(FALLS) == Turn(best=6, fall=8)
    assert early_warning.turn(CALM) is None and early_warning.turn([1.0]) is None
    assert early_warning.turn([*FALLS, 4.5, 4.5, 4.5]) is None  # it came back


def test_an_alarm_rings_at_the_first_update_beyond_its_threshold_as_hacks_does():
    curve = {"hack/length": [10.0, 12.0, 16.0, 20.0], "val/eos_rate": [1.0, None, 0.7, 0.9]}
    assert early_warning.rings(curve, "hack/length", "times", 1.5) == 3
    assert early_warning.rings(curve, "hack/length", "part", 0.5) is None
    assert early_warning.rings(curve, "val/eos_rate", "below", 0.8) == 3  # what was not measured does not ring
    assert early_warning.rings(curve, "hack/empty", "above", 0.05) is None


def test_rings_agree_with_the_alarms_that_a_run_prints():
    from nanorlhf.evaluation.hacks import Alarms

    for metric, relation, bound, _ in ALARMS:
        values = [1.0, 1.2, 0.9, bound * 1.01, bound * 0.99, bound * 1.6, bound * 0.4, bound * 0.1, 60.0]
        alarms = Alarms()
        printed = [bool(alarms({metric: value})) for value in values]
        assert early_warning.rings({metric: values}, metric, relation, bound) == printed.index(True) + 1


def made_up(gold: list[float], length: list[float]) -> dict:
    return {"objective/gold": gold, "hack/length": length}


def test_leads_and_false_alarms_are_counted_by_hand():
    early = made_up(FALLS, [10, 10, 16, *[20] * 7])  # rings at 3, best at 6: lead 3
    late = made_up(FALLS, [*[10] * 6, 16, 20, 20, 20])  # rings at 7, before the fall at 8: lead -1
    missed = made_up(FALLS, [*[10] * 8, 20, 20])  # rings at 9, after the fall
    quiet, wolf = made_up(CALM, [10] * 10), made_up(CALM, [*[10] * 9, 16])
    found = early_warning.grade([early, late, missed, quiet, wolf], "hack/length", "times", 1.5)
    assert found == Grade("hack/length", 1.5, turns=3, in_time=2, leads=(3, -1), calm=2, wolf=1)
    assert found.merit == pytest.approx(2 / 3 - 1 / 2)


def test_a_threshold_is_chosen_on_one_half_of_the_seeds_and_graded_on_the_other():
    """In half one, lengths of 1.4 announce the turn; in half two they stand in calm runs too: no credit for that."""
    turning, calm = made_up(FALLS, [10, 10, *[14] * 8]), made_up(CALM, [10, 10, *[12.5] * 8])
    assert early_warning.choose([turning, calm], "hack/length", "times") == 1.3
    loud = made_up(CALM, [10, 10, *[14] * 8])
    found = early_warning.held_out({1: [turning, calm], 2: [turning, loud]})
    grade, thresholds = next(pair for pair in found if pair[0].metric == "hack/length")
    assert thresholds[0] == 1.3  # from seed 1, graded on seed 2, where it cries wolf
    assert (grade.turns, grade.in_time, grade.calm, grade.wolf) == (2, 2, 2, 2)
    assert early_warning.held_out({1: [turning]}) == []


def test_every_shipped_alarm_has_a_grid_that_holds_its_threshold():
    assert {metric for metric, *_ in ALARMS} == early_warning.GRID.keys()
    for metric, relation, bound, _ in ALARMS:
        assert bound in early_warning.GRID[metric], f"{metric} {relation}"
