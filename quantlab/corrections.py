"""Corrections of a quantized network that learn nothing: equalisation, bias correction, BatchNorm re-estimation."""


def equalize(model):
    """Cross-layer equalisation (Nagel et al. 2019, arXiv:1906.04721): a folded float graph with the same output; collect and quantize take it."""
    raise NotImplementedError


def correct_bias(model, qmodel, batches):
    """A copy of qmodel whose biases take out each channel's mean output error on `batches`, layer after layer, inputs from the quantized prefix."""
    raise NotImplementedError


def correct_bias_analytic(model, qmodel):
    """The same without data, from BatchNorm's statistics."""
    raise NotImplementedError


def reestimate_batchnorm(model, qmodel, batches):
    """A copy of qmodel whose formerly BatchNormed layers have the output mean and variance that BatchNorm would re-estimate."""
    raise NotImplementedError
