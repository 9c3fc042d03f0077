"""Models from the hub, with the real huggingface_hub against a hub on this machine (tests/hub_server.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, hub

import train_sft
from nanorlhf.data.hub import LLAMA, UNGATED, hub_id_of
from nanorlhf.errors import UserError
from nanorlhf.run.config import parse

ROOT = Path(__file__).parents[1]
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": os.urandom(2_000_000),
    "tokenizer.json": b"{}",
    "original/tokenizer.model": b"IQ== 0\n",
    "original/consolidated.00.pth": b"the weights once more",
    "onnx/model.safetensors": b"and again",
    "README.md": b"# A model",
}
READ = {"config.json", "model.safetensors", "tokenizer.json", "original/tokenizer.model"}
NO_HUB = "http://127.0.0.1:9"


@pytest.fixture
def fetch(tmp_path):
    """fetch(address, model id, **environment) -> (folder or None, error line), in a process of its own: huggingface_hub
    reads its settings when it is imported."""

    def run(address: str, model_id: str = "someone/llama", **environment):
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"} | environment
        program = f"from nanorlhf.data.hub import fetch; print(fetch({model_id!r}))"
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, **settings},
            capture_output=True,
            encoding="utf-8",
        )
        last = done.stderr.strip().split("\n")[-1]
        assert done.returncode == 0 or last.startswith("nanorlhf.errors.UserError: "), done.stderr
        return (Path(done.stdout.strip()) if done.returncode == 0 else None), last

    return run


def stored(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_what_is_read_is_fetched_and_a_second_time_nothing_is(fetch):
    with hub(FILES) as (address, seen):
        folder, _ = fetch(address)
        assert stored(folder) == {name: FILES[name] for name in READ} and folder.name == COMMIT
        before = len([request for request in seen if "/resolve/" in request[1]])
        assert fetch(address)[0] == folder
        assert len([request for request in seen if "/resolve/" in request[1]]) == before
    assert fetch(NO_HUB, HF_HUB_OFFLINE="1")[0] == folder  # without a network
    assert fetch(NO_HUB)[0] == folder  # with one that does not answer


def test_every_shard_is_fetched(fetch):
    shards = {f"model-0000{n}-of-00002.safetensors": os.urandom(1000) for n in (1, 2)}
    files = {"config.json": b"{}", "model.safetensors.index.json": b"{}"} | shards
    with hub(files) as (address, _):
        assert stored(fetch(address)[0]) == files


def test_a_connection_that_is_cut_is_resumed_where_it_broke(fetch):
    files = FILES | {"model.safetensors": os.urandom(25_000_000)}
    with hub(files, faults={"model.safetensors": [22_000_000]}) as (address, seen):
        assert stored(fetch(address)[0]) == {name: files[name] for name in READ}
    ranges = [asked for verb, path, asked in seen if verb == "GET" and path.endswith("model.safetensors")]
    assert ranges[0] is None and int(ranges[1].removeprefix("bytes=").split("-")[0]) > 10_000_000


def test_a_download_that_breaks_off_is_one_sentence_and_a_second_try_keeps_what_is_complete(fetch):
    with hub(FILES, faults={"model.safetensors": [503]}) as (address, seen):
        folder, said = fetch(address)
        assert folder is None and "the download broke off" in said and "503" in said and "same command again" in said
        folder, said = fetch(address, HF_HUB_OFFLINE="1")  # half a model is none
        assert folder is None and "not complete in the cache" in said
        folder, _ = fetch(address)
        assert stored(folder) == {name: FILES[name] for name in READ}
        fetched = [path for verb, path, _ in seen if verb == "GET" and path.endswith("config.json")]
        assert len(fetched) == 1


def test_a_file_that_arrives_damaged_is_dropped_and_fetched_again_by_the_next_try(fetch):
    with hub(FILES, faults={"model.safetensors": ["damaged"]}) as (address, _):
        folder, said = fetch(address)
        assert folder is None and "model.safetensors: arrived damaged" in said and "run the same command again" in said
        assert stored(fetch(address)[0]) == {name: FILES[name] for name in READ}


def test_a_gated_model_names_its_licence_page_and_an_ungated_one(fetch):
    faults = {name: ["gated"] * 3 for name in FILES}
    with hub(FILES, LLAMA, faults) as (address, _):
        folder, said = fetch(address, LLAMA)
    assert folder is None and f"accept the licence on https://huggingface.co/{LLAMA}" in said
    assert "`hf auth login`" in said and "`huggingface-cli login`" in said and f"--model {UNGATED}" in said


@pytest.mark.parametrize(
    "files, model_id, faults, words",
    [
        (FILES, "someone/else", {}, "neither a folder here nor a model on the hub"),
        (FILES, "someone/my--llama", {}, "is not a folder here and cannot be an id of the hub"),
        (FILES, "someone/llama", {"api": [500] * 9}, "the hub cannot be reached"),
        (FILES, "someone/llama", {"model.safetensors": [403]}, "the download broke off"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "someone/llama", {}, "holds no safetensors"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(fetch, files, model_id, faults, words):
    with hub(files, faults=faults) as (address, _):
        folder, said = fetch(address, model_id)
    assert folder is None and model_id in said and words in said


def test_without_a_network_and_a_cache_the_sentence_says_so(fetch):
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        folder, said = fetch(NO_HUB, **environment)
        assert folder is None and "not a folder here, not complete in the cache, and the hub cannot be reached" in said


def test_a_hub_id_is_read_from_the_caches_folder_names_only():
    cached = "/somewhere/hub/models--meta-llama--Llama-3.2-1B/snapshots/0123abc"
    assert hub_id_of(cached) == "meta-llama/Llama-3.2-1B"
    assert hub_id_of("runs/sft/final") is None and hub_id_of("models--x/y") is None


def test_a_run_that_began_with_a_hub_id_is_resumed_with_it_or_without(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = f"/cache/hub/models--someone--llama/snapshots/{COMMIT}"
    Path("runs/sft").mkdir(parents=True)
    Path("runs/sft/config.json").write_text(
        json.dumps({"config": {"model": cached, "run_name": "sft"}}), encoding="utf-8"
    )
    for flags in ([], ["--model", "someone/llama"], ["--model", cached]):
        cfg = parse(train_sft.Config, train_sft.PRESETS, "", ["--preset", "tiny", "--resume", *flags])
        assert cfg.model == cached
    with pytest.raises(UserError, match="--model someone/other is not"):
        parse(train_sft.Config, train_sft.PRESETS, "", ["--preset", "tiny", "--resume", "--model", "someone/other"])
