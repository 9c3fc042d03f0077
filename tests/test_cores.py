"""Work over several processes gives what one process gives, in the same order."""

import time

from nanorlhf.data import cores
from nanorlhf.data.cores import over_cores


def lengths(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def test_several_processes_give_the_same_in_the_same_order(monkeypatch):
    texts = ["x" * (i % 37) for i in range(1000)]
    alone = over_cores(lengths, texts, cores=1)
    monkeypatch.setattr(cores, "LEAST", 10)
    assert over_cores(lengths, texts, cores=2) == alone == [i % 37 for i in range(1000)]
    assert len(over_cores(lengths, texts[:501], cores=1)) == 501  # a last chunk of one


def test_few_items_start_no_process(monkeypatch):
    monkeypatch.setattr(cores, "ProcessPoolExecutor", None)
    began = time.monotonic()
    assert over_cores(lengths, ["a", "bb"], cores=8) == [1, 2] and time.monotonic() - began < 1


def test_progress_is_told_of_every_chunk():
    seen = []

    def progress(chunks, what, total=None):
        for chunk in chunks:
            seen.append(what)
            yield chunk

    assert len(over_cores(lengths, ["a"] * 600, progress, what="counting")) == 600
    assert seen == ["counting"] * 3
