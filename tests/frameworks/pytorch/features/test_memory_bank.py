"""The memory bank of CRD: updates, negatives, queue, and state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from kirsch.distillation.losses import LOSSES
from kirsch.errors import DataError, ShapeError, UsageError
from kirsch.frameworks.pytorch.features.adapters import bank_bytes, build
from kirsch.frameworks.pytorch.features.adapters.memory import products


def small_bank(**options):
    """Return a bank in float64 with embeddings of width 2.

    Its linear layers are the identity, so an input of norm 1 is its own embedding.
    """
    given = {"samples": 5, "negatives": 3, "width": 2, "temperature": 0.5, "dtype": torch.float64, **options}
    adapter = build("crd-bank", (2, 2), (2, 2), options=given)
    for side in (adapter.student, adapter.teacher):
        nn.init.eye_(side.linear.weight)
        nn.init.zeros_(side.linear.bias)
    return adapter


VALUES_S = torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
VALUES_T = torch.tensor([[0.0, 1.0], [0.8, -0.6]], dtype=torch.float64)


def test_initial_rows_have_norm_1():
    bank = small_bank()
    for rows in (bank.bank_student, bank.bank_teacher):
        assert torch.allclose(rows.norm(dim=1), torch.ones(5, dtype=torch.float64), atol=1e-6)  # initialized in float32
    assert not torch.equal(bank.bank_student, bank.bank_teacher)


def test_a_batch_moves_its_rows_halfway_to_its_embeddings_and_no_other_rows():
    bank = small_bank()
    before = bank.bank_student.clone(), bank.bank_teacher.clone()
    bank(VALUES_S, VALUES_T, ids=torch.tensor([3, 1]))
    for rows, old, new in zip((bank.bank_student, bank.bank_teacher), before, (VALUES_S, VALUES_T), strict=True):
        for place, value in ((3, new[0]), (1, new[1])):
            moved = 0.5 * old[place] + 0.5 * value
            assert torch.allclose(rows[place], moved / moved.norm(), atol=1e-15)
        assert torch.equal(rows[[0, 2, 4]], old[[0, 2, 4]])


def test_momentum_0_replaces_rows():
    bank = small_bank(momentum=0.0)
    bank(VALUES_S, VALUES_T, ids=torch.tensor([3, 1]))
    assert torch.allclose(bank.bank_student[[3, 1]], VALUES_S, atol=1e-15)
    assert torch.allclose(bank.bank_teacher[[3, 1]], VALUES_T, atol=1e-15)


def test_crd_bank_equals_the_authors_code():
    """The logits use the rows before the update, and Z is the mean score times the number of rows."""
    bank = small_bank()
    before = {"student": bank.bank_student.clone(), "teacher": bank.bank_teacher.clone()}
    ids = torch.tensor([3, 1])
    torch.manual_seed(4)
    rows = torch.cat([ids[:, None], bank._draw_rows(ids)], 1)
    torch.manual_seed(4)
    student_out, teacher_out = bank(VALUES_S, VALUES_T, ids=ids)
    total = 0.0
    for logits, vectors, stored in (
        (student_out, VALUES_S, before["teacher"]),
        (teacher_out, VALUES_T, before["student"]),
    ):
        scores = torch.exp(torch.einsum("nd,nkd->nk", vectors, stored[rows]) / 0.5)
        scores = scores / (scores.mean() * 5)
        assert torch.allclose(logits, torch.log(scores / (3 / 5)), atol=1e-12)
        noise = 3 / 5
        positive = torch.log(scores[:, 0] / (scores[:, 0] + noise + 1e-7)).sum()
        total -= (positive + torch.log(noise / (scores[:, 1:] + noise + 1e-7)).sum()) / 2
    # The authors add 1e-7 to each of the eight denominators of a sample, which are about 1.
    assert float(LOSSES["crd"](student_out, teacher_out).detach()) == pytest.approx(float(total), abs=1e-5)
    assert float(bank.z_student) > 0


def test_the_normalization_is_fixed_in_the_first_training_batch():
    bank = small_bank()
    bank.eval()
    bank(VALUES_S, VALUES_T, ids=torch.tensor([3, 1]))
    assert float(bank.z_student) == float(bank.z_teacher) == 0.0
    bank.train()
    bank(VALUES_S, VALUES_T, ids=torch.tensor([3, 1]))
    first = bank.z_student.clone(), bank.z_teacher.clone()
    assert min(map(float, first)) > 0
    for _ in range(3):
        bank(VALUES_T, VALUES_S, ids=torch.tensor([0, 2]))
    assert torch.equal(bank.z_student, first[0])
    assert torch.equal(bank.z_teacher, first[1])


def test_inference_does_not_change_the_bank():
    bank = small_bank().eval()
    before = copy.deepcopy(bank.state_dict())
    bank(VALUES_S, VALUES_T, ids=torch.tensor([3, 1]))
    assert all(torch.equal(before[name], value) for name, value in bank.state_dict().items())


def test_negatives_are_uniform_over_the_other_samples():
    bank = small_bank(samples=4, negatives=30000)
    ids = torch.tensor([0, 1, 2, 3])
    torch.manual_seed(0)
    rows = bank._draw_rows(ids)
    assert not bool((rows == ids[:, None]).any())
    for row, student_out in zip(rows, ids.tolist(), strict=True):
        counts = torch.bincount(row, minlength=4).tolist()
        assert counts.pop(student_out) == 0
        assert all(abs(count - 10000) < 500 for count in counts)  # a standard deviation of 82


def test_negatives_follow_from_the_seed():
    bank = small_bank(samples=1000, negatives=50)
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(bank._draw_rows(torch.tensor([3, 1])))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_products_by_matrix_and_by_gathering_are_equal():
    """Few rows of a large bank, and many rows of a small bank, with gradients."""
    torch.manual_seed(0)
    for rows, drawn_rows in ((1000, 2), (5, 40)):
        bank, places = torch.randn(rows, 3, dtype=torch.float64), torch.randint(rows, (4, drawn_rows))
        vectors = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        converted = products(vectors, bank, places)
        expected = (vectors[:, None] * bank[places]).sum(-1)
        assert torch.allclose(converted, expected, atol=1e-13)
        weights = torch.randn_like(converted)
        slopes = [torch.autograd.grad((part * weights).sum(), vectors)[0] for part in (converted, expected)]
        assert torch.allclose(*slopes, atol=1e-13)


@pytest.mark.parametrize("negatives", [1, 400])
def test_the_backward_pass_works_after_the_bank_is_updated(negatives):
    bank = small_bank(samples=300, negatives=negatives)
    student_out, teacher_out = bank(VALUES_S, VALUES_T, ids=torch.tensor([3, 1]))
    LOSSES["crd"](student_out, teacher_out).backward()
    assert float(bank.student.linear.weight.grad.abs().sum()) > 0
    assert float(bank.teacher.linear.weight.grad.abs().sum()) > 0


def test_a_queue_replaces_the_oldest_rows():
    bank = small_bank(samples=None, size=3)
    bank(VALUES_S, VALUES_T, ids=torch.tensor([70, 71]))
    assert bank.owners.tolist() == [70, 71, -1]
    assert torch.allclose(bank.bank_student[:2], VALUES_S, atol=1e-15)
    bank(VALUES_T, VALUES_S, ids=torch.tensor([72, 73]))
    assert bank.owners.tolist() == [73, 71, 72]
    assert torch.allclose(bank.bank_student[[2, 0]], VALUES_T, atol=1e-15)
    assert torch.allclose(bank.bank_teacher[[2, 0]], VALUES_S, atol=1e-15)


def test_a_queue_smaller_than_a_batch_stores_its_last_samples():
    bank = small_bank(samples=None, size=1)
    bank(VALUES_S, VALUES_T, ids=torch.tensor([70, 71]))
    assert bank.owners.tolist() == [71]
    assert torch.allclose(bank.bank_student, VALUES_S[1:], atol=1e-15)


def test_a_queue_takes_positives_from_the_batch_and_ignores_rows_of_the_same_sample():
    bank = small_bank(samples=None, size=2, negatives=40)
    bank(VALUES_S, VALUES_T, ids=torch.tensor([7, 8]))
    student_out, teacher_out = bank(VALUES_S, VALUES_T, ids=torch.tensor([7, 9]))
    hidden = torch.isinf(student_out)
    assert 0 < int(hidden[0].sum()) < 40  # one of two rows belongs to the sample
    assert not bool(hidden[1].any())
    assert torch.equal(hidden, torch.isinf(teacher_out))
    positive = (VALUES_S * VALUES_T).sum(-1) / 0.5 - torch.log(bank.z_student * 40 / 2)
    assert torch.allclose(student_out[:, 0], positive, atol=1e-12)
    visible = student_out.detach().clone()
    visible[hidden] = -1e4
    loss = LOSSES["crd"](student_out, teacher_out)
    assert float(loss.detach()) == pytest.approx(float(LOSSES["crd"](visible, teacher_out.detach())), rel=1e-12)
    loss.backward()
    assert bool(torch.isfinite(bank.student.linear.weight.grad).all())


def test_missing_and_wrong_numbers_of_ids_are_refused():
    with pytest.raises(UsageError, match=r"needs the ids of the samples.*stores embeddings by sample"):
        small_bank()(VALUES_S, VALUES_T)
    with pytest.raises(ShapeError, match=r"ids have shape \(3,\) for 2 samples"):
        small_bank()(VALUES_S, VALUES_T, ids=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("sample", [5, -1])
def test_an_id_outside_the_bank_is_refused(sample):
    bank = small_bank()
    before = bank.bank_student.clone()
    with pytest.raises(DataError, match=rf"has the sample id {sample}\. The bank has 5 samples, numbered from 0 to 4"):
        bank(VALUES_S, VALUES_T, ids=torch.tensor([1, sample]))
    assert torch.equal(bank.bank_student, before)


def test_ids_may_be_numpy_arrays_or_32_bit_integers():
    for ids in (torch.tensor([3, 1], dtype=torch.int32), torch.tensor([3, 1]).numpy()):
        assert small_bank()(VALUES_S, VALUES_T, ids=ids)[0].shape == (2, 4)


def test_bank_bytes_is_the_size_of_both_banks():
    bank = build("crd-bank", (2, 3), (2, 4), options={"samples": 70, "width": 16})
    assert bank_bytes(70, 16) == sum(rows.nbytes for rows in (bank.bank_student, bank.bank_teacher))
    assert bank_bytes(1_281_167) / 2**30 == pytest.approx(1.22, abs=0.01)  # ImageNet
    assert bank_bytes(70, dtype=torch.float64) == 2 * bank_bytes(70)


def test_a_bank_restored_from_its_state_continues_identically():
    bank = small_bank()
    bank(VALUES_S, VALUES_T, ids=torch.tensor([3, 1]))
    other = small_bank()
    other.load_state_dict(copy.deepcopy(bank.state_dict()))
    results = []
    for one in (bank, other):
        torch.manual_seed(6)
        results.append([part.detach() for _ in range(3) for part in one(VALUES_T, VALUES_S, ids=torch.tensor([0, 3]))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ------------------------------------------------------------------------------------------------ the loss of CRD


def test_crd_equals_its_closed_form():
    """Logits of 0 are probabilities of 1/2: (1 + K) log 2 for each direction."""
    assert float(LOSSES["crd"](torch.zeros(2, 4), torch.zeros(2, 4))) == pytest.approx(8 * math.log(2), rel=1e-6)
    student = torch.tensor([[math.log(3), -math.log(3)]], dtype=torch.float64)  # sigmoids 3/4, 1/4: both right with 3/4
    teacher = torch.tensor([[-math.log(3), math.log(3)]], dtype=torch.float64)  # both right with 1/4
    assert float(LOSSES["crd"](student, teacher)) == pytest.approx(
        -2 * math.log(3 / 4) - 2 * math.log(1 / 4), rel=1e-14
    )
