"""The flags of a run that is resumed: its own, unless they change no number."""

import json

import pytest
import torch
from test_config import Config, flags, refusal

from nanorlhf.errors import UserError
from nanorlhf.run.config import FREE_ON_RESUME


@pytest.fixture
def began(tmp_path, monkeypatch):
    """began(**settings): a run of that name has begun in runs/, with those settings on top of preset paper's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def begin(run_name="ppo", **settings):
        cfg = vars(flags(f"--preset paper --run_name {run_name}")) | settings
        folder = tmp_path / "runs" / run_name
        folder.mkdir(parents=True)
        settings = {name: cfg[name] for name in Config.__dataclass_fields__}
        (folder / "config.json").write_text(json.dumps({"stage": "ppo", "config": settings}), encoding="utf-8")
        return folder / "config.json"

    return begin


def test_a_resumed_run_goes_on_with_the_settings_it_began_with(began):
    began(lr=7e-6, model="runs/sft/final", max_updates=5, whiten_rewards=True)
    cfg = flags("--resume")  # "auto" alone would be preset tiny here
    assert (cfg.preset, cfg.batch_size, cfg.lr, cfg.max_updates) == ("paper", 512, 7e-6, 5)
    assert cfg.model == "runs/sft/final" and cfg.whiten_rewards is True and cfg.resume is True
    assert cfg.preset_reason == "that of the run"
    again = flags("--resume --lr 7e-6 --preset paper --model runs/sft/final/ --max_updates 5 --whiten_rewards")
    assert vars(again) | {"argv": []} == vars(cfg) | {"argv": []}  # the same flags again are no contradiction


@pytest.mark.parametrize(
    "line, said",
    [
        ("--lr 1e-5", "--lr 1e-05 is not 7e-06, as when runs/ppo began: leave the flag out to resume"),
        ("--preset tiny", "--preset tiny is not 'paper', as when"),
        ("--batch-size 64", "--batch_size 64 is not 512, as when"),
        ("--model elsewhere", "--model elsewhere is not 'runs/sft/final'"),
        ("--no_whiten_rewards", "--whiten_rewards False is not True"),
        ("--max_updates 9", "--max_updates 9 is not None"),
    ],
)
def test_a_flag_that_contradicts_the_run_is_refused_with_both_values(began, line, said):
    began(lr=7e-6, model="runs/sft/final", whiten_rewards=True)
    assert refusal(f"--resume {line}").startswith(said)
    with pytest.raises(UserError, match="--run_name"):
        flags(f"--resume {line}")


def test_what_changes_no_number_may_change_on_resume(began):
    assert set(FREE_ON_RESUME) >= {"resume", "overwrite", "track", "device", "save_every"}
    began(device="cuda:1", save_every=7)
    assert flags("--resume").device == "auto"  # where it began may not be where it goes on
    assert flags("--resume --device cpu").device == "cpu"
    assert flags("--resume").save_every == 7  # not that of the preset which this machine would choose
    assert flags("--resume --save_every 3").save_every == 3


def test_a_run_that_was_tracked_is_tracked_on_unless_told_otherwise(began):
    began(track=True)
    assert flags("--resume").track is True and flags("--resume --no_track").track is False


def test_settings_come_from_the_run_of_that_name_and_only_with_resume(began):
    began(lr=7e-6)
    began("other", lr=8e-6)
    assert flags("--resume").lr == 7e-6 and flags("--resume --run_name other").lr == 8e-6
    assert flags("--preset tiny").lr == 2e-4 and flags("--run_name other").lr == 2e-4


def test_a_setting_that_an_older_run_does_not_know_keeps_its_default(began):
    path = began(lr=7e-6)
    record = json.loads(path.read_text(encoding="utf-8"))
    del record["config"]["kl_coef"]
    record["config"]["gone"] = 3
    path.write_text(json.dumps(record), encoding="utf-8")
    cfg = flags("--resume")
    assert (cfg.lr, cfg.kl_coef) == (7e-6, 0.05) and not hasattr(cfg, "gone")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"config": 3}'])
def test_without_a_readable_record_resume_leaves_the_flags_alone(began, content):
    path = began(lr=7e-6)
    path.write_text(content, encoding="utf-8") if content is not None else path.unlink()
    assert flags("--resume --lr 3e-6").lr == 3e-6  # Run says what is wrong with the folder


def test_restored_settings_are_checked_like_flags(began):
    began(lr=-1.0)
    assert refusal("--resume").startswith("lr -1.0 is not greater than 0")
