"""Whatever is put into an integer network, and from wherever it is called: its codes or a line."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import CHECKOUT
from torch import nn

import quantlab as ql
from quantlab.integer.fast import native
from quantlab.integer.network import EXECUTORS

EXECUTORS_HERE = {"reference": dict(executor="reference"),
                  "kernels": dict(executor="fast", compile=True),
                  "torch": dict(executor="fast", compile=False)}


def converted(*layers, **options):
    x = torch.randn(4, 3, 12, 12)
    model = nn.Sequential(*layers).eval()
    return ql.to_integer(ql.quantize(model, ql.collect(model, [x])), **options)


@pytest.fixture(scope="module", params=EXECUTORS_HERE)
def options(request):
    torch.manual_seed(0)
    return EXECUTORS_HERE[request.param]


@pytest.fixture(scope="module")
def imodel(options):
    """For images of 12x12 or 13x13 pixels."""
    return converted(
        nn.Conv2d(3, 20, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(20, 8, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(200, 5), **options)


@pytest.mark.parametrize("shape", [
    *((2, channels, 12, 12) for channels in (1, 2, 4, 6, 20)), (2, 3, 14, 12),
    (2, 3, 40, 40), (2, 3, 2, 2), (2, 3, 1, 40), (0, 3, 12, 12), (2, 3, 0, 0), (2, 0, 12, 12),
    (3, 12, 12), (2, 12, 12, 3), (2, 3, 12, 12, 1), (12,), ()])
def test_images_of_another_shape_are_refused_in_a_line(imodel, shape):
    for use in (imodel, imodel.codes):
        with pytest.raises(ql.UserError, match="images|channels") as error:
            use(torch.zeros(shape))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("images", [
    torch.full((2, 3, 12, 12), float("nan")), torch.zeros(2, 3, 12, 12, dtype=torch.uint8),
    torch.zeros(2, 3, 12, 12, dtype=torch.int64), [[1.0]], None])
def test_what_has_no_codes_is_refused_in_a_line(imodel, images):
    with pytest.raises(ql.UserError, match="images") as error:
        imodel(images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_another_float_type_have_the_codes_of_their_values(imodel, dtype):
    images = (3 * torch.randn(64, 3, 12, 12)).to(dtype)
    q = imodel.quantizer.qparams
    exact = images.double() / q.scale.double() + q.zero_point
    codes = imodel.input_codes(images).double() + imodel.offset
    assert ((codes - exact.clamp(q.qmin, q.qmax)).abs() <= 0.5 + 1e-4).all()
    assert torch.equal(imodel(images), imodel(images.float()))


def test_other_images_that_fit_are_computed(imodel):
    assert imodel(torch.zeros(2, 3, 13, 13)).shape == (2, 5)


class View(nn.Module):
    def forward(self, x):
        return x.view(-1, 2, 2, 12, 12).flatten(1)


def test_what_torch_refuses_is_one_line_too(options, capfd):
    imodel = converted(nn.Conv2d(3, 4, 1), nn.ReLU(), View(), nn.Linear(576, 5), **options)
    with pytest.raises(ql.UserError, match=r"of shape \[2, 3, 9, 9\] do not fit this") as error:
        imodel(torch.zeros(2, 3, 9, 9))
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")


def test_infinite_pixels_are_the_last_codes(imodel):
    x = torch.randn(2, 3, 12, 12)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = float("inf"), -float("inf")
    assert torch.equal(imodel(x), imodel(x.clamp(-1e30, 1e30)))


# ---- The kernels themselves ----------------------------------------------------------------------


def test_a_kernel_reads_only_the_codes_that_it_is_made_for():
    if native.library() is None:
        pytest.skip("no C compiler")
    weight, bias = torch.ones(20, 6, 3, 3, dtype=torch.int32), torch.zeros(20, dtype=torch.int32)
    layer = native.Layer(weight, bias, 0, padding=(1, 1, 1, 1))
    constants = torch.zeros(4 + 4 * native.OUT, dtype=torch.int32)
    good = torch.zeros(2, 5, 5, 6, dtype=torch.int8)
    assert layer(good).shape == (2, 5, 5, 20)
    narrow = torch.zeros(native.OUT, dtype=torch.int32)
    calls = [
        lambda x: layer(x),
        lambda x: native.requantize(x, 0, constants[:-1] if x is good else constants),
        lambda x: native.add(x, good, (0, 0), constants, constants[1:] if x is good else constants),
        lambda x: native.affine(x, 0, narrow, narrow[1:] if x is good else narrow, constants)]
    for call in calls[1:]:  # constants too short
        with pytest.raises(ValueError, match="reads int32"):
            call(good)
    for call in (calls[0], calls[2], lambda x: native.affine(x, 0, narrow, narrow, constants)):
        for bad in (good[..., :5].int(), good.float(), good.short()):
            with pytest.raises(ql.UserError):
                call(bad)
    for bad in (good[..., :4], torch.cat([good, good], 3), good[0]):
        with pytest.raises(ql.UserError, match="6 channels in the last of 4"):
            layer(bad)
    with pytest.raises(ql.UserError, match="cannot be added"):
        native.add(good, good[:1], (0, 0), constants, constants)
    with pytest.raises(ValueError, match="reads int32"):
        native.affine(torch.zeros(2, 17, dtype=torch.int8), 0, narrow, narrow, constants)
    for given in (dict(groups=3), dict(bias=bias[1:]), dict(weight=weight - 2**31 - 1)):
        with pytest.raises(ValueError, match="no layer"):
            native.Layer(**dict(weight=weight, bias=bias, zero_point=0) | given)


# ---- Threads, processes, the end -----------------------------------------------------------------

TOGETHER = """
import concurrent.futures, os, signal, sys, threading, time, torch, quantlab as ql
from torch import nn
model = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                      nn.Flatten(), nn.Linear(24, 10)).eval()
images = [torch.rand(16, 3, size, size) for size in (8, 20, 33)]
qmodel = ql.quantize(model, ql.collect(model, images))
for executor in ("reference", "fast"):
    imodel = ql.to_integer(qmodel, executor=executor)
    expected = [imodel(x) for x in images]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        several = list(pool.map(imodel, images * 40))
    wrong = sum(not torch.equal(a, b) for a, b in zip(several, expected * 40))
    print(executor, "wrong:", wrong, flush=True)
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        same = all(torch.equal(imodel(x), y) for x, y in zip(images, expected))
        print(executor, "child:", same, flush=True)
        os._exit(0)
    print(executor, "status:", os.waitpid(child, 0)[1], flush=True)

def compute(imodel):
    while True:
        imodel(images[2])

for executor in ("reference", "fast"):
    imodel = ql.to_integer(qmodel, executor=executor)
    threading.Thread(target=compute, args=(imodel,), daemon=True).start()
time.sleep(0.3)
print("end", flush=True)
"""


def test_threads_forks_and_an_end_in_the_middle():
    if not hasattr(os, "fork"):
        pytest.skip("no fork here")
    done = subprocess.run([sys.executable, "-c", TOGETHER], cwd=CHECKOUT, capture_output=True,
                          text=True, timeout=120)
    expected = [f"{executor} {what}" for executor in EXECUTORS
                for what in ("wrong: 0", "child: True", "status: 0")]
    assert done.stdout.splitlines() == [*expected, "end"], done.stderr
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_a_thread_that_outlives_the_main_thread_ends_its_work():
    code = TOGETHER.split("for executor")[0] + """
torch.set_num_threads(2)
images = torch.rand(64, 3, 64, 64)
imodel = ql.to_integer(qmodel, executor="fast")
first = imodel(images)
def compute():
    threading.main_thread().join()
    print(torch.equal(imodel(images), first), flush=True)
threading.Thread(target=compute).start()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True,
                          text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
