"""docs/metrics.md cannot rot: every name that a script logs has one row there, and every row is logged by a script."""

import json
import math
from pathlib import Path

import pytest
from stages import run, start

import eval as evaluation
from experiments import metric_ranges
from experiments.metric_ranges import PAGE, fill, names, of_evaluation, of_lines, pattern, sections
from nanorlhf.monitoring import monitor
from nanorlhf.run.config import parse
from nanorlhf.run.run import read_metrics
from nanorlhf.storage.jsonl import finite

EVERY = "Every script"
MORE = {  # what only some runs log is on
    "train_sft": "",
    "train_rm": "",
    "train_ppo": "--kl_estimator full --critic_warmup 1 --sample_every 2",
}
WHOLE = "about", "models", "policies", "reward_model", "examples", "win_rates"  # of metrics.json


@pytest.fixture(scope="module")
def logged(tmp_path_factory, world, models):
    """{heading of the page: the names that the script wrote}; for eval.py those of both of its files."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("metrics"))
        patch.setattr(monitor, "mfu", lambda *_: 0.4)  # as on a GPU whose peak is known
        for script, more in MORE.items():
            if script == "train_ppo":  # two reward models: what one more logs is on
                more += f" --reward_model {models[script].split('--reward_model ')[1]}"
            folder = run(script, world, f"{models[script]} {more}")
            found[f"{script}.py"] = {name for row in read_metrics(folder) for name in row}
        words = models["train_ppo"].split()
        flags = f"--preset tiny --device cpu --data {world} --response_length 8 --diversity_posts 3"
        flags += f" --policy sft={words[1]} ppo=runs/ppo/final --reward_model {words[3]}"
        evaluation.main(parse(evaluation.Config, evaluation.PRESETS, evaluation.__doc__, flags.split()))
        found["eval.py"] = of_eval(Path("runs/eval"))
    return found


def of_eval(folder: Path) -> set[str]:
    """Names of an evaluation, without the policies' and the pairs' own: they are the same for each of them."""
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert tuple(results) == WHOLE
    described = {name for row in results["policies"].values() for name in row}
    games = {name for row in results["win_rates"] for name in row}
    prefixes = [f"eval/{name}/" for name in results["policies"]]
    twice = {f"eval/{row['ours']}_vs_{row['theirs']}/win_rate" for row in results["win_rates"]}
    twice |= {prefix + name for prefix in prefixes for name in described} | {"eval/rm/validation/accuracy"}
    in_lines = {name for row in read_metrics(folder) for name in row} - twice
    return described | games | set(results["reward_model"]) | in_lines - {"not_finite"}


def rows(heading: str) -> list[list[str]]:
    return [row for row in sections(PAGE.read_text(encoding="utf-8"))[heading] if names(row)]


@pytest.mark.parametrize("script", [*MORE, "eval"])
def test_every_name_that_a_script_logs_has_one_row(logged, script):
    heading, known = f"{script}.py", {}
    for row in rows(heading) + rows(EVERY):
        for name in names(row[:1]):
            assert name not in known or heading == "eval.py", f"{name} has two rows"
            known[name] = pattern(name)
    for name in sorted(logged[heading]):
        assert any(form.fullmatch(name) for form in known.values()), f"docs/metrics.md has no row for {name}"


@pytest.mark.parametrize("script", [*MORE, "eval"])
def test_every_row_is_a_name_that_the_script_logs(logged, script):
    for row in rows(f"{script}.py"):
        for name in names(row):
            assert any(pattern(name).fullmatch(key) for key in logged[f"{script}.py"]), f"{script}.py logs no {name}"


def test_what_every_script_logs_is_logged(logged):
    everywhere = set.union(*logged.values()) | set(finite({"loss": math.nan}))
    assert {name for row in rows(EVERY) for name in names(row)} <= everywhere


def test_every_row_says_all_there_is_to_say():
    for heading, table in sections(PAGE.read_text(encoding="utf-8")).items():
        titles = None
        for row in table:
            if row[0] == "name":
                titles = row
                assert row[1] == "what it is" and row[-1] == "when it is otherwise" and "published runs" in row
            elif names(row):
                assert len(row) == len(titles), f"{heading}: {row[0]} has {len(row)} cells, the heading {len(titles)}"
                assert all(row), f"{heading}: {row[0]} has an empty cell, not even a -"


def test_help_console_and_report_point_to_the_page(world, models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for script in ("train_ppo", "eval"):
        module = __import__(script)
        with pytest.raises(SystemExit):
            parse(module.Config, module.PRESETS, module.__doc__, ["--preset", "tiny", "--help"])
        assert "docs/metrics.md" in capsys.readouterr().out
    start("train_sft", f"--preset tiny --device cpu --data {world} {models['train_sft']} --batch_size 8 --max_updates 1 "
          "--eval_posts 4 --response_length 4")  # fmt: skip
    assert "docs/metrics.md" in capsys.readouterr().out
    flags = f"--preset tiny --device cpu --data {world} --response_length 4 --diversity_samples 0 --policy sft=runs/sft/final"
    flags += f" --reward_model {models['train_ppo'].split()[3]}"
    evaluation.main(parse(evaluation.Config, evaluation.PRESETS, evaluation.__doc__, flags.split()))
    assert all(
        "docs/metrics.md" in (tmp_path / "runs/eval" / page).read_text(encoding="utf-8")
        for page in ("report.html", "report.md")
    )


# -- the column that is filled from runs


def test_a_metric_is_told_by_its_first_line_and_the_mean_of_the_last_quarter():
    lines = [{"step": i, "loss": float(i)} for i in range(1, 9)] + [{"step": 8, "rouge": 0.5}]
    assert of_lines(lines, "loss") == (1.0, 7.5)  # 7 and 8
    assert of_lines(lines, "rouge") == (0.5,) and of_lines(lines, "lr") == ()
    assert of_lines([{"loss": None}, {"loss": 2.0}, {"loss": 4.0}], "loss") == (2.0, 4.0)


def test_an_evaluation_is_told_by_ppo_its_games_and_its_card():
    results = {
        "policies": {"sft": {"gold": 3.0}, "ppo": {"gold": 4.0}},
        "win_rates": [
            {"ours": "ppo", "theirs": "sft", "rate": 0.7},
            {"ours": "ppo", "theirs": "reference", "rate": 0.1},
        ],
        "reward_model": {"accuracy": 0.72, "interval": [0.7, 0.74]},
    }
    assert of_evaluation(results, "gold") == (3.0, 4.0)
    assert of_evaluation(results, "rate") == (0.7,) and of_evaluation(results, "accuracy") == (0.72,)
    assert of_evaluation(results, "interval") == ()


PAGE_OF_TWO = """On <!-- where -->nothing<!-- /where -->.
## train_sft.py
| name | what it is | tiny world | when it is otherwise |
|---|---|---|---|
| `a`, `b/<x>` | p(y \\| x) | old | - |
| `time/x` | seconds | old | - |
## eval.py
| name | what it is | tiny world | when it is otherwise |
|---|---|---|---|
| `a` | other | old | - |
"""


def test_the_column_is_filled_and_nothing_else_is_touched():
    found = {"train_sft.py": {"a": [(1.0, 0.5), (2.0, 0.25)], "b/one": [(1234.5,)], "b/two": [(0.00001,)]}}
    found["train_sft.py"]["time/x"] = [(3.0,)]
    filled = fill(PAGE_OF_TWO, found, "seeds 1, 2")
    expected = PAGE_OF_TWO.replace("nothing", "seeds 1, 2").replace(
        "| p(y \\| x) | old", "| p(y \\| x) | 1 to 2 → 0.25 to 0.5; 1e-5 to 1234", 1
    )
    assert filled == expected.replace("seconds | old", "seconds | -")
    assert fill(filled, found, "seeds 1, 2") == filled


def test_the_column_is_filled_from_run_folders(logged, tmp_path, world, models, monkeypatch, capsys):
    page = tmp_path / "metrics.md"
    page.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(metric_ranges, "PAGE", page)
    monkeypatch.chdir(tmp_path)
    folder = run("train_rm", world, models["train_rm"])
    metric_ranges.main([str(folder), "--machine", "an abacus"])
    assert "on an abacus<!--" in page.read_text(encoding="utf-8")
    accuracy = read_metrics(folder)[-1]["eval/rm/validation/accuracy"]
    table = sections(page.read_text(encoding="utf-8"))["train_rm.py"]
    (row,) = [row for row in table if row[0] == "`eval/rm/validation/accuracy`"]
    assert row[3] == f"{accuracy:.3g}"
    with pytest.raises(SystemExit) as ended:
        metric_ranges.main([str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "nowhere" in capsys.readouterr().err
