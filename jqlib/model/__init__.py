"""What is read: models and the table of their families, text, one walk through the layers, perplexity."""
