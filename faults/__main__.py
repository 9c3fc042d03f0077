"""python -m faults: the harness."""

from faults.harness import main

if __name__ == "__main__":
    main()
