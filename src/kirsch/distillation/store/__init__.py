"""Teacher outputs that are computed once per sample and view, and looked up by every student that learns from them."""

from kirsch.distillation.store.building import build, finish
from kirsch.distillation.store.reading import Check, TeacherStore
from kirsch.distillation.store.record import Dense, TopK

__all__ = ["Check", "Dense", "TeacherStore", "TopK", "build", "finish"]
