"""Methods by name: what each name builds, what is refused, rows that are measured once, and rows
found again among those published.
"""

import pytest
import torch

import quantlab as ql
from quantlab.improving import corrections
from quantlab.networks.cards import card_path, load_card
from quantlab.workbook import results
from quantlab.workbook.methods import METHODS, Methods, config_of, name_of
from quantlab.workbook.study import Study


@pytest.fixture
def builder(workbook, digits):
    study = Study(digits, "resnet20", n_calibration=32, limit=50, notebook="07_low_bit_methods")
    return Methods(study, iterations=1)


def codes(qmodel):
    """All weight codes and biases of a network, one tensor."""
    parts = [qmodel.codes(name).flatten().float() for name in qmodel.layers]
    parts += [layer.bias.detach().cpu() for layer in qmodel.layers.values()]
    return torch.cat(parts)


# ---- Names ---------------------------------------------------------------------------------------


def test_a_width_is_a_config_and_has_a_name():
    assert config_of("4/8") == ql.QuantConfig(4, 8)
    assert config_of("2/2/8") == ql.QuantConfig(2, 2, first_last_bits=8)
    assert config_of("3/3", first_last_bits=8, residual_bits=None) == ql.QuantConfig(
        3, 3, first_last_bits=8, residual_bits=None)
    assert [name_of(w) for w in ("4/8", "2/2/8")] == ["W4A8", "W2A2, first/last 8"]


@pytest.mark.parametrize("wrong", ["4", "4/4/4/4", "W4/A4", ""])
def test_a_width_of_another_form_is_refused(wrong):
    with pytest.raises(ql.UserError, match="as in 4/4 or 2/2/8"):
        config_of(wrong)


def test_every_name_of_the_list_and_combinations_of_its_parts_are_known():
    more = ["QDrop + Fisher", "BRECQ + bias correction", "equalisation + bias correction"]
    assert Methods.check([*METHODS, *more]) == [*METHODS, *more]


@pytest.mark.parametrize("wrong, said", [
    ("Qdrop", "'Qdrop' is unknown; did you mean QDrop?"),
    ("QDrop + finetuning", "'finetuning' is unknown; did you mean fine-tuning?"),
    ("fine-tuning", "'fine-tuning' is unknown"),
    ("nearest + Fisher", "Fisher is a loss of learning"),
])
def test_an_unknown_method_is_refused(wrong, said):
    with pytest.raises(ql.UserError) as error:
        Methods.check(["nearest", wrong])
    assert said in str(error.value)


# ---- Building ------------------------------------------------------------------------------------


def test_names_build_what_the_package_s_functions_build(builder):
    network, stats, config = builder.study.network, builder.study.stats, config_of("4/4")
    images = builder.study.calibration()
    nearest = ql.quantize(network, stats, config)
    assert torch.equal(codes(builder.build("nearest", config)), codes(nearest))
    corrected = corrections.correct_bias(network, nearest, images)
    assert torch.equal(codes(builder.build("bias correction", config)), codes(corrected))
    equal = ql.equalize(network)
    equal = ql.quantize(equal, ql.collect(equal, images), config)
    assert torch.equal(codes(builder.build("equalisation", config)), codes(equal))
    again = corrections.reestimate_batchnorm(network, equal, images)
    both = builder.build("equalisation + BatchNorm re-estimation", config)
    assert torch.equal(codes(both), codes(again))


def test_what_was_learned_is_learned_once_for_all_that_goes_on_from_it(builder, monkeypatch):
    from quantlab.workbook import methods

    learned, seen = ql.quantize(builder.study.network, builder.study.stats, config_of("4/4")), []

    def reconstruct(network, stats, images, config, learning, state):
        seen.append((learning.unit, learning.loss, learning.seed, config.weight_bits))
        return learned

    def tune(network, qmodel, images, config):
        return qmodel, config.learn_weights, config.iterations, config.batch_size, config.mixup

    monkeypatch.setattr(methods, "reconstruct", reconstruct)
    monkeypatch.setattr(methods, "tune_end_to_end", tune)
    config = config_of("4/4")
    assert builder.build("QDrop", config) is learned
    assert builder.build("QDrop + end to end", config) == (learned, False, 1, 32, 0)
    assert builder.build("QDrop + fine-tuning", config) == (learned, True, 1, 32, 0)
    assert builder.build("QDrop + long fine-tuning", config) == (learned, True, 3, 32, 0)
    assert builder.build("QDrop + augmented fine-tuning", config) == (learned, True, 3, 32, 0.5)
    assert seen == [("block", "mse", 0, 4)]
    builder.build("QDrop + Fisher", config)
    builder.build("AdaRound", config, seed=3)
    builder.build("AdaRound", config_of("3/4"), seed=3)
    assert seen[1:] == [("block", "fisher", 0, 4), ("layer", "mse", 3, 4), ("layer", "mse", 3, 3)]


