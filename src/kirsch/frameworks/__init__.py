"""Framework protocol, training data and settings; each framework has its own subpackage."""
