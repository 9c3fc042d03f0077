"""python -m faults: the harness."""

from faults.harness import main
from nanorlhf.run.streams import as_command

if __name__ == "__main__":
    as_command(main)
