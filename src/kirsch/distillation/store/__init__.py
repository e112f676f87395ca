"""Storage of teacher outputs, computed once for each sample and view, and read by every student."""

from kirsch.distillation.store.record import Dense, TopK
from kirsch.distillation.store.teacher_store import StoreCheck, TeacherStore, build_store

__all__ = ["Dense", "StoreCheck", "TeacherStore", "TopK", "build_store"]
