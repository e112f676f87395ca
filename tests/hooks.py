"""Check that Kirsch has left no hooks on modules."""

from __future__ import annotations


def assert_no_hooks(*models):
    """Assert that no forward hook is left in the models, other than those of transformers itself."""
    modules = [module for model in models for module in model.modules()]
    hooks = [hook for m in modules for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not [hook for hook in hooks if not hook.__module__.startswith("transformers.")]
