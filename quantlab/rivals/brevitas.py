"""Brevitas, a rival in an environment of its own: two files go back and forth.

    predictions, about = brevitas_predictions(model, "resnet20", 10, batches, images, settings)

A request (safetensors) holds the float network (network.NAME), the calibration and test images
(float32 [n, C, H, W], as the network reads them) and `settings`; the response the predictions
(int64 [n]) and what they were computed with. The other side is brevitas_worker.py.
"""

import json
import os
import subprocess
import tempfile

import safetensors

from quantlab.system.errors import UserError, check_name, one_line
from quantlab.system.files import PACKAGE, root, save_tensors

METHODS = ("GPTQ", "learned round")


def interpreter():
    """The Python of .venv-rivals; UserError where there is none."""
    path = root() / ".venv-rivals" / "bin" / "python"
    if not path.is_file():
        raise UserError("Brevitas runs in an environment of its own, .venv-rivals, which is not "
                        "there; make it with: make rivals")
    return path


def brevitas_predictions(network, model, num_outputs, calibration, test, settings):
    """(predictions int64 [n], about: seconds, versions) of the network that Brevitas makes.

    network: float, of the architecture `model`. calibration, test: batches, float32 [B, C, H, W].
    settings: method (of METHODS), weight_bits, act_bits, first_last_bits, seed, iterations.
    UserError where there is no environment, or in Brevitas' own words where it refuses.
    """
    import torch  # here, so that a missing environment is told before it is loaded

    check_name("method of Brevitas", settings["method"], METHODS)
    python, test = interpreter(), torch.cat([batch.cpu() for batch in test])
    with tempfile.TemporaryDirectory() as folder:
        request, response = f"{folder}/request.safetensors", f"{folder}/response.safetensors"
        tensors = {f"network.{name}": value for name, value in network.state_dict().items()}
        tensors |= {"calibration": torch.cat([b.cpu() for b in calibration]), "test": test}
        settings = {**settings, "model": model, "num_outputs": num_outputs}
        save_tensors(request, tensors, {"settings": json.dumps(settings)})
        _work(python, request, response)
        return read_response(response, len(test))


def _work(python, request, response):
    import torch

    own = {"PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [str(python), "-m", "quantlab.rivals.brevitas_worker", request, response]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"Brevitas refused: {one_line(lines[-1])}")


def read_response(path, n):
    """(predictions int64 [n], metadata) of a response; UserError for anything else."""
    try:
        with safetensors.safe_open(path, "pt") as stored:
            predictions, about = stored.get_tensor("predictions"), stored.metadata() or {}
        float(about["seconds"])
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"Brevitas wrote no response that can be read ({one_line(error)}); make "
                        "its environment again: rm -r .venv-rivals, then make rivals") from None
    if str(predictions.dtype) != "torch.int64" or predictions.shape != (n,):
        kind = f"{predictions.dtype} {list(predictions.shape)}"
        raise UserError(f"Brevitas wrote predictions of {kind}, not torch.int64 [{n}]")
    return predictions, about
