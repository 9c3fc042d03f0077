"""Folders in, out, and back after a kill: Hugging Face models (`checkpoint`, `weights`, `model_config`), what
`--resume` goes on from, and files that are whole or absent."""
