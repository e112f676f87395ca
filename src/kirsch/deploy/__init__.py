"""The file to ship: export, runtimes, and measuring there."""
