"""What makes the results of docs/: seeds, planted bugs, over-optimisation, real text, Llama's shape.
Each module is a command."""
