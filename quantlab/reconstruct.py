"""Learned rounding: AdaRound, block reconstruction (BRECQ) and QDrop as one loop.

    how = ReconstructConfig.preset("qdrop", iterations=1000)
    qmodel = reconstruct(model, stats, images, QuantConfig(4, 4), how)      # images: float32 [N, 3, H, W], or an iterable of batches
    qmodel.reconstruction                                                   # frame: unit, layers, nearest, learned (losses), seconds
"""

import dataclasses

from quantlab.ptq import QuantConfig


@dataclasses.dataclass(frozen=True)
class ReconstructConfig:
    """What is learned, on what, for how long; `preset(method, **changes)` gives the settings of a paper."""

    unit: str = "block"  # "layer" or "block" (residual block)
    input: str = "mixed"  # of a unit: "quantized" or "float" prefix, or "mixed" element by element (QDrop)
    drop: float = 0.5  # probability that an element stays float while learning, in "mixed" inputs and at every inner quantizer
    learn_activation_steps: bool = True
    loss: str = "mse"  # or "fisher"
    iterations: int = 1000  # a unit
    batch_size: int = 32
    lr: float = 1e-2  # of the rounding
    lr_steps: float = 1e-3  # of the activation steps, relative to the step
    lambda_: float = 0.01
    beta: tuple = (20.0, 2.0)
    warmup: float = 0.2  # share of the iterations without regulariser
    seed: int = 0
    max_cache_bytes: int = 2**31

    @classmethod
    def preset(cls, method="qdrop", **changes):
        """method: "adaround", "brecq" or "qdrop"."""
        return cls(**changes)


def reconstruct(model, stats, images, config=QuantConfig(), how=ReconstructConfig(), state=None, verbose=True, trace=None):
    """A quantized network as `quantize` gives it, its rounding learned unit by unit.

    state: path of a safetensors file that keeps finished units for a resume. trace(record): called after every iteration with a dict
    unit, iteration, loss, h (layer -> float32 tensor like its weight), steps (quantizer -> float).
    """
    raise NotImplementedError


def tune_end_to_end(model, qmodel, images, iterations=500, lr=1e-3, batch_size=64, seed=0, verbose=True):
    """A copy of qmodel whose steps, weight scales and biases are learned jointly against the float network's logits; codes stay."""
    raise NotImplementedError
