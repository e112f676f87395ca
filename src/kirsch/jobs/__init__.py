"""Jobs: a list of steps, each run once, and the state that they share."""
