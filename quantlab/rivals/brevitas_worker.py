"""Brevitas on one network, run by the interpreter of an environment of its own (`make rivals`).

    .venv-rivals/bin/python -m quantlab.rivals.brevitas_worker REQUEST RESPONSE

Both are safetensors files, described in brevitas.py. The settings are those of Brevitas' own
ImageNet example, target "layerwise", asymmetric activations, but for: no equalisation of channels
and activation ranges of least squared error, not percentiles (on calibration images left out, each
of both leaves its 3-bit network nearer to float); rounding learned on batches of 32 (there 1) in
float32 (there half precision); and the last layer known by its type (there by 1,000 outputs).
"""

import argparse
import importlib.metadata
import json
import sys
import time
import warnings

import safetensors
import safetensors.torch
import torch
from torch import nn

from quantlab.networks.architectures import build

BATCH = 64
LEARNING = dict(
    learned_round="hard_sigmoid", learned_round_mode="layerwise", learned_round_lr=1e-3,
    learned_round_lr_scheduler=None, learned_round_loss="regularised_mse",
    learned_round_batch_size=32)


def main(request, response):
    """Read the request, write the response; what Brevitas refuses is one line and status 1."""
    warnings.simplefilter("ignore")
    with safetensors.safe_open(request, "pt") as stored:
        settings = json.loads(stored.metadata()["settings"])
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    calibration, test = tensors.pop("calibration"), tensors.pop("test")
    torch.manual_seed(settings["seed"])
    network = build(settings["model"], settings["num_outputs"]).float().eval()
    network.load_state_dict({name.removeprefix("network."): t for name, t in tensors.items()})
    batches = [(images, None) for images in calibration.split(BATCH)]
    try:
        network = quantized(network, batches, settings)
        started = time.perf_counter()
        with torch.inference_mode():
            found = torch.cat([network(images).argmax(1) for images in test.split(100)])
    except (ValueError, RuntimeError, AssertionError, NotImplementedError, KeyError) as error:
        said = (str(error).strip().splitlines() or [""])[0]
        print(f"{type(error).__name__}: {said}", file=sys.stderr)
        return 1
    about = {
        "seconds": str(time.perf_counter() - started), "torch": torch.__version__,
        "brevitas": importlib.metadata.version("brevitas")}
    safetensors.torch.save_file({"predictions": found}, response, about)
    return 0


def quantized(network, batches, settings):
    """The network as Brevitas' example makes it: BatchNorm merged, quantizers before every layer,
    calibrated, GPTQ or learned rounding, bias correction.
    """
    from brevitas.graph.quantize import preprocess_for_quantize
    from brevitas_examples.imagenet_classification.ptq import ptq_common as example

    network = preprocess_for_quantize(network)
    network = with_quantizers(network, settings).eval()
    with torch.no_grad():
        network(batches[0][0])  # some scales are set by a first pass
    example.calibrate(batches, network)
    if settings["method"] == "GPTQ":
        example.apply_gptq(batches, network, act_order=True, create_weight_orig=True)
    elif settings["method"] == "learned round":
        learn_rounding(network, batches, settings["iterations"])
    else:
        raise ValueError(f"method {settings['method']!r} is unknown")
    example.apply_bias_correction(batches, network)
    return network


def with_quantizers(network, settings):
    """Weights per channel, symmetric, all 2^b codes; inputs of layers per tensor, asymmetric, of
    least squared error; biases 32 bits; first and last layer at bits of their own.
    """
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.inject import value
    from brevitas_examples.imagenet_classification.ptq.ptq_common import create_quant_maps

    def bits(inside):
        def bits_of(module):
            first = isinstance(module, nn.Conv2d) and module.in_channels == 3
            is_outer = first or isinstance(module, nn.Linear)
            return settings["first_last_bits"] if is_outer else settings[inside]

        return value(bits_of)

    _, layers, *_ = create_quant_maps(
        dtype=torch.float32, bias_bit_width=32, weight_bit_width=bits("weight_bits"),
        weight_param_method="stats", weight_scale_type="float_scale", weight_quant_type="sym",
        weight_quant_granularity="per_channel", weight_narrow_range=False,
        weight_quant_format="int", act_quant_format="int", act_bit_width=bits("act_bits"),
        act_scale_type="float_scale", act_scale_computation_type="static",
        act_param_method="mse", act_quant_type="asym", act_quant_granularity="per_tensor",
        act_quant_percentile=99.999)
    return layerwise_quantize(network, layers)


def learn_rounding(network, batches, iterations):
    """Its example's learned rounding (AdaRound's), layer by layer."""
    import functools

    from brevitas_examples.common.learned_round import learned_round_trainer as trainer
    from brevitas_examples.imagenet_classification.ptq import learned_round_utils as example

    settings = argparse.Namespace(**LEARNING, learned_round_iters=iterations)
    config = example.parse_args_to_dataclass(settings)
    config.training_args.use_amp = False
    trainer.LearnedRoundTrainer(config=config).train(
        model=network, model_forward=example.vision_forward,
        block_forward=example.vision_block_forward, data_loader=batches,
        cache=example.CacheVision(), keep_gpu=True,
        get_blocks_fn=functools.partial(
            trainer.get_blocks, block_check_fn=example.is_layer))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
