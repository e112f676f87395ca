"""What must stay together: labels, relations, coupling, groups, cost, plan. Numpy and scipy alone."""
