"""The pruned model against the masked original."""
