"""Errors for models that cannot be traced name their kind and an alternative; unusual attributes are copied."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as masks

import kirsch
from kirsch.errors import ModelError
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.graph.plan import Goal
from kirsch.pruning.prune import prune_with_verification

X = torch.randn(3, 8)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


class Net(nn.Module):
    def __init__(self, wrap=lambda layer: layer, **attributes):
        super().__init__()
        self.a, self.b = wrap(nn.Linear(8, 16)), nn.Linear(16, 4)
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def run(model):
    model(X)
    return model


HOOKED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "mask": lambda layer: masks.l1_unstructured(layer, "weight", 0.3),
}


@pytest.mark.parametrize("kind", HOOKED)
@pytest.mark.parametrize("ran", [False, True])
def test_a_model_with_a_weight_computed_by_a_hook_is_pruned(kind, ran):
    model = Net(HOOKED[kind])
    model = run(model) if ran else model
    pruned = prune_with_verification(model, kirsch.plan(kirsch.trace(model, X), Goal(macs=0.5))).model
    assert pruned.a.weight.shape[0] == pruned.a.out_features == pruned.b.in_features < 16
    pruned.train()(X).sum().backward()
    assert prune_with_verification(pruned, kirsch.plan(kirsch.trace(pruned, X), Goal(macs=0.7))).verification.passed


ATTRIBUTES = {
    "a lock": lambda: Net(lock=threading.Lock()),
    "a reentrant lock": lambda: Net(lock=threading.RLock()),
    "a lock in a list": lambda: Net(locks=[{"one": threading.Lock()}]),
    "a generator of random numbers": lambda: Net(chance=torch.Generator()),
    "a function": lambda: Net(function=lambda x: x),
    "a cache": lambda: Net(cache=[Net().a(X)]),
    "a cache in an object": lambda: Net(cache=SimpleNamespace(x=Net().a(X))),
}


@pytest.mark.parametrize("kind", ATTRIBUTES)
def test_a_model_with_an_attribute_that_deepcopy_rejects_is_pruned(kind):
    model = ATTRIBUTES[kind]()
    assert prune_with_verification(model, kirsch.plan(kirsch.trace(model, X), Goal(macs=0.5))).verification.passed


def test_a_copy_has_a_new_lock():
    model = Net(lock=threading.Lock())
    with model.lock:
        assert not copy_of(model).lock.locked()


def test_the_error_for_a_model_that_cannot_be_copied_names_the_attribute(tmp_path):
    path = tmp_path / "log"
    with (
        path.open("w") as log,
        pytest.raises(ModelError, match=r"A Net cannot be copied\. Its attribute `log`, a Text"),
    ):
        kirsch.trace(Net(log=log), X)
    model = nn.Sequential(Net(), nn.ReLU())
    model[0].stream = (number for number in range(3))
    with pytest.raises(ModelError, match=r"Its attribute `0\.stream`, a generator, cannot be copied: TypeError"):
        kirsch.trace(model, X)


class Shared(Net):
    """A model with two parameters in the same memory."""

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(8, 16)
        self.c.weight = nn.Parameter(self.a.weight.data[:])

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) + self.c(x))


class Interleaved(Shared):
    """A model with two parameters whose rows alternate in one range of memory, without a common element."""

    def __init__(self):
        super().__init__()
        both = torch.randn(16, 16)
        self.a.weight, self.c.weight = nn.Parameter(both[:, ::2]), nn.Parameter(both[:, 1::2])


class Column(Interleaved):
    """A model in which a bias is a column of a weight, and another parameter begins between them in memory."""

    def __init__(self):
        super().__init__()
        self.c.bias = nn.Parameter(self.a.weight.data[:, 7])


class Sparse(Net):
    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.eye(8).to_sparse())

    def forward(self, x):
        return super().forward(torch.sparse.mm(self.mix, x.t()).t())


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.rnn, self.out = nn.Linear(8, 6), nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(self.into(x), lengths, batch_first=True)
        return self.out(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


class Nested(Net):
    def forward(self, x):
        rows = torch.nested.as_nested_tensor([x[:1], x[1:]], layout=torch.jagged)
        return super().forward(rows).to_padded_tensor(0.0)


def observed():
    from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

    model = Net().train()
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model)


def packed_integers():
    model = Net()
    model.a.weight = nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    return model


def with_layer_of(package):
    """Return a model with a layer whose class claims to come from a package that is not installed."""
    kind = type("Dense", (nn.Linear,), {"__module__": package})
    model = Net()
    model.a = kind(8, 16)
    return model


UNTRACEABLE = {
    "scripted TorchScript": (lambda: torch.jit.script(Net()), "It is TorchScript.*the Python module"),
    "traced TorchScript": (lambda: torch.jit.trace(Net(), X), "It is TorchScript"),
    "a part in TorchScript": (lambda: Net(torch.jit.script), "Its part `a` is TorchScript"),
    "dynamic int8": (
        lambda: torch.ao.quantization.quantize_dynamic(Net().eval(), {nn.Linear}, dtype=torch.qint8),
        r"Its part `a` is a quantized Linear.*quantize the pruned one",
    ),
    "observers": (observed, "Its part `a.weight_fake_quant` is a .*prepare the pruned one"),
    "packed integers": (packed_integers, "Its parameter `a.weight` has dtype torch.uint8.*quantize the pruned"),
    "Keras": (
        lambda: with_layer_of("keras.src.layers"),
        "Its part `a` is a Keras model.*PyTorch model with the same weights",
    ),
    "bitsandbytes": (lambda: with_layer_of("bitsandbytes.nn"), "Its part `a` is a quantized Dense"),
    "FSDP": (
        lambda: with_layer_of("torch.distributed.fsdp.x"),
        "Its part `a` is sharded by FSDP.*before it is sharded",
    ),
    "shared memory": (Shared, "`a.weight` and `c.weight` are two objects in the same memory.*the same parameter"),
    "sparse": (Sparse, r"Its `mix` is torch.sparse_coo, not a dense tensor\..*to_dense"),
    "lazy": (lambda: Net(lambda _: nn.LazyLinear(16)), "Its 'a.weight' is lazy.*Run the model once"),
    "nested": (Nested, "computes with nested tensors.*padded batch and a mask"),
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_the_error_for_a_model_that_cannot_be_traced_names_its_kind(kind):
    build, sentence = UNTRACEABLE[kind]
    with pytest.raises(ModelError, match=sentence):
        kirsch.trace(build(), X)


def test_parameters_that_share_memory_but_no_element_are_cut():
    model = Interleaved()
    plan = kirsch.plan(kirsch.trace(model, X), Goal(macs=0.5))
    assert prune_with_verification(model, plan).verification.passed


def test_the_error_for_a_common_element_names_both_parameters():
    with pytest.raises(ModelError, match=r"`a.weight` and `c.bias` are two objects in the same memory"):
        kirsch.trace(Column(), X)


def test_the_error_for_packed_sequences_proposes_a_padded_batch():
    with pytest.raises(ModelError, match=r"It packs sequences .*passes the padded batch to the recurrent layer"):
        kirsch.trace(Packed(), (torch.randn(3, 5, 8), torch.tensor([5, 3, 2])))


def test_the_error_for_distributed_data_parallel_proposes_the_inner_module(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(ModelError, match=r"wrapped in DistributedDataParallel\. Use model\.module"):
            kirsch.trace(wrapped, X)
        with pytest.raises(ModelError, match=r"cannot be exported.* Use model\.module"):
            kirsch.export(wrapped, tmp_path / "model.onnx", example_inputs=X)
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_on_the_meta_device_can_only_be_planned_with_random_importance():
    graph = kirsch.trace(Net().to("meta"), X.to("meta"))
    with pytest.raises(ModelError, match=r"The parameter 'a\.weight' of Net has no values.*importance=\"random\""):
        kirsch.plan(graph, Goal(macs=0.5))
    assert kirsch.plan(graph, Goal(macs=0.5), importance="random").groups


def test_distill_with_a_model_on_the_meta_device_raises_an_error():
    data = [(X, torch.tensor([0, 1, 2]))]
    for student, teacher in ((Net().to("meta"), Net()), (Net(), Net().to("meta"))):
        with pytest.raises(ModelError, match=r"Its parameter `a\.weight` is on the meta device"):
            kirsch.distill(student, teacher, data, check_teacher=False)


class Recording(nn.Module):
    """A model whose hook stores activations in a dict, a list and an attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 2)
        self.seen, self.all, self.latest = {}, [], None
        self.first.register_forward_hook(self._record)

    def _record(self, _module, _args, output):
        self.seen["first"] = self.latest = output.detach()
        self.all.append(output.detach())

    def forward(self, x):
        return self.last(self.first(x).relu())


