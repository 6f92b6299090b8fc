"""PyTorch's own int8 quantization, two generations of it: only here torch.ao or torchao is used.

    eager static   torch.ao.quantization, as the original experiment used it: fuse, stubs, qconfig,
                   prepare, calibrate, convert. Deprecated; where a newer torch no longer has it,
                   `backends()` says so and the notebook goes on without.
    PT2E           torchao's supported successor: export, prepare, calibrate, convert, compile for
                   x86 with inductor.

Int8 kernels for these exist on the CPU; the networks returned here run there.
"""

import contextlib
import copy
import dataclasses
import importlib
import io
import logging
import operator
import platform
import shutil
import warnings

import torch
from torch import nn

from quantlab.graph import find_kinds, normalize, trace
from quantlab.system.errors import UserError


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to int8 and why it can or cannot run here; `note` is what a notebook prints."""

    name: str
    available: bool
    note: str


def backends():
    """Both generations, eager first, with the reason where one cannot run on this machine."""
    return [_eager_backend(), _pt2e_backend()]


def _eager_backend():
    try:
        importlib.import_module("torch.ao.quantization")
        engine = choose_engine()
    except ImportError:
        note = f"torch {torch.__version__} no longer has torch.ao.quantization; skipped"
        return Backend("eager", False, note)
    except UserError as error:
        return Backend("eager", False, f"{error}; skipped")
    return Backend("eager", True, f"torch.ao.quantization, engine {engine}")


def _pt2e_backend():
    try:
        with _quiet():
            importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    except ImportError as error:
        note = f"torchao's PT2E is not installed (pip install torchao; {error}); skipped"
        return Backend("pt2e", False, note)
    if platform.machine().lower() not in ("x86_64", "amd64"):
        note = f"its kernels are for x86, this is {platform.machine()}; skipped"
        return Backend("pt2e", False, note)
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return Backend("pt2e", False, "no C++ compiler found (apt install g++); skipped")
    return Backend("pt2e", True, "torchao PT2E, x86 inductor")


def choose_engine():
    """The quantized kernels of this machine: x86, else fbgemm, onednn or qnnpack.

    UserError where there are none.
    """
    supported = torch.backends.quantized.supported_engines
    for engine in ("x86", "fbgemm", "onednn", "qnnpack"):
        if engine in supported:
            return engine
    engines = ", ".join(supported) or "none"
    raise UserError(f"torch was built without quantized kernels (engines: {engines})")


@contextlib.contextmanager
def _use_engine(engine):
    """Inside, torch.ao converts for these kernels (None: this machine's): it reads a global."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine or choose_engine()
    try:
        yield torch.backends.quantized.engine
    finally:
        torch.backends.quantized.engine = before


def eager_act_bits():
    """Width of the eager path's activations: 7 where the engine reduces the range, else 8."""
    from torch.ao.quantization import get_default_qconfig

    with _quiet():
        observer = get_default_qconfig(choose_engine()).activation()
    return 7 if getattr(observer, "reduce_range", False) else 8


# ---- Eager static --------------------------------------------------------------------------------


def fuse(model):
    """A float copy: every [conv, bn, relu] and [conv, bn] fused, every `+` a FloatFunctional."""
    from torch.ao.nn.quantized import FloatFunctional
    from torch.ao.quantization import fuse_modules

    graph = trace(model)
    normalize(graph)
    groups = _fusible(graph)
    adds = [node for node, kind in find_kinds(graph).items() if kind == "add"]
    for i, node in enumerate(adds):
        graph.add_submodule(f"add_{i}", FloatFunctional())
        with graph.graph.inserting_before(node):
            functional = graph.graph.get_attr(f"add_{i}")
            result = graph.graph.call_method("add", (functional, *node.args))
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
    graph.recompile()
    with _quiet():
        return fuse_modules(graph, groups) if groups else graph


def _fusible(graph):
    """Module names of [conv, bn, relu] and [conv, bn] chains whose inner values nobody else reads.
    """
    kinds = find_kinds(graph)

    def follower(node, kind):
        user = next(iter(node.users), None)
        return user if len(node.users) == 1 and kinds[user] == kind else None

    groups = []
    for node in (n for n, kind in kinds.items() if kind == "compute"):
        bn = follower(node, "batchnorm")
        clamp = bn and follower(bn, "clamp")
        is_module = clamp is not None and clamp.op == "call_module"
        if is_module and type(graph.get_submodule(clamp.target)) is nn.ReLU:
            groups.append([node.target, bn.target, clamp.target])
        elif bn is not None:
            groups.append([node.target, bn.target])
    return groups


@torch.no_grad()
def eager_int8(model, batches, engine=None):
    """The original's path: fused, stubs around, the engine's default qconfig, calibrate, convert.

    On x86 engines the default qconfig keeps activations to 7 bits (reduce_range), because their
    int8 products could saturate otherwise.
    """
    from torch.ao.quantization import QuantWrapper, convert, get_default_qconfig, prepare

    with _use_engine(engine) as engine, _quiet():
        wrapped = QuantWrapper(fuse(copy.deepcopy(model).cpu())).eval()
        wrapped.qconfig = get_default_qconfig(engine)
        prepare(wrapped, inplace=True)
        for batch in batches:
            wrapped(batch)
        return convert(wrapped)


def dynamic_int8(model, engine=None):
    """A copy whose LSTM and linear layers hold int8 weights; CPU only.

    They choose the range of what they read anew at every call. Where the engine is x86 or fbgemm,
    torch keeps those activations to 7 bits (reduce_range), as in the static path.
    """
    from torch.ao.quantization import quantize_dynamic

    kinds = {nn.LSTM, nn.Linear}
    with _use_engine(engine), _quiet():
        return quantize_dynamic(copy.deepcopy(model).cpu().eval(), kinds, dtype=torch.qint8)


# ---- For comparison of speed ---------------------------------------------------------------------


def observed(model, example):
    """The network with torch.ao's HistogramObserver on every edge, ready for a calibration pass."""
    from torch.ao.quantization import QConfigMapping, get_default_qconfig
    from torch.ao.quantization.quantize_fx import prepare_fx

    with _quiet():
        mapping = QConfigMapping().set_global(get_default_qconfig(choose_engine()))
        return prepare_fx(copy.deepcopy(model).cpu().eval(), mapping, (example,))


@torch.no_grad()
def fake_quantized(model, batch):
    """The network with torch.ao's fake-quantize modules, as its FX path evaluates it.

    Calibrated on one batch, observers off.
    """
    from torch.ao import quantization as ao
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    with _quiet():
        mapping = ao.QConfigMapping().set_global(ao.get_default_qat_qconfig(choose_engine()))
        graph = prepare_qat_fx(copy.deepcopy(model).cpu().train(), mapping, (batch[:1],)).eval()
        graph(batch)
        return graph.apply(ao.disable_observer).apply(ao.enable_fake_quant)


# ---- PT2E ----------------------------------------------------------------------------------------


@torch.no_grad()
def pt2e_int8(model, batches, batch_size=64):
    """torchao's path: exported, X86InductorQuantizer's default, compiled by inductor.

    8-bit activations, per-channel int8 weights. Compiled once, for batches of `batch_size`; smaller
    ones are padded. Returns a callable on float32 [B, C, H, W].
    """
    with _quiet():
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

        batches = list(batches)
        example = batches[0][:1].expand(batch_size, -1, -1, -1)
        example = example.contiguous(memory_format=torch.channels_last)
        shapes = ({0: torch.export.Dim("batch", min=2, max=4096)},)
        # strict: every call of a shared ReLU becomes its own node, which the quantizer's patterns
        # need (pytorch/ao issue 4478)
        exported = torch.export.export(
            copy.deepcopy(model).cpu().eval(), (example,), dynamic_shapes=shapes, strict=True)
        config = x86.get_default_x86_inductor_quantization_config()
        prepared = prepare_pt2e(
            exported.module(), x86.X86InductorQuantizer().set_global(config))
        for images in batches:
            prepared(images)
        compiled = Compiled(convert_pt2e(prepared), batch_size)
        # as evaluation runs it: tensors made here have the properties that compilation checks for
        with torch.inference_mode():
            compiled(example.clone())
        return compiled


class Compiled:
    """The converted network, compiled with frozen weights: only then inductor takes int8 kernels.
    """

    def __init__(self, module, batch_size):
        self.module, self.batch_size = module, batch_size
        self.compiled = torch.compile(module, dynamic=False)

    def __call__(self, images):
        import torch._inductor.config as inductor

        missing = self.batch_size - len(images)
        padded = images
        if missing > 0:
            padded = torch.cat([images, images[:1].expand(missing, -1, -1, -1)])
        padded = padded.contiguous(memory_format=torch.channels_last)
        with _quiet(), inductor.patch(freezing=True), torch.inference_mode():
            return self.compiled(padded)[: len(images)]


# ---- Both ----------------------------------------------------------------------------------------


def bytes_on_disk(model):
    """Bytes of a torch.save of everything that the network reads when it runs."""
    state = model.state_dict() if isinstance(model, nn.Module) else _tensors_in_use(model.module)
    file = io.BytesIO()
    torch.save(state, file)
    return file.tell()


def _tensors_in_use(graph):
    """What a node names: a converted graph still owns the float weights that int8 ones replaced."""
    names = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    return {name: operator.attrgetter(name)(graph) for name in names}


@contextlib.contextmanager
def _quiet():
    """Hide what a reader cannot act on: that torch.ao is deprecated (we say so), observers' notes,
    torchao's missing CUDA extensions.
    """
    notes = "deprecated|reduce_range|must run observer|TypedStorage|erase_node|copy construct"
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree", "torch.ao")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*({notes}).*")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
