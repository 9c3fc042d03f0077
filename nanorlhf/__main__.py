"""The two commands beside the scripts.

python -m nanorlhf download           OpenAI's posts and comparisons into data/openai (nanorlhf/data/download.py)
python -m nanorlhf status runs/ppo    where a run is, whether it lives, how to resume it (nanorlhf/run/status.py)
"""

import sys

from nanorlhf.data import download
from nanorlhf.errors import check, one_sentence
from nanorlhf.run import status
from nanorlhf.run.streams import as_command

COMMANDS = {"download": download.main, "status": status.main}


def main() -> None:
    words = sys.argv[1:]
    if words[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return
    with one_sentence():
        given = words[0] if words else "(none)"
        check(given in COMMANDS, "command", given, "download or status", "python -m nanorlhf status runs/ppo")
    COMMANDS[given](words[1:])


if __name__ == "__main__":
    as_command(main)
