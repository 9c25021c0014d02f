"""Text and tokens: tokenizer, encoding, blocks of sequences, what ends a response."""
