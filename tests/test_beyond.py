"""The dynamic int8 of PyTorch and the figures of notebooks 09 and 10."""

import pytest
import torch
from torch import nn

from quantlab.rivals import pytorch as builtin


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.fc = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(self.lstm(x)[0][:, -1])


@pytest.mark.skipif(not builtin.backends()[0].available, reason=builtin.backends()[0].note)
def test_dynamic_int8_replaces_lstm_and_linear_and_follows_the_float_network():
    model = Reader().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    network = builtin.dynamic_int8(model)
    assert type(network.lstm).__module__.startswith("torch.ao.nn.quantized.dynamic") and network.fc.weight().dtype == torch.qint8
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model itself is left alone"
    for gain in (1.0, 10.0):  # the range is chosen at every call, so larger inputs are followed too
        x = gain * torch.randn(32, 5, 8)
        with torch.no_grad():
            exact, rounded = model(x), network(x)
        assert (rounded - exact).square().sum() < 0.02 * exact.square().sum() and not torch.equal(rounded, exact)
    assert builtin.bytes_on_disk(network) < builtin.bytes_on_disk(model)
