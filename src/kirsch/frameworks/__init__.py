"""One folder a framework, and the protocol that each fulfills."""