# ---- Rows ----------------------------------------------------------------------------------------


def test_a_row_is_measured_once_and_says_which_images_are_wrong(builder, monkeypatch):
    row = builder.measure("nearest", config_of("2/2"))
    network = builder.build("nearest", config_of("2/2"))
    result = builder.study.evaluate(network)
    assert row["top1"] == result.top1 and row["bytes"] == ql.weight_bytes(network)
    assert row["wrong"] and torch.equal(builder.correct_images(row), result.correct)
    assert row["corrections"] == "" and row["units"] == [] and row["heldout"] is None
    monkeypatch.setattr(builder, "build", lambda *a: pytest.fail("built again"))
    assert builder.measure("nearest", config_of("2/2"))["top1"] == row["top1"]
    with pytest.raises(pytest.fail.Exception):
        builder.measure("nearest", config_of("2/2"), seed=1)


def test_a_learned_network_is_kept_and_read_again_by_its_card_alone(builder, workbook):
    config = config_of("4/4", weight_symmetric=False)
    row = builder.measure("AdaRound", config)
    path = builder.keep(row)
    assert path.name == f"resnet20-{row['dataset']}-w4a4.safetensors"
    network = ql.load_quantized(path)
    assert builder.study.evaluate(network).top1 == row["top1"]
    assert torch.equal(codes(network), codes(builder.build("AdaRound", config)))
    card = load_card(path)
    assert (card.test_top1, card.n_test, card.heldout_top1) == (
        row["top1"], row["n_test"], row["heldout"])
    assert card.recipe["corrections"] == row["corrections"] and card.recipe["levels"] == 16
    card_path(path).unlink()
    with pytest.raises(ql.UserError, match="has no card that names its network; give the float"):
        ql.load_quantized(path)
    assert ql.load_quantized(path, builder.study.network).config == config
    with pytest.raises(ql.UserError, match="is not there; delete results/rows"):
        builder.keep(builder.measure("nearest", config))


def test_no_wrong_image_is_no_wrong_image():
    assert Methods.correct_images({"n_test": 3, "wrong": []}).tolist() == [True] * 3


def test_a_learned_row_has_its_units_and_counts_on_held_out_images(builder):
    row = builder.measure("AdaRound + analytic bias correction", config_of("3/3"))
    assert row["corrections"] == "AdaRound + analytic bias correction, 1 iterations"
    assert len(row["units"]) == len(builder.build("nearest", config_of("3/3")).layers)
    assert all(unit["learned"] <= unit["nearest"] for unit in row["units"])
    assert 0 <= row["heldout"] <= 100


def test_rows_are_found_again_with_those_published_under_one_convention(builder):
    published = builder.measure("bias correction", config_of("4/4"))
    results.write(results.load(), results.published_path())
    results.local_path().unlink()
    builder.measure("nearest", config_of("4/4"))
    builder.measure("nearest", config_of("2/2/8"))
    builder.measure("nearest", config_of("4/4", residual_bits=None))
    builder.measure("nearest + bias correction", config_of("4/4"))  # not one of METHODS
    other = Methods(Study(
        builder.study.images, "resnet20", n_calibration=16, limit=50, notebook="07"), 1)
    other.measure("equalisation", config_of("4/4"))
    frame = builder.known(["2/2/8", "4/4"])
    assert list(frame[["name", "width"]].itertuples(index=False, name=None)) == [
        ("nearest", "2/2/8"), ("nearest", "4/4"), ("bias correction", "4/4")]
    assert frame.top1.iloc[-1] == published["top1"]
    assert builder.known(["4/4"], residual_bits=None).name.tolist() == ["nearest"]
    assert not len(builder.known(["3/3"]))
    assert other.known(["4/4"]).name.tolist() == ["equalisation"]
