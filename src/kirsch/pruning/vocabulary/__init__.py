"""Removal of tokens from the vocabulary of a language model and of its tokenizer."""
