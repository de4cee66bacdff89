"""How work is run: threads, working memory, processes, hashing of tensors."""
