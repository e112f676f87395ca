"""What must stay together: labels, relations, coupling, groups, cost, plan. Numpy alone."""
