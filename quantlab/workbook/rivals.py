"""Other tools on a study's network, calibration images and test images, a row each, ours beside
them in the convention of Brevitas.

    frame = compared(study, ["8/8", "4/4"])

That convention: first and last layer 8 bits (or the third number of a width), the residual stream
float, all 2^b codes of a weight, per channel.
"""

import pandas as pd
import torch
from torch import nn

from quantlab.evaluate import Evaluation
from quantlab.rivals import brevitas, onnxruntime, pytorch
from quantlab.system.errors import UserError
from quantlab.system.files import sha256
from quantlab.system.machine import device_name
from quantlab.workbook import results
from quantlab.workbook.allowed import split_width
from quantlab.workbook.methods import Methods, config_of, name_of

INT8 = ("PT2E int8", "ONNX Runtime int8")
BREVITAS = tuple(f"Brevitas {method}" for method in brevitas.METHODS)
WORKER = brevitas.__file__.replace("brevitas.py", "brevitas_worker.py")


def with_outer(width):
    """A width with the bits of first and last layer: 8 where it does not say."""
    return width if len(split_width(width)) == 3 else f"{width}/8"


def convention(width):
    """The QuantConfig of ours that shares Brevitas' convention."""
    return config_of(with_outer(width), weight_symmetric=False, residual_bits=None)


def compared(study, widths, methods=("nearest",), iterations=0, say=print):
    """The rows of every tool and of `methods` of ours at every width, measured once: a frame.

    iterations: of learned rounding, ours and theirs. What a tool cannot do is said in one line.
    """
    builder, rows = Methods(study, iterations), []
    for width in widths:
        for name in (*INT8, *BREVITAS):
            try:
                rows.append(tool_row(builder, name, width))
            except (ImportError, UserError) as error:
                say(f"{name} has no {name_of(width)}: {str(error).removesuffix('; skipped')}")
        rows += [builder.measure(method, convention(width)) for method in methods]
    return results.typed(pd.DataFrame(rows))


def tool_row(builder, name, width):
    """The row of a tool at a width, measured once; ImportError or UserError where it cannot."""
    if name in BREVITAS:
        return brevitas_row(builder, name.removeprefix("Brevitas "), width)
    if split_width(width)[:2] != [8, 8]:
        raise UserError("its kernels are for 8 bits")
    return builder.study.once({"tool": name}, lambda state: int8_row(builder.study, name))


# ---- Eight bits ----------------------------------------------------------------------------------


def int8_row(study, name):
    """The row of a tool of INT8; UserError or ImportError where it cannot run here."""
    network, batches = study.network.cpu(), study.calibration()
    if name == "PT2E int8":
        (backend,) = (b for b in pytorch.backends() if b.name == "pt2e")
        if not backend.available:
            raise UserError(backend.note)
        converted = pytorch.pt2e_int8(network, batches, batch_size=100)
        size = pytorch.bytes_on_disk(converted)
    else:
        converted = onnxruntime.onnxruntime_int8(network, batches)
        size = converted.bytes
    result = study.evaluate(converted, on="cpu")
    bits = dict(weight_bits=8, act_bits=8, n_calibration=study.n_calibration)
    return study.row(result, name, bytes=size, **bits)


# ---- Brevitas ------------------------------------------------------------------------------------


def brevitas_row(builder, method, width):
    """The row of Brevitas' GPTQ or learned round at a width, measured once; UserError where it
    cannot.
    """
    study, config = builder.study, convention(width)
    iterations = builder.iterations if method == "learned round" else 0
    settings = {
        "method": method, "weight_bits": config.weight_bits, "act_bits": config.act_bits,
        "first_last_bits": config.first_last_bits, "seed": study.seed, "iterations": iterations}

    def measure(state):
        predictions, about = brevitas.brevitas_predictions(
            study.network, study.model, study.card.num_outputs, study.calibration(),
            [images for images, _ in study.test.batches()], settings)
        result = Evaluation.of(
            predictions, study.test.labels, float(about["seconds"]),
            device_name(torch.device("cpu")))
        steps = [f"{iterations} iterations"] if iterations else []
        steps += ["bias correction", about["brevitas"]]
        note = ", ".join([name_of(with_outer(width)), *steps])
        return study.row(
            result, f"Brevitas {method}", bytes=stored_bytes(study.network, config),
            corrections=note, n_calibration=study.n_calibration, **brevitas_columns(config))

    brevitas.interpreter()
    return study.once({**settings, "tool": "Brevitas", "worker": sha256(WORKER)}, measure)


def brevitas_columns(config):
    """What its rows say of its convention: a quantizer before every layer, the first one's of the
    image among them; symmetric weights of all 2^b codes, two's complement.
    """
    own = dict(
        placement="inputs", input_bits=config.first_last_bits, symmetric="weights",
        levels=2**config.weight_bits, observer="mse", weight_observer="minmax")
    return results.describe(config) | own


def stored_bytes(network, config):
    """Packed codes of all layers, a float32 scale and an int32 bias for each of their channels."""
    layers = [m.weight for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    bits = [config.weight_bits] * len(layers)
    bits[0] = bits[-1] = config.first_last_bits
    codes = sum(-(-weight.numel() * b // 8) for weight, b in zip(layers, bits, strict=True))
    return codes + 8 * sum(map(len, layers))


def brevitas_losses(rows):
    """Mean points lost of Brevitas' rows, first and last layer 8 bits: width "4/4" -> a column a
    method.
    """
    own = rows[rows.method.isin(BREVITAS) & rows.first_last_bits.eq(8)]
    widths = own.weight_bits.astype(str) + "/" + own.act_bits.astype(str)
    return own.assign(width=widths).pivot_table("drop", "width", "method")
