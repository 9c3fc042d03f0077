"""Which model and which data a script takes, and what it says where there is none."""

import json
from pathlib import Path

import pytest

from nanorlhf.data.hub import LLAMA
from nanorlhf.errors import UserError
from nanorlhf.run import inputs
from nanorlhf.run.inputs import find_data, find_model

PRESETS = ["tiny", "llama-1b", "paper"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Without a network: the hub is a folder name (tests/test_hub.py has the real one)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inputs, "fetch", lambda model_id: Path("cache") / model_id)


def finished(stage: str, preset: str | None, folder: str = "runs"):
    """A run of that stage with a final/, by a script of ours (preset) or by somebody else (None)."""
    run = Path(folder) / stage
    (run / "final").mkdir(parents=True)
    if preset:
        (run / "config.json").write_text(json.dumps({"stage": stage, "config": {"preset": preset}}), encoding="utf-8")
    return run / "final"


def test_a_flag_beats_the_run_before():
    finished("sft", "tiny")
    Path("mine").mkdir()
    assert find_model("sft", "mine", "sft_model", "tiny") == (Path("mine"), "--sft_model")
    with pytest.raises(UserError, match="sft_model: nowhere is not a folder"):
        find_model("sft", "nowhere", "sft_model", "tiny")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("upstream", [*PRESETS, None])
def test_the_run_before_is_taken_when_both_are_tiny_or_neither_is(upstream, preset):
    final = finished("rm", upstream)
    if (upstream == "tiny") == (preset == "tiny"):
        assert find_model("rm", None, "reward_model", preset) == (final, "the rm run")
    elif preset == "tiny":
        assert find_model("rm", None, "reward_model", preset) == (inputs.EMBEDDED / "rm", "embedded")
    else:
        with pytest.raises(UserError, match=r"reward_model: no rm model found.*python train_rm.py.*--reward_model DIR"):
            find_model("rm", None, "reward_model", preset)


def test_a_run_that_has_not_finished_is_not_taken():
    finished("sft", "paper").rmdir()
    with pytest.raises(UserError, match="no sft model found"):
        find_model("sft", None, "sft_model", "paper")


def test_a_base_model_comes_from_no_run():
    finished("base", "tiny")
    assert find_model("base", None, "model", "tiny") == (inputs.EMBEDDED / "base", "embedded")
    assert find_model("base", None, "model", "llama-1b") == (
        Path("cache/meta-llama/Llama-3.2-1B"),
        LLAMA + " on the hub",
    )


def test_a_model_may_be_named_by_its_hub_id_unless_a_folder_has_that_name():
    assert find_model("sft", "someone/sft", "sft_model", "tiny") == (
        Path("cache/someone/sft"),
        "someone/sft on the hub",
    )
    Path("someone/sft").mkdir(parents=True)
    assert find_model("sft", "someone/sft", "sft_model", "tiny") == (Path("someone/sft"), "--sft_model")


@pytest.mark.parametrize("typed", ["nowhere", "/nowhere/x", "./nowhere/x", "runs/sfft", "a/b/c", "a/ b", "-a/b"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(typed):
    finished("sft", "tiny")
    with pytest.raises(UserError, match="is not a folder, expected a Hugging Face model folder or a hub id"):
        find_model("sft", typed, "sft_model", "tiny")


def test_data_is_the_flags_or_in_the_tiny_world_its_own(monkeypatch):
    Path("mine").mkdir()
    assert find_data("mine", "llama-1b") == (Path("mine"), "--data")
    monkeypatch.setattr(inputs, "ensure_world", lambda folder: folder)
    assert find_data(None, "tiny") == (Path("data/tiny"), "the embedded tiny world")
    for flag, preset, said in (
        ("nowhere", "tiny", "nowhere is not a folder"),
        (None, "paper", "python -m nanorlhf download"),
    ):
        with pytest.raises(UserError, match=said):
            find_data(flag, preset)
    Path("data/openai").mkdir(parents=True)
    assert find_data(None, "paper") == (Path("data/openai"), "as downloaded")
