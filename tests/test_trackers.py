"""TensorBoard and Weights & Biases: what they are given is read back from their files. Nothing is sent anywhere."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_run import CONFIG, RESUME

from nanorlhf.errors import UserError
from nanorlhf.run.run import Run
from nanorlhf.tiny.data import write_world

ROOT = Path(__file__).parent.parent
TRACKED = replace(CONFIG, track=True)


def finish(run: Run) -> None:
    run.close(failed=True)


def test_tensorboard_gets_every_metric_and_resume_hides_the_steps_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run("ppo", CONFIG, root=tmp_path)
    for step in (1, 2, 3):
        run.log(step, {"loss": float(step)})
    finish(run)
    run = Run("ppo", RESUME, root=tmp_path)
    run.truncate_metrics(1)
    run.log(2, {"loss": 20.0})
    finish(run)
    events = EventAccumulator(str(run.folder / "tb")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 20.0)]


def test_track_without_wandb_is_one_sentence_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--track needs wandb, which is not installed: pip install wandb"):
        Run("ppo", TRACKED, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_track_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run = Run("ppo", CONFIG, root=tmp_path)
    run.log(1, {"loss": 1.0})
    finish(run)


# --- the real package, in processes of their own: it installs hooks for the end of the interpreter


def script(folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess:
    """train_sft.py with --track, without a key and without the settings of whoever runs the tests."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"HOME": str(folder), "NETRC": str(folder / "netrc"), "WANDB_ERROR_REPORTING": "false"} | variables
    env |= {"HTTPS_PROXY": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # what is sent does not get far
    if not (folder / "data").exists():
        write_world(folder / "data", posts={"train": 32, "valid": 4}, comparisons={"train": 4, "valid1": 2})
    small = (
        "--preset tiny --device cpu --data data --batch_size 4 --max_updates 4 --eval_posts 2 --save_every 2 --track"
    )
    command = [sys.executable, ROOT / "train_sft.py", *small.split(), *flags]
    return subprocess.run(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          timeout=300, encoding="utf-8")  # fmt: skip


def records(path: Path) -> list:
    """The records of a .wandb file: a header of 7 bytes, then blocks of 32 KiB in which each piece of a record has its
    checksum, its length and its place: 1 whole, 2 first, 3 middle, 4 last."""
    from wandb.proto import wandb_internal_pb2

    content, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 2**15 - at % 2**15 < 7:  # no room for another piece
            at += 2**15 - at % 2**15
            continue
        _, length, place = struct.unpack("<IHB", content[at : at + 7])
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if place in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            found.append(record)
    return found


def tracked(folder: Path) -> list[dict]:
    """What each start of a run told W&B, oldest first: its id, name and settings, its rows, how it ended."""
    starts = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        every = records(path)
        (run,) = (record.run for record in every if record.WhichOneof("record_type") == "run")
        rows = [record.history.item for record in every if record.WhichOneof("record_type") == "history"]
        rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]
        rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
        ends = [record.exit.exit_code for record in every if record.WhichOneof("record_type") == "exit"]
        config = {update.key: json.loads(update.value_json) for update in run.config.update}
        axes = {record.metric.glob_name: record.metric.step_metric for record in every if record.HasField("metric")}
        starts.append(
            {"id": run.run_id, "name": run.display_name, "config": config, "rows": rows, "ends": ends, "axes": axes}
        )
    return starts


def test_wandb_offline_has_every_metric_under_its_name_and_a_resumed_run_goes_on_as_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    first = script(tmp_path, WANDB_MODE="offline")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "runs" / "sft"
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in written:
        del row["time"]
    (run,) = tracked(folder)
    assert run["rows"] == written and len(written) == 5 and "train/sft/loss" in written[0]
    assert run["id"] == json.loads((folder / "config.json").read_text(encoding="utf-8"))["id"] and run["name"] == "sft"
    assert run["config"]["batch_size"] == 4 and run["ends"] == [0]
    assert run["axes"] == {"*": "step"}  # curves over our step: W&B's own counter cannot go back to a checkpoint

    again = script(tmp_path, "--resume", WANDB_MODE="offline")  # from step 2: 3 and 4 are done once more
    assert again.returncode == 0, again.stderr
    _, resumed = tracked(folder)
    assert resumed["id"] == run["id"] and [row["step"] for row in resumed["rows"]] == [3, 4, 4]
    without_clocks = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in run["rows"][2:]]
    assert [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in resumed["rows"]] == without_clocks


def test_without_a_key_wandb_is_refused_in_one_sentence_before_anything_is_done(tmp_path):
    pytest.importorskip("wandb")
    done = script(tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: --track: W&B says 'No API key configured" in done.stderr.splitlines()[-1]
    assert "WANDB_MODE=offline" in done.stderr.splitlines()[-1] and not (tmp_path / "runs").exists()
