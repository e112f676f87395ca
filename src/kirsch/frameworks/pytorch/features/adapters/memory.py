"""The adapter of CRD, a memory bank with embeddings of all samples, for more negatives than a batch has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.frameworks.adapters.options import MOMENTUM
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, META, Adapter, without_autocast
from kirsch.frameworks.pytorch.features.adapters.vectors import Embedding

if TYPE_CHECKING:
    from torch import Tensor

    from kirsch.frameworks.adapters.shapes import Shape

NO_OWNER = -1
"""Owner of a row to which no sample has been written."""


def bank_bytes(rows: int, width: int = 128, dtype: torch.dtype = torch.float32) -> int:
    """Return the number of bytes of the embeddings in a bank, of student and teacher together.

    Args:
        rows: number of samples, or size of the queue.
        width: width of an embedding.
        dtype: type of the adapter.
    """
    return 2 * rows * width * dtype.itemsize


@ADAPTERS.register("crd-bank")
class MemoryBank(Adapter):
    """The adapter "crd-bank": contrasts the embedding of each sample with stored embeddings of the other network.

    Returns two arrays (N, 1 + negatives) for the loss "crd", one for each direction. The first column is the positive,
    the others are the negatives. Each value is

        log(exp(v · w / temperature) / Z) - log(negatives / rows)

    where v is the embedding in this batch, with gradient, and w a stored embedding of the other network, without
    gradient. Z is the mean of exp(v · w / temperature) over the first training batch, times the number of rows, and
    stays fixed.

    There is one bank for the student's embeddings and one for the teacher's; each sample has a row in both. After a
    training batch, the rows of the samples in the batch are updated to momentum · row +
    (1 - momentum) · embedding, scaled to norm 1. In inference mode nothing is written. Negatives are drawn uniformly
    with replacement from the rows of other samples, by PyTorch's generator.

    With `size`, the most recent embeddings are kept in a queue of this size. The positive is then the other network's
    embedding of the sample in the same batch. Rows of the same sample do not count as negatives: their value is minus
    infinity, which adds nothing to the loss.

    Args:
        student, teacher: shape (N, D), (N, L, D) or (N, C, H, W); tokens and maps are averaged over positions.
        options: see `MemoryBankOptions`.
    """

    bank_student: Tensor
    bank_teacher: Tensor
    z_student: Tensor
    z_teacher: Tensor
    owners: Tensor
    head: Tensor

    def __init__(
        self,
        student: Shape,
        teacher: Shape,
        *,
        samples: int | None,
        size: int | None,
        negatives: int,
        temperature: float,
        momentum: float | None,
        width: int,
    ) -> None:
        super().__init__()
        self.queue, self.samples = size is not None, samples
        self.rows = size if size is not None else samples or 0  # the options demand one of the two
        self.negatives, self.temperature = negatives, temperature
        self.momentum = MOMENTUM if momentum is None else momentum
        self.student = Embedding(student, width, pool=True, normalize=True)
        self.teacher = Embedding(teacher, width, pool=True, normalize=True)
        for name in ("student", "teacher"):
            self.register_buffer(f"bank_{name}", functional.normalize(torch.randn(self.rows, width), dim=-1))
            self.register_buffer(f"z_{name}", torch.zeros(()))  # 0 until the first training batch
        if self.queue:
            self.register_buffer("owners", torch.full((self.rows,), NO_OWNER))
            self.register_buffer("head", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Return the logits of both directions, (N, 1 + negatives).

        Raises:
            UsageError: there are no ids.
            DataError: an id is out of range.
            ShapeError: the number of ids is not the number of samples.
        """
        ids = self._check_ids(ids, student)
        vectors_s = self.student(self.cast(student))
        vectors_t = self.teacher(self.cast(teacher.detach()))
        with without_autocast(vectors_s):
            dtype = self.bank_student.dtype
            vectors_s, vectors_t = vectors_s.to(dtype), vectors_t.to(dtype)
            rows = self._draw_rows(ids)
            pair = (
                self._logits(vectors_s, vectors_t, self.bank_teacher, self.z_student, ids, rows),
                self._logits(vectors_t, vectors_s, self.bank_student, self.z_teacher, ids, rows),
            )
            if self.training:
                self._store(vectors_s.detach(), vectors_t.detach(), ids)
        return pair

    def _check_ids(self, ids: Any, student: Tensor) -> Tensor:
        if ids is None:
            raise UsageError(
                "The adapter 'crd-bank' needs the ids of the samples.",
                "It stores embeddings by sample.",
                "Use data with sample ids, or the adapter 'embed' with a loss within the batch.",
            )
        ids = torch.as_tensor(ids, device=student.device)
        if ids.shape != (len(student),):
            raise ShapeError(
                f"The ids have shape {tuple(ids.shape)} for {len(student)} samples; one id per sample is needed."
            )
        if self.samples is not None and ids.device.type != META:
            outside = (ids < 0) | (ids >= self.samples)
            if bool(outside.any()):
                raise DataError(
                    f"A batch has the sample id {int(ids[outside][0])}.",
                    f"The bank has {self.samples} samples, numbered from 0 to {self.samples - 1}.",
                    "Set the option `samples` to the number of samples in the data.",
                )
        numbers: Tensor = ids.long()
        return numbers

    def _draw_rows(self, ids: Tensor) -> Tensor:
        """Return rows of negatives, (N, K); in a queue they may include rows of the sample itself."""
        shape = (len(ids), self.negatives)
        if self.queue:
            return torch.randint(self.rows, shape, device=ids.device)
        drawn = torch.randint(self.rows - 1, shape, device=ids.device)
        rows: Tensor = drawn + (drawn >= ids[:, None])  # skips the row of the sample itself
        return rows

    def _logits(self, vectors: Tensor, others: Tensor, bank: Tensor, z: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Return log(exp(v · w / temperature) / Z / noise) of one direction, (N, 1 + K); noise is negatives / rows."""
        positive = others.detach() if self.queue else bank[ids]
        negatives = products(vectors, bank, rows)
        if self.queue:
            negatives = negatives.masked_fill(self.owners[rows] == ids[:, None], -torch.inf)
        scores = torch.cat([(vectors * positive).sum(-1, keepdim=True), negatives], 1) / self.temperature
        with torch.no_grad():
            estimate = scores.exp().sum() / (scores > -torch.inf).sum() * self.rows
            fixed = torch.where(z > 0, z, estimate)
            if self.training:
                z.copy_(fixed)
        noise = self.negatives / self.rows
        return scores - torch.log(fixed * noise)

    @torch.no_grad()
    def _store(self, vectors_s: Tensor, vectors_t: Tensor, ids: Tensor) -> None:
        if self.queue:
            vectors_s, vectors_t, ids = vectors_s[-self.rows :], vectors_t[-self.rows :], ids[-self.rows :]
            rows = (self.head + torch.arange(len(ids), device=ids.device)) % self.rows
            self.owners[rows] = ids
            self.head.add_(len(ids)).remainder_(self.rows)
        else:
            rows = ids
            vectors_s, vectors_t = (
                functional.normalize(self.momentum * bank[ids] + (1 - self.momentum) * new, dim=-1)
                for bank, new in ((self.bank_student, vectors_s), (self.bank_teacher, vectors_t))
            )
        self.bank_student[rows] = vectors_s
        self.bank_teacher[rows] = vectors_t


def products(vectors: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Return the inner products of each vector (N, D) with its rows (N, K) of a bank (R, D): shape (N, K).

    The products with all rows, (N, R), often need less memory than the selected rows, (N, K, D), even with a copy of
    the bank. The gradient needs this copy, because the bank is overwritten before the backward pass.
    """
    (count, width), selected = vectors.shape, rows.shape[1]
    if len(bank) * (count + width) <= count * selected * width:
        with_all: Tensor = vectors @ bank.clone().T
        return with_all.gather(1, rows)
    return torch.einsum("nd,nkd->nk", vectors, bank[rows])