def test_a_trace_does_not_change_what_hooks_stored_in_the_model():
    model, x = Recording(), torch.randn(2, 4)
    model(x)
    before = (model.seen["first"], model.latest, list(model.all))
    graph = kirsch.trace(model, x)
    assert model.seen["first"] is before[0]
    assert model.latest is before[1]
    assert [id(value) for value in model.all] == [id(value) for value in before[2]]
    pruned = kirsch.prune(model, kirsch.plan(graph, Goal(parameters=0.6)))
    assert torch.equal(copy_of(pruned)(x), pruned(x))


@pytest.mark.filterwarnings("ignore")  # PyTorch warns about its own quantization
@pytest.mark.parametrize("use", [kirsch.export, kirsch.measure])
def test_exporting_a_quantized_model_raises_an_error(tmp_path, use):
    quantization = torch.ao.quantization
    model = nn.Sequential(quantization.QuantStub(), nn.Linear(4, 2), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig("x86")
    x = torch.randn(2, 4)
    quantization.prepare(model, inplace=True)
    model(x)
    quantization.convert(model, inplace=True)
    with pytest.raises(
        ModelError, match=r"cannot be exported.*a quantized .*Export the floating-point model, and quant"
    ):
        use(model, **({"path": tmp_path / "model.onnx"} if use is kirsch.export else {}), example_inputs=x)
