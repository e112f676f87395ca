"""A whole job as data: recipe, tasks, run folder, runner."""
