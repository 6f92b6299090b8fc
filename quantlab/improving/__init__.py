"""Better codes for the same bits: corrections in closed form, learned rounding, fine-tuning."""

from quantlab.improving.corrections import (
    correct_bias,
    correct_bias_analytic,
    reestimate_batchnorm,
)
from quantlab.improving.equalization import equalize
from quantlab.improving.reconstruct import ReconstructConfig, reconstruct
from quantlab.improving.tune import TuneConfig, tune_end_to_end
