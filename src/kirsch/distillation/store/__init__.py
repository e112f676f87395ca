"""Storage of teacher outputs, computed once for each sample and view, and read by every student."""

from kirsch.distillation.store.building import build_store
from kirsch.distillation.store.reading import StoreCheck, TeacherStore
from kirsch.distillation.store.record import Dense, TopK

__all__ = ["Dense", "StoreCheck", "TeacherStore", "TopK", "build_store"]
