"""The adapter of CRD: embeddings of all samples are kept, so that a batch meets more negatives than it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.frameworks.pytorch.features.adapters.adapter import ADAPTERS, META, Adapter, Shape, in_full
from kirsch.frameworks.pytorch.features.adapters.vectors import Embedding

if TYPE_CHECKING:
    from torch import Tensor

MOMENTUM = 0.5

NOBODY = -1
"""The owner of a row that no sample has been written to."""


def bank_bytes(rows: int, width: int = 128, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of memory that the embeddings of a bank take, of student and teacher together.

    Args:
        rows: samples of the data, or the size of the queue.
        width: of an embedding.
        dtype: of the adapter.
    """
    return 2 * rows * width * dtype.itemsize


@ADAPTERS.register("crd-bank")
class Bank(Adapter):
    """How well the embedding of each sample finds its own among kept embeddings of the other network.

    Gives two arrays (N, 1 + negatives), one for each direction, as the loss "crd" takes them: of the sample itself
    first, then of negatives,

        log(exp(v · w / temperature) / Z) - log(negatives / rows)

    where v is the embedding in this batch, which takes a gradient, and w a kept one of the other network, which takes
    none. Z is the mean of exp(v · w / temperature) over the first batch of training, times rows; it stays what it was.

    Each sample has a row in both banks. After a batch of training its rows are momentum · row + (1 - momentum) ·
    embedding, scaled to length 1. In inference mode nothing is written. Negatives are drawn evenly, with replacement,
    from PyTorch's generator, among the rows of other samples.

    With `size` the last so many embeddings are kept in a queue, whatever the number of samples. A sample then finds its
    own among the other network's embeddings of the same batch, and rows of the sample itself are no negatives: their
    value is minus infinity, which the loss charges nothing for.

    Args:
        student, teacher: shape (N, D), (N, L, D) or (N, C, H, W); tokens and maps are averaged over places.
        samples: of the data; ids go from 0 to samples - 1. With `size` any ids will do if it is left out.
        size: rows of a queue in place of one row a sample.
        negatives: for each sample and direction.
        temperature: > 0.
        momentum: share of the old row that stays, 0 <= share < 1; 0.5 if left out. A queue has none.
        width: of the embeddings.

    Raises:
        UsageError: neither `samples` nor `size` is given, or a number is out of range.

    Source: Tian et al. 2020, arXiv:1910.10699, section 3.2, and the authors' code: 16384 negatives, temperature 0.07,
        momentum 0.5, width 128. There a sample itself may be drawn as a negative. The queue after He et al. 2020,
        arXiv:1911.05722.
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
        samples: int | None = None,
        size: int | None = None,
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float | None = None,
        width: int = 128,
    ) -> None:
        super().__init__()
        self.queue, self.samples = size is not None, samples
        self.rows = _checked(size if self.queue else samples, negatives, temperature, momentum, queue=self.queue)
        self.negatives, self.temperature = negatives, temperature
        self.momentum = MOMENTUM if momentum is None else momentum
        self.student = Embedding(student, width, pool=True, normalize=True)
        self.teacher = Embedding(teacher, width, pool=True, normalize=True)
        for name in ("student", "teacher"):
            self.register_buffer(f"bank_{name}", functional.normalize(torch.randn(self.rows, width), dim=-1))
            self.register_buffer(f"z_{name}", torch.zeros(()))  # 0: not fixed yet
        if self.queue:
            self.register_buffer("owners", torch.full((self.rows,), NOBODY))
            self.register_buffer("head", torch.zeros((), dtype=torch.int64))

    def forward(self, student: Tensor, teacher: Tensor, *, ids: Any = None) -> tuple[Any, Any]:
        """Logarithms of both directions, (N, 1 + negatives).

        Raises:
            UsageError: there are no ids.
            DataError: an id is outside the bank.
            ShapeError: there are more or fewer ids than samples.
        """
        ids = self._checked(ids, student)
        own = self.student(self.taken(student))
        its = self.teacher(self.taken(teacher.detach()))
        with in_full(own):
            kept = self.bank_student.dtype
            own, its = own.to(kept), its.to(kept)
            rows = self._drawn(ids)
            pair = (
                self._found(own, its, self.bank_teacher, self.z_student, ids, rows),
                self._found(its, own, self.bank_student, self.z_teacher, ids, rows),
            )
            if self.training:
                self._keep(own.detach(), its.detach(), ids)
        return pair

    def _checked(self, ids: Any, student: Tensor) -> Tensor:
        if ids is None:
            raise UsageError(
                "The adapter 'crd-bank' was not told which samples a batch is of.",
                "It keeps embeddings by sample, and finds them by `ids`.",
                "Give data that numbers its samples, or choose the adapter 'embed' and a loss within the batch.",
            )
        ids = torch.as_tensor(ids, device=student.device)
        if ids.shape != (len(student),):
            raise ShapeError(
                f"There are ids of shape {tuple(ids.shape)} for {len(student)} samples; one each is needed."
            )
        if self.samples is not None and ids.device.type != META:
            outside = (ids < 0) | (ids >= self.samples)
            if bool(outside.any()):
                raise DataError(
                    f"A batch has the sample {int(ids[outside][0])}.",
                    f"The bank is of {self.samples} samples, which go from 0 to {self.samples - 1}.",
                    "Give the option `samples` the number of samples of the data.",
                )
        numbers: Tensor = ids.long()
        return numbers

    def _drawn(self, ids: Tensor) -> Tensor:
        """Rows of negatives, (N, K); in a queue some may be of the sample itself."""
        shape = (len(ids), self.negatives)
        if self.queue:
            return torch.randint(self.rows, shape, device=ids.device)
        drawn = torch.randint(self.rows - 1, shape, device=ids.device)
        rows: Tensor = drawn + (drawn >= ids[:, None])  # its own row is passed over
        return rows

    def _found(self, of: Tensor, other: Tensor, bank: Tensor, z: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """log(exp(v · w / temperature) / Z / noise) of one direction, (N, 1 + K)."""
        positive = other.detach() if self.queue else bank[ids]
        others = products(of, bank, rows)
        if self.queue:
            others = others.masked_fill(self.owners[rows] == ids[:, None], -torch.inf)
        scores = torch.cat([(of * positive).sum(-1, keepdim=True), others], 1) / self.temperature
        with torch.no_grad():
            first = scores.exp().sum() / (scores > -torch.inf).sum() * self.rows
            fixed = torch.where(z > 0, z, first)
            if self.training:
                z.copy_(fixed)
        noise = self.negatives / self.rows
        return scores - torch.log(fixed * noise)

    @torch.no_grad()
    def _keep(self, own: Tensor, its: Tensor, ids: Tensor) -> None:
        if self.queue:
            own, its, ids = own[-self.rows :], its[-self.rows :], ids[-self.rows :]
            places = (self.head + torch.arange(len(ids), device=ids.device)) % self.rows
            self.owners[places] = ids
            self.head.add_(len(ids)).remainder_(self.rows)
        else:
            places = ids
            own, its = (
                functional.normalize(self.momentum * bank[ids] + (1 - self.momentum) * new, dim=-1)
                for bank, new in ((self.bank_student, own), (self.bank_teacher, its))
            )
        self.bank_student[places] = own
        self.bank_teacher[places] = its


def _checked(rows: int | None, negatives: int, temperature: float, momentum: float | None, *, queue: bool) -> int:
    """The rows of a bank, or a UsageError if an option of it is wrong."""
    if rows is None:
        raise UsageError(
            "The adapter 'crd-bank' does not know how many samples there are.",
            "It keeps one embedding of each.",
            "Give the option `samples`, or `size` for a queue of that many.",
        )
    if queue and momentum is not None:
        raise UsageError("The adapter 'crd-bank' has no 'momentum' with a 'size'.", "A queue keeps what it is given.")
    least = 1 if queue else 2  # one that is the sample itself, and another to be drawn
    for name, value, wrong, needed in (
        ("size" if queue else "samples", rows, rows < least, f"at least {least}"),
        ("negatives", negatives, negatives < 1, "at least 1"),
        ("temperature", temperature, not temperature > 0, "a number above 0"),
        ("momentum", momentum, not 0 <= (momentum or 0) < 1, "a share of at least 0, below 1,"),
    ):
        if wrong:
            raise UsageError(f"The option {name!r} of 'crd-bank' is {value}; {needed} is needed.")
    return rows


def products(vectors: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Inner products of each vector (N, D) with its rows (N, K) of a bank (R, D): shape (N, K).

    Those with all rows, (N, R), often take less memory than the rows that were drawn, (N, K, D), even with a copy of
    the bank: the gradient needs it as it was, and it is written to before.
    """
    (count, width), drawn = vectors.shape, rows.shape[1]
    if len(bank) * (count + width) <= count * drawn * width:
        every: Tensor = vectors @ bank.clone().T
        return every.gather(1, rows)
    return torch.einsum("nd,nkd->nk", vectors, bank[rows])
