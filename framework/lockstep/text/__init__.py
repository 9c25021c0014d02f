"""Text and tokens: the tokenizer, encoding, blocks of sequences, stop conditions."""
