"""Learning from a teacher: losses, objectives, training."""
