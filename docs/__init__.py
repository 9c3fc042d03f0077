"""Pages that a script makes: `python -m docs.walk`."""
