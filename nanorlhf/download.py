from pathlib import Path

DOWNLOADED = Path("data/openai")
