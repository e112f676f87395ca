"""An objective bound to a student and its teachers: what a training step calls."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kirsch.distillation.arrays import first_array, namespace, to_int64, zero_masked
from kirsch.distillation.attach import of_all
from kirsch.distillation.losses.labels import LABEL_LOSSES
from kirsch.distillation.losses.loss import OUTPUT_KINDS, TOKEN_KINDS, get_loss, step_arguments
from kirsch.distillation.probabilities import check_training, logit_layers
from kirsch.distillation.schedule import at
from kirsch.distillation.targets import check_batch, check_labels, uses_labels
from kirsch.distillation.teachers import combined, holds_top_k, stored_scores
from kirsch.errors import DataError, UsageError
from kirsch.frameworks.layers import at_layers, texts
from kirsch.frameworks.training import LossOutput, require_labels

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.distillation.attach import Pair
    from kirsch.distillation.losses.loss import Loss
    from kirsch.distillation.objective import Objective
    from kirsch.distillation.teachers import TeacherSource
    from kirsch.distillation.term import Term
    from kirsch.frameworks.annotations import Regularizer
    from kirsch.frameworks.data import Batch
    from kirsch.frameworks.layers import LayerNames
    from kirsch.frameworks.port import Framework

CROSS = re.compile(r"cross|encoder_attn|EncDecAttention")
"""In the path of what a decoder attends to its encoder with, as models of transformers call it."""

SIDE = re.compile(r"encoder|decoder|cross")
"""The first of these in a path says where in a model of tokens it is: decoder.layers.0.encoder_attn in the decoder."""


class DistillationLoss:
    """Charges a module for a batch, as `kirsch.frameworks.training.LossFunction` wants it.

    Args:
        framework: of student and teachers.
        objective: what is charged.
        pairs: of its terms, as `attach` gives them.
        teacher_source: the teachers' side; None without terms.
        regularizers: further terms of the student alone.
        positions: mask of the inputs of a model of sequences → that of its positions.
        scores: the shape of the logits of one sample, by which targets are checked; None leaves them unchecked.
    """

    def __init__(
        self,
        framework: Framework,
        objective: Objective,
        pairs: Sequence[Pair] = (),
        teacher_source: TeacherSource | None = None,
        regularizers: Sequence[Regularizer] = (),
        positions: Callable[[Any], Any] = lambda mask: mask,
        scores: tuple[int, ...] | None = None,
    ) -> None:
        self._scores = scores
        self._positions_of = positions
        self._framework, self._objective, self._teacher_source = framework, objective, teacher_source
        self._pairs = [[pair for pair in pairs if pair.term == number] for number in range(len(objective.terms))]
        self._regularizers = regularizers
        self._sequences = any(
            get_loss(objective.terms[pair.term].loss).takes == "scores" and "×" in pair.shapes[0] for pair in pairs
        )
        self._names = _distinct([term.called for term in objective.terms])
        self._over = {pair.name: self._counted_by(pair) for pair in pairs}
        self._example = {self._over[pair.name]: pair for pair in pairs}
        self._labelled, self._warned = False, False  # whether a batch had labels that are used; see `_without_targets`
        self._trained_at = logit_layers(objective, pairs, None)  # looked at once, in training mode
        self._factors: dict[str, float] = {}
        self._used: dict[str, float] = {}

    def __call__(self, model: Any, batch: Batch, epoch: float, of: Mapping[str, int] | None = None) -> LossOutput:
        """What a batch is charged; see `LossFunction`."""
        batch = _wide_targets(batch)
        own = self.counts([batch])
        if of is None:
            require_labels(own, "a batch")
        whole = own if of is None else of
        shares = {over: count / whole[over] if count else 0.0 for over, count in own.items()}
        terms = [number for number, term in enumerate(self._objective.terms) if at(term.weight, epoch)]
        theirs = self._teacher_source(batch) if terms and self._teacher_source is not None else []
        held = {pair.name: self._held(pair, theirs, epoch) for number in terms for pair in self._pairs[number]}
        joined = {p.name: held[p.name][0] for number in terms for p in self._pairs[number] if p.adapter is not None}
        seen = model(batch.inputs, joined, batch.ids)
        if self._trained_at and getattr(model, "training", True):
            check_training(seen.values, self._trained_at, self._objective)
            self._trained_at = []
        parts: dict[str, Any] = {}
        aside: dict[str, Any] = {}
        if shares["labels"]:  # of a batch in which nothing counts there is no mean
            self._charge_labels(parts, seen.values.get("logits"), batch, epoch, shares["labels"])
        for number in terms:
            name, weight = self._names[number], at(self._objective.terms[number].weight, epoch)
            charged = {
                pair.name: share * self._charged(pair, seen, held[pair.name], batch, epoch)
                for pair in self._pairs[number]
                if (share := shares[self._over[pair.name]])
            }
            if charged:
                factor = weight * self._factors.get(name, 1.0)
                self._used[name] = factor
                parts[name] = factor * sum(charged.values())
            for pair in self._pairs[number]:
                if pair.name in seen.extra:
                    add(aside, f"{name}.adapter", shares["samples"] * seen.extra[pair.name])
        for regularizer in self._regularizers:
            part = regularizer(self._framework.student_of(model))
            add(parts, type(regularizer).__name__, shares["samples"] * part)
        if not parts:  # a step that several batches or processes share goes on without this one
            return LossOutput(0.0 * first_array(seen.values).sum(), parts)
        return LossOutput(sum(parts.values()) + sum(aside.values()), parts, aside)

    def _charge_labels(self, parts: dict[str, Any], scores: Any, batch: Batch, epoch: float, share: float) -> None:
        weight = at(self._objective.label_weight, epoch)
        if not weight or batch.targets is None:
            return
        scores, labels = self._aligned(scores, batch)
        mask = self._counting(labels)
        if mask is not None and not bool(mask.any()):  # none of these samples has a label
            return
        charged = LABEL_LOSSES[self._objective.label_loss]
        try:
            part = charged(scores, labels, mask=mask, label_smoothing=self._objective.label_smoothing)
        except (IndexError, RuntimeError):
            check_labels(labels, tuple(scores.shape[1:]), self._objective)  # those of the first batch were looked at
            raise
        if mask is not None and labels.ndim == 1:  # so that parts of a batch add up to it, however labels are spread
            part = part * (int(mask.sum()) / len(mask))
        self._used["label"] = weight
        parts["label"] = weight * share * part

    def _charged(self, pair: Pair, seen: Any, held: list[Any], batch: Batch, epoch: float) -> Any:
        """What a pair costs, over all teachers that it is held against."""
        term = self._objective.terms[pair.term]
        if pair.adapter is not None:
            sides = [seen.joined[pair.name]]
        else:
            sides = [(at_layers(seen.values, pair.student), theirs) for theirs in held]
        return sum(self._compared(term, mine, theirs, pair.student, batch, epoch) for mine, theirs in sides)

    def _held(self, pair: Pair, theirs: list[dict[str, Any]], epoch: float) -> list[Any]:
        """The values that a pair is held against: one, or one of each teacher."""
        term = self._objective.terms[pair.term]
        if len(theirs) == 1 or not of_all(term):
            return [at_layers(theirs[term.of or 0], pair.teacher)]
        scores = [at_layers(values, pair.teacher) for values in theirs]
        if self._objective.teachers == "sum":
            return scores
        loss, way = get_loss(term.loss), self._objective.teachers
        axis = 1 if loss.takes == "pixels" else -1
        return [combined(scores, way, term.keywords(epoch).get("temperature", 1.0), loss.activation, axis)]

    def _compared(self, term: Term, mine: Any, theirs: Any, layer: LayerNames, batch: Batch, epoch: float) -> Any:
        """One loss, with the labels, the mask and the time that it asks for."""
        loss, given = get_loss(term.loss), step_arguments(get_loss(term.loss))
        options, labels = term.keywords(epoch), batch.targets
        if loss.takes in OUTPUT_KINDS:
            mine, labels = self._aligned(mine, batch)
            theirs = theirs if not self._objective.causal else _shorter(theirs)
            mask = self._positions(mine, labels, batch, loss_needs_labels="labels" in given)
        else:
            mask = self._tokens_of(loss, layer, batch, mine)
        if holds_top_k(theirs):
            return stored_scores(term, mine, theirs, mask, options)
        if "labels" in given:
            if labels is None:
                raise UsageError(f"The term {term.called!r} needs labels, and a batch has none.")
            options["labels"] = zero_masked(labels, mask)
            if mask is not None and not bool(mask.any()):
                return 0.0 * first_array(mine).sum()
        if "mask" in given:
            options["mask"] = mask
        if "epoch" in given:
            options["epoch"] = epoch
        part = loss(mine, theirs, **options)
        if "labels" in given and mask is not None and labels.ndim == 1:  # as of the loss on labels
            part = part * (int(mask.sum()) / len(mask))
        return part

    def _tokens_of(self, loss: Loss, layer: LayerNames, batch: Batch, mine: Any) -> Any:
        """Which positions, or pairs of them, of what a sequence holds are compared; None for other values."""
        if loss.takes not in TOKEN_KINDS:
            return None
        mask = self._tokens(layer, batch, of_pairs=loss.takes == "attention")
        if mask is not None and mask.ndim == len("NQK"):
            mask = namespace(mask).broadcast_to(mask, (*mask.shape[:-1], mine.shape[-1]))
        return mask

    def _aligned(self, scores: Any, batch: Batch) -> tuple[Any, Any]:
        """Scores and labels, shifted against each other where each position predicts the next.

        What padding before a text would predict, its first token, does not count.
        """
        labels = batch.targets
        if not self._objective.causal:
            return scores, labels
        if labels is not None:
            real, labels = self._masks(batch).get("attention_mask"), labels[:, 1:]
            if real is not None:
                labels = namespace(labels).where(real[:, :-1] != 0, labels, self._objective.ignore)
        return scores[:, :-1], labels

    def _counting(self, labels: Any) -> Any:
        """True where there is a label; None where all count, as those that are no class numbers do."""
        if self._are_numbers(labels):
            return None
        counts = labels != self._objective.ignore
        return None if bool(counts.all()) else counts

    def _are_numbers(self, labels: Any) -> bool:
        """Whether labels are numbers to come near to, of which none stands for no label, and not numbers of classes."""
        return "float" in str(labels.dtype) or self._objective.label_loss == "squared-error"

    def _positions(self, scores: Any, labels: Any, batch: Batch, *, loss_needs_labels: bool) -> Any:
        """Which scores of teacher and student are compared.

        Of sequences and pixels, those with a label; of samples all, with a label or without, unless the loss needs it.
        """
        if labels is not None and (labels.ndim > 1 or loss_needs_labels):
            return self._counting(labels)
        return self._unlabelled(batch) if labels is None and scores.ndim == len("NLK") else None

    def _unlabelled(self, batch: Batch) -> Any:
        """Which positions of sequences without labels have scores that count."""
        mask = self._tokens("logits", batch)
        return mask if mask is None or not self._objective.causal else mask[:, 1:] * mask[:, :-1]

    def _masks(self, batch: Batch) -> Mapping[str, Any]:
        """What a batch of a model of tokens says about padding; empty for others."""
        given = batch.inputs if isinstance(batch.inputs, Mapping) else {}
        mask = given.get("attention_mask")
        return given if mask is None else {**given, "attention_mask": self._positions_of(mask)}

    def _tokens(self, layer: LayerNames, batch: Batch, *, of_pairs: bool = False) -> Any:
        """Which positions of a model of tokens are no padding; None where the batch does not say.

        Of a decoder beside an encoder these are, unless the batch says it, the positions with a label. Of pairs between
        both, a query in the decoder and a key in the encoder must count: (N, queries, keys), or (N, queries, 1) where
        all keys do.
        """
        masks, text = self._masks(batch), texts(layer)[0]
        side = SIDE.search(text)
        if not any(name.startswith("decoder_input") for name in masks) or (side and side[0] == "encoder"):
            return masks.get("attention_mask")
        found, labels = masks.get("decoder_attention_mask"), batch.targets
        if found is None and labels is not None and labels.ndim == len("NL") and not self._are_numbers(labels):
            found = labels != self._objective.ignore
        if of_pairs and CROSS.search(text) and found is not None:
            keys = masks.get("attention_mask")
            return (found != 0)[:, :, None] if keys is None else (found != 0)[:, :, None] & (keys != 0)[:, None, :]
        return found

    def counts(self, batches: Sequence[Batch]) -> dict[str, int]:
        """See `LossFunction`: samples, labels, and what else the means of terms go over."""
        found = dict.fromkeys(("samples", "labels", *self._example), 0)
        for batch in map(_wide_targets, batches):
            for over in found:
                found[over] += self._count(over, batch)
        return found

    def check(self, batch: Batch, *, wherever: bool = False) -> list[str]:
        """See `LossFunction`; `wherever`: also where the targets do not lie on the host."""
        if batch.targets is None:
            return self._without_targets()
        self._labelled = uses_labels(self._objective)
        if self._scores is not None:
            check_batch(batch.targets, self._scores, self._objective, wherever=wherever)
        return []

    def _without_targets(self) -> list[str]:
        """A warning, once, where a batch has no targets and those before have."""
        if not self._objective.terms:
            raise DataError(
                "A batch has no targets, and there is no teacher.",
                "There is nothing to learn from it.",
                "Give (inputs, targets) in each batch.",
            )
        if not self._labelled or self._warned:
            return []
        self._warned = True
        text = (
            "A batch has no targets, while batches before it have, so that the student learns from the teacher alone "
            "on it. If that is not intended, give (inputs, targets) in each batch."
        )
        return [text]

    def _counted_by(self, pair: Pair) -> str:
        """What the mean of a pair goes over: samples, labels, or positions of one side of a model of tokens."""
        loss = get_loss(self._objective.terms[pair.term].loss)
        if loss.takes in OUTPUT_KINDS:
            return "labels"
        if loss.takes not in TOKEN_KINDS or loss.over == "samples":
            return "samples"
        text = texts(pair.student)[0]
        across = " across" if loss.takes == "attention" and CROSS.search(text) else ""
        return f"{loss.over} of {side[0] if (side := SIDE.search(text)) else 'tokens'}{across}"

    def _count(self, over: str, batch: Batch) -> int:
        if over == "labels":
            return self._labels(batch)
        if over == "samples":
            return len(batch)
        pair = self._example[over]
        loss = get_loss(self._objective.terms[pair.term].loss)
        mask = self._tokens(pair.student, batch, of_pairs=loss.takes == "attention")
        if mask is None:
            return len(batch)
        counts = mask != 0
        if loss.over == "positions":
            return int((counts if counts.ndim == len("NL") else counts.any(-1)).sum())
        return int(((counts.sum(-1)) ** 2 if counts.ndim == len("NL") else counts).sum())

    def _labels(self, batch: Batch) -> int:
        """Samples, or the positions of sequences that count."""
        labels = batch.targets
        if labels is None and self._sequences and (mask := self._unlabelled(batch)) is not None:
            return int((mask != 0).sum())
        if labels is None or labels.ndim == 1 or self._are_numbers(labels):
            return len(batch)
        _, labels = self._aligned(labels, batch)
        return int((labels != self._objective.ignore).sum())

    def balance(self, norms: dict[str, float]) -> None:
        """Scale the terms so that their gradients stand to each other as their weights.

        Each weight then stands for that many lengths of the gradient of the labels, or of the first term without them.
        """
        if self._objective.balance != "gradient" or not norms:
            return
        present = [name for name in ("label", *self._names) if norms.get(name) and name in self._used]
        bare = {name: norms[name] / self._used[name] for name in present}
        for name in present[1:]:
            self._factors[name] = bare[present[0]] / bare[name]

    def state(self) -> dict[str, Any]:
        """See `LossFunction`."""
        return {"factors": dict(self._factors)}

    def restore(self, state: dict[str, Any]) -> None:
        """See `LossFunction`."""
        self._factors = dict(state.get("factors", {}))


def _wide_targets(batch: Batch) -> Batch:
    """A batch whose targets, if whole numbers, have 64 bits: in 8 of them -100 is a class, 156."""
    labels = batch.targets
    kind = str(getattr(labels, "dtype", "")).removeprefix("torch.")
    if "int" not in kind or kind == "int64":
        return batch
    return dataclasses.replace(batch, targets=to_int64(labels))


def _shorter(values: Any) -> Any:
    """Values of positions without the last."""
    if isinstance(values, Mapping):
        return {name: _shorter(value) for name, value in values.items()}
    return values[:, :-1]


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, the second of one as "name#2", so that none takes another's place."""
    return [
        name if not (before := names[:place].count(name)) else f"{name}#{before + 1}"
        for place, name in enumerate(names)
    ]


def add(parts: dict[str, Any], name: str, part: Any) -> None:
    """Add a part under its name, or "name#2"."""
    number = 1 + sum(known.partition("#")[0] == name for known in parts)
    parts[name if number == 1 else f"{name}#{number}"] = part
