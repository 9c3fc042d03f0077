"""docs/kl_estimators.md: placeholder"""

# %%
from docs.walking.book import Book, ROOT
book = Book(ROOT / "docs" / "kl_estimators.py", "KL")
