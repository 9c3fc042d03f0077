"""Downloads from a server on this machine that cuts, lies and refuses; what was published is made small."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from file_server import LINES, Server, small_set

from nanorlhf.data import download as module
from nanorlhf.data.download import BATCHES, download, fetch
from nanorlhf.data.tldr import load_comparisons, load_posts
from nanorlhf.errors import UserError

ROOT = Path(__file__).parents[1]
PUBLISHED = len(LINES.splitlines())


@pytest.fixture
def serve():
    started = []

    def start(files, **options) -> Server:
        server = Server(files, **options)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "_pause", lambda failures: 0.01)


def test_a_file_comes_whole_and_only_once(serve, tmp_path):
    server = serve({"/a": LINES})
    assert fetch(server.url + "/a", tmp_path / "deep" / "a.jsonl", PUBLISHED)
    assert not fetch(server.url + "/a", tmp_path / "deep" / "a.jsonl", PUBLISHED)
    assert (tmp_path / "deep" / "a.jsonl").read_bytes() == LINES and len(server.seen) == 1
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("md5", [True, False])
@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_is_cut_is_resumed_at_its_last_byte(serve, tmp_path, ranges, md5):
    server = serve({"/a": LINES}, ranges=ranges, md5=md5)
    server.faults = [("cut", 100_000), 503, ("cut", 50_000), 500]
    fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert (tmp_path / "a.jsonl").read_bytes() == LINES
    asked = [asked for _, asked in server.seen]
    if ranges:
        assert asked == [None, "bytes=100000-", "bytes=100000-", "bytes=150000-", "bytes=150000-"]


def test_a_download_that_never_gets_on_ends_in_one_sentence_and_the_next_goes_on(serve, tmp_path):
    server = serve({"/a": LINES})
    server.faults = [("cut", 100_000)] + [503] * module.ATTEMPTS
    with pytest.raises(UserError, match=r"/a: the download broke off at 100,000 bytes \(status 503\).* goes on from"):
        fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl.partial"]
    server.faults, server.seen = [], []
    fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert server.seen == [("/a", "bytes=100000-")] and (tmp_path / "a.jsonl").read_bytes() == LINES


def test_a_slow_connection_may_be_cut_any_number_of_times_as_long_as_it_gets_on(serve, tmp_path):
    server = serve({"/a": LINES})
    server.faults = [("cut", 10_000)] * 3 * module.ATTEMPTS
    fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert (tmp_path / "a.jsonl").read_bytes() == LINES and len(server.seen) == 3 * module.ATTEMPTS + 1


def test_a_server_without_ranges_that_always_cuts_does_not_keep_us_for_ever(serve, tmp_path):
    server = serve({"/a": LINES}, ranges=False)
    server.faults = [("cut", size) for size in (100_000, 50_000) * 50]
    with pytest.raises(UserError, match="the download broke off at (50|100),000 bytes"):
        fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert len(server.seen) == module.ATTEMPTS


def test_a_file_that_was_whole_when_the_last_run_ended_is_only_checked(serve, tmp_path):
    server = serve({"/a": LINES})
    (tmp_path / "a.jsonl.partial").write_bytes(LINES)
    fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert (tmp_path / "a.jsonl").read_bytes() == LINES


@pytest.mark.parametrize(
    "fault, said",
    [
        (403, "answers 403 Forbidden, expected the file: check the network's proxy"),
        (404, "answers 404 Not Found, expected the file: fetch it by hand into"),
        (410, "answers 410 Gone"),
    ],
)
def test_a_server_that_refuses_is_asked_once(serve, tmp_path, fault, said):
    server = serve({"/a": LINES})
    server.faults = [fault]
    with pytest.raises(UserError, match=said):
        fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert len(server.seen) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "fault, md5, said",
    [
        (("bytes", LINES.replace(b"hates", b"loves", 1)), True, "its MD5 is .*, the server's"),
        (("bytes", LINES.replace(b"hates", b"loves", 1)), True, "run the same command again"),
        (("size", len(LINES) - 2_000), True, "its MD5 is"),
        (("size", len(LINES) - 2_000), False, "malformed JSON"),
        (("size", len(LINES[: LINES.rindex(b"\n", 0, -1) + 1])), False, f"{PUBLISHED - 1} rows, expected {PUBLISHED}"),
        (("bytes", b"<html>log in to this network</html>"), False, "malformed JSON"),
        (("bytes", b""), False, "0 rows"),
    ],
)
def test_content_that_is_not_what_was_published_is_refused_and_a_second_try_begins_anew(
    serve, tmp_path, fault, md5, said
):
    server = serve({"/a": LINES}, md5=md5)
    server.faults = [fault]
    with pytest.raises(UserError, match=f"/a: what came is not the published file .*{said}"):
        fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert not list(tmp_path.iterdir())
    fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)
    assert (tmp_path / "a.jsonl").read_bytes() == LINES


def test_a_length_that_is_too_large_is_a_broken_connection(serve, tmp_path):
    server = serve({"/a": LINES})
    server.faults = [("size", len(LINES) + 10)]
    fetch(server.url + "/a", tmp_path / "a.jsonl", PUBLISHED)  # the rest is asked for, there is none: it was whole
    assert (tmp_path / "a.jsonl").read_bytes() == LINES


def test_an_address_where_nobody_answers_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="the download broke off at 0 bytes .*refused"):
        fetch("http://127.0.0.1:9/a", tmp_path / "a.jsonl")


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(monkeypatch):
    """path -> content of a small published set, with its row counts."""
    return small_set(monkeypatch.setattr)


def test_the_published_files_land_where_the_readers_look(serve, published, tmp_path, capsys):
    server = serve(published)
    download(tmp_path / "d", server.url)
    assert len(load_posts(tmp_path / "d", "train")) == 3 and len(load_posts(tmp_path / "d", "test")) == 1
    cnndm = 3  # their batches' rows are left out by the reader
    assert len(load_comparisons(tmp_path / "d", "train")) == 2 * (len(BATCHES) - cnndm)
    assert len(server.seen) == 3 + 23 == len(published)
    assert "3 posts" in capsys.readouterr().out
    download(tmp_path / "d", server.url)
    assert len(server.seen) == len(published)


def test_only_posts_or_only_comparisons_can_be_asked_for(serve, published, tmp_path):
    server = serve(published)
    download(tmp_path, server.url, only="posts")
    assert {path.name for path in tmp_path.iterdir()} == {"tldr"}
    download(tmp_path, server.url, only="comparisons")
    assert len(server.seen) == len(published)


def test_a_batch_with_another_number_of_rows_is_noticed(serve, published, tmp_path):
    name = "/dataset/comparisons/batch7.json"
    published[name] = published[name].splitlines(keepends=True)[0]
    with pytest.raises(UserError, match=r"comparisons: {'train': 45, 'valid': 22} rows, expected {'train': 46"):
        download(tmp_path, serve(published).url)


def test_the_published_addresses_and_counts_are_those_of_the_paper():
    assert module.SOURCE == "https://openaipublic.blob.core.windows.net/summarize-from-feedback"
    assert module.POSTS == {"train": 116_722, "valid": 6_447, "test": 6_553}
    assert module.COMPARISONS == {"train": 92_858, "valid": 86_086} and len(BATCHES) == 23


@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGKILL])
def test_the_command_goes_on_after_it_was_interrupted(serve, published, tmp_path, interrupt):
    """Interrupted in the middle of a file, in a process of its own. There the published counts hold, so the second run
    fetches the rest and ends with the sentence that this is not it."""
    name = "/datasets/tldr_3_filtered/train.jsonl"
    server = serve({name: LINES * 200})  # 90 MB
    server.faults = [("stall", 40_000_000)]  # so that the signal arrives in the middle on any machine
    command = [sys.executable, "-m", "nanorlhf", "download", "--data", tmp_path / "d", "--source", server.url]
    partial = tmp_path / "d" / "tldr" / "train.jsonl.partial"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8")
    while not partial.exists() or partial.stat().st_size == 0:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(interrupt)
    said = process.communicate()[1]
    server.go_on.set()
    size = partial.stat().st_size
    assert 0 < size < len(server.files[name])
    if interrupt == signal.SIGINT:
        assert process.returncode == 130 and "the same command again goes on" in said and "Traceback" not in said
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert server.seen[-1] == (name, f"bytes={size}-")
    assert done.returncode == 2 and "100,000 rows, expected 116,722" in done.stderr and "Traceback" not in done.stderr
    assert not os.listdir(tmp_path / "d" / "tldr")
