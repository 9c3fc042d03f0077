"""Tokens that were added to a tokenizer after it was trained: a mark of a chat, a PAD, a word of its own.

Three files may name them: tokenizer.json (added_tokens), tokenizer_config.json (added_tokens_decoder) and, in older
folders, added_tokens.json. They have to agree. Special ones are never produced from a text. The others are: wherever
one stands in a text it is one id, whatever the vocabulary would make of its letters, and what lies between is encoded
by itself, as transformers does it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from nanorlhf.errors import UserError


class Added(NamedTuple):
    id: int
    special: bool
    rule: str | None  # lstrip, rstrip or single_word, where one is on
    normalized: bool


def read(folder: Path, files: dict[str, bytes]) -> dict[str, Added]:
    """{text of the token: its id, and whether it is special}, from the bytes of a folder's files. Raises UserError for
    a token of which two files say different things."""
    config = _object(folder / "tokenizer_config.json", files)
    sources = {
        "tokenizer.json": _object(folder / "tokenizer.json", files).get("added_tokens") or [],
        "tokenizer_config.json": _listed(config.get("added_tokens_decoder") or {}),
        "added_tokens.json": [{"content": k, "id": v} for k, v in _object(folder / "added_tokens.json", files).items()],
    }
    named = _named(config) | _named(_object(folder / "special_tokens_map.json", files))
    found, said_by = {}, {}
    for source, tokens in sources.items():
        for token in tokens:
            try:
                content, i, special = token["content"], token["id"], token.get("special")
                rule = next((rule for rule in ("lstrip", "rstrip", "single_word") if token.get(rule)), None)
                sound = bool(content) and isinstance(content, str) and type(i) is int and special in (None, True, False)
            except (KeyError, TypeError, AttributeError):
                sound = False
            if not sound:
                raise UserError(f"{folder / source}: an added token is {str(token)[:80]}, expected content and id")
            if special is None:  # added_tokens.json says no more than the id
                special = found[content].special if content in found else content in named
            if content in found and found[content][:2] != (i, special):
                raise UserError(
                    f"{folder}: the added token {content!r} is {_said(*found[content][:2])} in {said_by[content]} and "
                    f"{_said(i, special)} in {source}, expected the same: keep the files that came with the model"
                )
            if content not in found:
                normalized = bool(token.get("normalized", not special))
                found[content], said_by[content] = Added(i, special, rule, normalized), source
    return found


def check_known(folder: Path, there: set[str], tokens: dict[str, Added], where: str) -> None:
    """Raise UserError for an added token that is not `there`, in the tokenizer's own file, whose name is `where`."""
    for content, token in tokens.items():
        if content not in there:
            raise UserError(
                f"{folder}: the added token {content!r} is {_said(*token[:2])} in one of its files, but {where} does "
                "not say so, expected the same: keep the files that came with the model"
            )


def finders(folder: Path, tokens: dict[str, Added]) -> list[re.Pattern]:
    """What finds the added tokens that are text: first those with normalized false, then the others in what is left;
    the longest first. Raises UserError for a token that is found by rules which are not implemented here."""
    texts = sorted((content for content, token in tokens.items() if not token.special), key=len, reverse=True)
    for content in texts:
        if tokens[content].rule:
            raise UserError(
                f"{folder}: the added token {content!r} has {tokens[content].rule} true, expected false: that is not "
                "implemented here, and its ids would not be those that the model was trained on"
            )
        if re.search(r"\w \w", content):
            raise UserError(
                f"{folder}: the added token {content!r} holds a space between two words, expected none: long posts are "
                "cut and encoded between words"
            )
    rounds = ([text for text in texts if tokens[text].normalized is wanted] for wanted in (False, True))
    return [re.compile("|".join(map(re.escape, some))) for some in rounds if some]


def encode_around(
    encode: Callable[[str], list[int]], find: list[re.Pattern], tokens: dict[str, Added], first: Callable[[str], str]
) -> Callable[[str], list[int]]:
    """`encode`, with the added tokens that stand in a text as one id each. first: what is done to a text that the first
    of its words begins, and not to what follows an added token."""

    def split(text: str, rounds: list[re.Pattern], begin: int) -> list[int]:
        if not rounds:
            return encode(first(text) if begin == 0 else text) if text else []
        ids, at = [], 0
        for match in rounds[0].finditer(text):
            ids += [*split(text[at : match.start()], rounds[1:], begin + at), tokens[match[0]].id]
            at = match.end()
        return ids + split(text[at:], rounds[1:], begin + at)

    return lambda text: split(text, find, 0)


def place(tokens: list[bytes], added: dict[str, Added], path: Path) -> list[bytes]:
    """The bytes of every id: those of the vocabulary, then the added ones behind it; nothing for special ones. Raises
    UserError for ids that are taken or leave a gap."""
    behind = sorted((token.id, content) for content, token in added.items() if token.id >= len(tokens))
    if [i for i, _ in behind] != list(range(len(tokens), len(tokens) + len(behind))):
        raise UserError(
            f"{path}: added tokens have the ids {[i for i, _ in behind][:8]}, expected one each from {len(tokens)} on: "
            "keep the files that came with the model"
        )
    return tokens + [b"" if added[content].special else content.encode("utf-8", "replace") for _, content in behind]


def _said(i: int, special: bool) -> str:
    return f"id {i}, {'special' if special else 'text'}"


def _object(path: Path, files: dict[str, bytes]) -> dict:
    try:
        found = json.loads(files.get(path.name, b"{}"))
        if not isinstance(found, dict):
            raise ValueError(f"a JSON {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a complete {path.name} ({error}): fetch the file again") from None
    return found


def _listed(decoder) -> list:
    """added_tokens_decoder, {"128000": {"content": ...}}, in the form of the other file."""
    items = decoder.items() if isinstance(decoder, dict) else [("?", decoder)]
    return [token | {"id": int(i)} if isinstance(token, dict) and i.isdecimal() else token for i, token in items]


def _named(config: dict) -> set[str]:
    """The tokens that bos_token, eos_token, ... and additional_special_tokens name."""
    values = [value for key, value in config.items() if key.endswith("_token")]
    more = config.get("additional_special_tokens")
    values += more if isinstance(more, list) else []
    values = [value.get("content") if isinstance(value, dict) else value for value in values]
    return {value for value in values if isinstance(value, str)}
