"""Text to token ids: Reddit posts and comparisons (`tldr`), the tokenizers, many posts at once on all cores, and what
is fetched from OpenAI and from the hub."""
