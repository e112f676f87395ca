"""What to remove: importance, choice, removal, storage."""
