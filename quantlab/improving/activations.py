"""The float and the quantized network side by side, unit by unit, with all activations between."""

import pathlib
import tempfile

import torch

from quantlab.improving.units import extract, find_units
from quantlab.quantized import find_quantizer, origin
from quantlab.system.contract import as_batches
from quantlab.system.errors import UserError

BATCH = 128  # images at once where nothing is learned


def stack_images(images, batch_size):
    """float32 [N, 3, H, W] of batches (system/contract.py); UserError for fewer than one."""
    batches = list(as_batches(images))
    images = torch.cat(batches) if batches else torch.empty(0)
    if len(images) < batch_size:
        raise UserError(
            f"{len(images)} calibration images do not fill a batch of {batch_size}; "
            "give more, or a smaller batch_size")
    return images


class Cache:
    """Activations of all images, key (two words) -> float32 [N, ...], at most `max_bytes` of them
    on the device.

    What does not fit lies in files that are mapped into memory, in a temporary folder that goes
    with the cache; the values are the same. Four-dimensional values are stored channels last, which
    CPU convolutions prefer.
    """

    def __init__(self, max_bytes, device="cpu"):
        self.max_bytes, self.device = max_bytes, device
        self.values, self.uncounted = {}, set()
        self.folder = tempfile.TemporaryDirectory(prefix="quantlab-")

    @property
    def bytes(self):
        """Bytes that count against max_bytes now."""
        counted = [v for k, v in self.values.items() if k not in self.uncounted]
        return sum(v.numel() * v.element_size() for v in counted)

    def give(self, key, value):
        """Remember the caller's own tensor."""
        self.values[key] = value
        self.uncounted.add(key)

    def allocate(self, key, shape):
        """Room for float32 values of that shape under `key`, not yet set."""
        count = torch.Size(shape).numel()
        if self.bytes + 4 * count > self.max_bytes:
            flat = torch.from_file(str(self._path(key)), True, count, dtype=torch.float32)
            self.uncounted.add(key)
        else:
            flat = torch.empty(count, device=self.device, dtype=torch.float32)
        if len(shape) == 4:
            n, c, h, w = shape
            self.values[key] = flat.view(n, h, w, c).permute(0, 3, 1, 2)
        else:
            self.values[key] = flat.view(shape)
        return self.values[key]

    def free(self, key):
        self.values.pop(key, None)
        if key in self.uncounted:
            self.uncounted.discard(key)
            self._path(key).unlink(missing_ok=True)

    def rows(self, key, index):
        """The values of those images (int64 [B], on the CPU), on the device."""
        value = self.values[key]
        index = index.to(value.device)
        if value.dim() == 4:  # in the order in which they lie in memory
            rows = value.permute(0, 2, 3, 1).index_select(0, index)
            return rows.to(self.device).permute(0, 3, 1, 2)
        return value.index_select(0, index).to(self.device)

    def _path(self, key):
        return pathlib.Path(self.folder.name) / "-".join(key)


class Networks:
    """Walks both networks unit by unit: kind "float" for the folded float graph, "quantized" for
    qmodel, which may change on the way.

    Cache keys are (kind, node). images: float32 [N, C, H, W].
    """

    def __init__(self, graph, qmodel, images, unit="block", max_cache_bytes=2**31):
        self.device = next(qmodel.parameters()).device
        self.graphs = {"float": graph.to(self.device), "quantized": qmodel}
        self.images, self.units = images, find_units(qmodel, unit)
        self.cache = Cache(max_cache_bytes, self.device)
        nodes = list(qmodel.graph.nodes)
        self.origins = {n.name: origin(qmodel, n).name for n in nodes}
        self.quantizers = {n.name for n in nodes if find_quantizer(qmodel, n) is not None}
        self.first = {n.name for n in nodes if n.op == "placeholder"}
        for name in self.first:
            self.cache.give(("float", name), images)
            self.cache.give(("quantized", name), images)

    def part(self, kind, i, outputs=None):
        """Unit i as a GraphModule, the cache keys of its inputs, and the names of its outputs
        (default: all that later units read).
        """
        unit = self.units[i]
        nodes, inputs, outputs = unit.nodes, unit.inputs, outputs or unit.outputs
        if kind == "float":
            nodes = [n for n in nodes if n not in self.quantizers]
            inputs = [*dict.fromkeys(self.origins[n] for n in inputs)]
            outputs = [n for n in dict.fromkeys(self.origins[n] for n in outputs) if n in nodes]
        keys = [(kind, n) for n in inputs]
        return extract(self.graphs[kind], nodes, inputs, outputs), keys, outputs

    @torch.no_grad()
    def run(self, kind, i, outputs=None):
        """Yields (image numbers, values of outputs) of unit i, batch by batch, over all images."""
        part, inputs, _ = self.part(kind, i, outputs)
        for index in torch.arange(len(self.images)).split(BATCH):
            yield index, part(*[self.cache.rows(key, index) for key in inputs])

    def advance(self, kind, i):
        """Compute and cache what later units read of unit i."""
        names = self.part(kind, i)[2]
        for index, values in self.run(kind, i):
            for name, value in zip(names, values, strict=True):
                self.fill((kind, name), index, value)

    def fill(self, key, index, value):
        """Store the values of those images (consecutive); UserError where they are no row each."""
        if value.shape[:1] != index.shape:
            raise UserError(
                f"node {key[1]} gives {list(value.shape)} for {len(index)} images; what a layer "
                "hands on must be [B, ...], images apart: write y.view(y.size(0), -1) and the like")
        if key not in self.cache.values:
            self.cache.allocate(key, (len(self.images), *value.shape[1:]))
        self.cache.values[key][index[0] : index[-1] + 1].copy_(value)

    def free(self, i):
        """Forget what no unit after i reads."""
        later = {n for unit in self.units[i + 1 :] for n in unit.inputs}
        needed = {("quantized", n) for n in later} | {("float", self.origins[n]) for n in later}
        for key in [k for k in self.cache.values if k not in needed]:
            self.cache.free(key)
