"""Configurations and checkpoints of Hugging Face transformers models."""
